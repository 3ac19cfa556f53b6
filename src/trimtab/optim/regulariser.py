"""What regularisers have in common: they act around the steps of any torch optimizer, through its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import canonical_name
from trimtab.optim.diagnostics import unwrapped
from trimtab.optim.precision import RESIDUAL, exact_value, restore_dtypes, store_exact
from trimtab.optim.shell import MergingShell, moves

Kind = TypeVar("Kind", bound="Regulariser")


class Regulariser:
    """Acts before and after every step of an optimizer, and keeps its state in the optimizer's own.

    It may be attached to any ``torch.optim.Optimizer``, an online merging one included (to
    :class:`~trimtab.OnlineMerging` itself, not to what it wraps), and to several optimizers by several
    objects. Regularisers act in the order in which they were attached.

    What is kept for a parameter is an entry of ``optimizer.state[p]``, so that ``state_dict`` has it. It gets
    there after the first step that the parameter takes: entries of others before that would keep AdamW from
    making its own. A step with a learning rate of 0 moves nothing, and neither averages nor resets count it
    (checkpoint loaders take such steps).

    Args:
        optimizer: what to attach to, also inside accelerate's wrapper.

    Raises:
        UserError: it is no optimizer, or one that online merging is wrapped around.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Optimizer = _attachable(optimizer, type(self))
        self._fresh: dict[Tensor, dict[str, Any]] = {}
        self._handles = [
            self.optimizer.register_step_pre_hook(self._pre_step),
            self.optimizer.register_step_post_hook(self._post_step),
            self.optimizer.register_load_state_dict_pre_hook(self._pre_load),
            self.optimizer.register_load_state_dict_post_hook(self._post_load),
        ]

    def detach(self) -> None:
        """Act no more; what was kept stays in the optimizer's state."""
        for handle in self._handles:
            handle.remove()

    # -- what a regulariser does

    def before_step(self) -> None:
        """Act on gradients and parameters before the optimizer's step."""

    def after_step(self) -> None:
        """Act on parameters after the optimizer's step."""

    # -- what is kept

    def kept(self, p: Tensor, key: str) -> Any:
        """What is kept for a parameter under a key; None where nothing is."""
        fresh = self._fresh.get(p, {})
        return fresh[key] if key in fresh else self.optimizer.state.get(p, {}).get(key)

    def keep(self, p: Tensor, key: str, value: Any) -> None:
        """Keep something for a parameter that takes this step."""
        self._fresh.setdefault(p, {})[key] = value

    def count(self, group: dict[str, Any], key: str) -> int:
        """Count a step of a group of parameters; returns the number of steps so far."""
        group[key] = group.get(key, 0) + 1
        return int(group[key])

    def residual(self, p: Tensor) -> Tensor | None:
        """What an online merging optimizer keeps beside a parameter below fp32."""
        found: Tensor | None = self.optimizer.state.get(p, {}).get(RESIDUAL)
        return found

    def value(self, p: Tensor) -> Tensor:
        """The local part of a parameter's exact value, fp32 or wider."""
        return exact_value(p, self.residual(p))

    def set_value(self, p: Tensor, value: Tensor) -> None:
        """Give a parameter a value, exactly where it has a residual."""
        store_exact(p, self.residual(p), value)

    # -- what takes part

    def moving_groups(self) -> Iterator[dict[str, Any]]:
        """The groups of parameters whose learning rate is not 0."""
        return (group for group in self.optimizer.param_groups if moves(group))

    def named(self, group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, parameter) of the group's parameters that take this step."""
        if "param_names" not in group:
            raise UserError(
                f"{type(self).__name__} goes by names: build the optimizer from model.named_parameters(), or "
                "from groups of (name, parameter) pairs, instead of model.parameters()"
            )
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if takes_step(p):
                yield canonical_name(name), p

    def stepping(self, group: dict[str, Any]) -> Iterator[Tensor]:
        """The group's parameters that take this step: those with a gradient."""
        return (p for p in group["params"] if takes_step(p))

    # -- hooks

    @torch.no_grad()
    def _pre_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise UserError(
                f"{type(self).__name__} acts before the step, when a closure has not made the gradients yet; "
                "call backward() yourself and step() without a closure"
            )
        self._fresh = {}  # what a step has left that did not come to its end
        self.before_step()

    @torch.no_grad()
    def _post_step(self, *_: Any) -> None:
        for p, fresh in self._fresh.items():
            self.optimizer.state[p].update(fresh)
        self._fresh = {}
        self.after_step()

    def _pre_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loading = state_dict

    def _post_load(self, _: Optimizer) -> None:
        """Undo the cast of fp32 averages, and of masks, to the parameter's dtype that loading makes."""
        restore_dtypes(self.optimizer, self._loading, self.keys)
        self._fresh = {}
        del self._loading

    keys: tuple[str, ...] = ()
    """Under which the regulariser keeps what it keeps."""


def takes_step(p: Tensor) -> bool:
    """Whether a parameter takes this step."""
    return p.requires_grad and p.grad is not None


def attached(optimizer: Optimizer, kind: type[Kind]) -> list[Kind]:
    """The regularisers of a kind that are attached to an optimizer, also inside accelerate's wrapper."""
    hooks: list[Callable[..., Any]] = list(unwrapped(optimizer)._optimizer_step_post_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, kind)]


def _attachable(optimizer: Optimizer, kind: type[Regulariser]) -> Optimizer:
    name = kind.__name__
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"{name} is attached to a torch.optim.Optimizer, got {type(optimizer).__name__}")
    inner: Optimizer = unwrapped(optimizer)
    hooks = inner._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), MergingShell) for hook in hooks):
        raise UserError(
            f"this {type(inner).__name__} is wrapped in OnlineMerging, which merges after the step; attach "
            f"{name} to the OnlineMerging"
        )
    if attached(inner, kind):
        raise UserError(f"this {type(inner).__name__} has {name} already, and two would keep one state")
    return inner
