"""OnlineMerging: the merge around any torch optimizer, through its step hooks."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import Consensus, Operator, Preset, Rescale, Sparsifier, canonical_name
from trimtab.optim.merging import DECAY, SINCE, Merging
from trimtab.optim.precision import (
    Rounding,
    read_master,
    resolve_rounding,
    rounding_key,
    update_dtype,
    write_master,
)
from trimtab.optim.shell import MergingShell, moves

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta

COUNT = "merge_count"
_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)


class OnlineMerging(MergingShell):
    """Blend every K-th step of any torch optimizer with the reference delta (arXiv 2405.17931).

    Δ is what the wrapped optimizer added, θ_after − (1 − lr·λ)·θ_before, where λ is its decoupled weight
    decay (0 if it has none or a coupled one, which stays in Δ as L2); then, as in :class:`~trimtab.OnDARE`,

        θ ← (1 − lr·λ)·θ_before + ((1−α)·F(Δ)) ⊕ (α·F(τ)).

    The merge hangs on the wrapped optimizer's step hooks, so calling either object's ``step`` merges. (Call
    this one's where a step may raise: it gives parameters below fp32 back even then.) Groups,
    state and ``state_dict`` are the wrapped optimizer's own, with a few entries more. For parameters below
    fp32 the wrapped optimizer is shown fp32 masters and gradients during its step; since a closure would then
    run the model on them, it is evaluated before.

    Args:
        optimizer: any torch optimizer built from named parameters.
        delta: the reference delta τ = θ_sft − θ_base.
        sparsify: F: ``bernoulli`` (as OnDARE), ``top`` (as OnTIES) or ``none``.
        consensus: ⊕: ``linear`` (as OnDARE), ``sign`` (as OnTIES) or ``sign_unweighted``.
        rescale: ``none``, ``expected`` or ``l1``.
        reserve_rate: p in (0, 1]; also per param group.
        merge_weight: α in [0, 1]; also per param group.
        merge_every: K ≥ 1 steps between merges; also per param group.
        redraw: draw τ's mask anew at each merge, or once.
        seed: seed of all masks.
        rounding: see :class:`~trimtab.OnDARE`.
        merge_weight_follows_lr: scale α by lr_t / lr_0.
        policy_differs: allow a start from something other than the delta's reference.
        without_delta: pattern, or patterns, of the parameters that take the plain step.
        decoupled_decay: whether the wrapped optimizer's weight decay multiplies θ by 1 − lr·λ before its
            step; None reads it off the
            optimizer (AdamW, Adafactor, Muon, and a group's ``decoupled_weight_decay``).
        measure_every: steps between measurements of the arriving share; 0 turns it off.
        force_merge: run the arithmetic even where it is the identity; for tests.

    Raises:
        UserError: an argument out of range, parameters without names or without delta.

    Examples:
        >>> import torch, trimtab
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = trimtab.ReferenceDelta.between(reference=reference, base=base)
        >>> sgd = torch.optim.SGD(reference.named_parameters(), lr=0.1, momentum=0.9)
        >>> opt = OnlineMerging(sgd, delta, sparsify="top", consensus="sign", reserve_rate=0.5)
        >>> reference(torch.ones(4)).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        delta: ReferenceDelta,
        *,
        sparsify: Sparsifier = "bernoulli",
        consensus: Consensus = "linear",
        rescale: Rescale = "none",
        reserve_rate: float = 0.01,
        merge_weight: float = 1e-7,
        merge_every: int = 1,
        redraw: bool = True,
        seed: int = 0,
        rounding: Rounding = "auto",
        merge_weight_follows_lr: bool = False,
        policy_differs: bool = False,
        without_delta: str | Sequence[str] = (),
        decoupled_decay: bool | None = None,
        measure_every: int = 100,
        force_merge: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"OnlineMerging wraps a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, MergingShell):
            raise UserError(f"{type(optimizer).__name__} merges already; wrap a plain optimizer")
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), OnlineMerging) for hook in hooks):
            raise UserError(
                f"this {type(optimizer).__name__} is wrapped in OnlineMerging already, and each step would "
                "merge twice; build a new optimizer to wrap"
            )
        self.optimizer = optimizer
        merging = Merging(
            delta,
            Preset(Operator(sparsify, rescale, consensus), redraw=redraw, source="OnlineMerging"),
            seed=seed,
            rounding=rounding,
            policy_differs=policy_differs,
            without_delta=without_delta,
            force_merge=force_merge,
        )
        self._start(merging, measure_every)
        self.decoupled_decay = decoupled_decay
        self._group_defaults = {
            "reserve_rate": reserve_rate,
            "merge_weight": merge_weight,
            "merge_every": merge_every,
            "merge_weight_follows_lr": merge_weight_follows_lr,
        }
        self._prepare_groups(self._group_defaults)
        self._attach()

    # -- being an Optimizer around another

    def _attach(self) -> None:
        self._before: dict[Tensor, Tensor] = {}
        self._swapped: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._names_checked = False
        self._patch_step_function()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._pre_step),
            self.optimizer.register_step_post_hook(self._post_step),
            self.optimizer.register_load_state_dict_pre_hook(self._pre_load),
            self.optimizer.register_load_state_dict_post_hook(self._post_load),
        ]

    def __getstate__(self) -> dict[str, Any]:
        dropped = (
            "_before",
            "_swapped",
            "_handles",
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
        )
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def __repr__(self) -> str:
        operator = self.merging.preset.operator
        return f"OnlineMerging({operator.sparsify}, {operator.consensus}) around {self.optimizer!r}"

    def __getattr__(self, name: str) -> Any:
        """Hooks on state dicts are the wrapped optimizer's: it is the one that saves and loads."""
        if name.startswith("_optimizer_") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Read through at every use: load_state_dict replaces the wrapped optimizer's list and state.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its parameters must be (name, parameter) pairs."""
        self.optimizer.add_param_group(param_group)
        self._prepare_groups(self._group_defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; the groups carry what the merge is, τ itself is not saved."""
        self._write_identities()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the wrapped optimizer, exactly (fp32 state of bf16 parameters stays fp32).

        Raises:
            IncompatibleState: the state belongs to another delta, method, K or seed.
        """
        self.optimizer.load_state_dict(state_dict)

    def _pre_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._check_identities(state_dict)
        self._loading = state_dict

    def _post_load(self, _: Optimizer) -> None:
        self._restore_dtypes(self._loading)
        del self._loading

    # -- the step

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of the wrapped optimizer and merge."""
        required = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        try:
            if closure is None:
                return self.optimizer.step()
            # LBFGS calls it repeatedly
            if required is not None and required.default is inspect.Parameter.empty:
                return self.optimizer.step(closure)
            with torch.enable_grad():
                loss = closure()
            self.optimizer.step()
            return loss
        finally:
            self._swap_back()

    @torch.no_grad()
    def merge_now(self) -> int:
        """Merge what is pending in intervals of K > 1 steps. Returns the number of parameters merged."""
        merged = 0
        for name, p, group in self._parameters():
            state = self.state[p]
            if state.get(SINCE, 0) > 0:
                rounding = resolve_rounding(self.merging.rounding, p.dtype)
                master = read_master(p, state, rounding)
                self._merge(name, p, group, master, rounding)
                write_master(p, state, master, rounding, self._rounding_key(name, state))
                merged += 1
        return merged

    @torch.no_grad()
    def _pre_step(self, *_: Any) -> None:
        self._swap_back()
        self._before_step()
        self._before = {}
        for name, p, group in self._parameters():
            if not p.requires_grad:
                self._hide_gradient(p)
                continue
            rounding = resolve_rounding(self.merging.rounding, p.dtype)
            if rounding != "nearest" or update_dtype(p) != p.dtype:
                self._show_master(p, rounding)
            if self._keeps_before(name, p, group):
                self._before[p] = p.detach().clone()

    @torch.no_grad()
    def _post_step(self, *_: Any) -> None:
        # Around a fused optimizer a GradScaler calls even the step that is to be skipped, and says so here.
        found_inf = getattr(self.optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        for name, p, group in [] if skipped else self._parameters():
            if p.grad is not None:
                self._finish(name, p, group)
        self._swap_back()
        self._before = {}
        if not skipped:
            self._after_step()

    def _finish(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        """Merge into one parameter that the wrapped optimizer has just moved; then store it."""
        state, master = self.state[p], p.detach()
        state[COUNT] = state.get(COUNT, 0) + 1
        stored = self._swapped[p][0] if p in self._swapped else master
        rounding = resolve_rounding(self.merging.rounding, stored.dtype)
        if self.merging.merges(name):
            self._advance(name, p, group, master, rounding, stored)
        if p in self._swapped:
            weight, grad = self._swapped.pop(p)
            p.grad = None
            p.data = weight
            p.grad = grad
            write_master(p, state, master, rounding, self._rounding_key(name, state))

    def _advance(
        self, name: str, p: Tensor, group: dict[str, Any], master: Tensor, rounding: Rounding, stored: Tensor
    ) -> None:
        state, gap = self.state[p], group["merge_every"] > 1
        if gap:
            if SINCE not in state:
                self.merging.open_interval(state, self._before[p])
            state[SINCE] += int(moves(group))
            state[DECAY] *= self._decay(group)
            if state[SINCE] >= group["merge_every"] and moves(group):
                self._merge(name, p, group, master, rounding, stored.dtype)
        elif moves(group) and not self.merging.skips(name, group):
            base = self._before[p]
            if self._decay(group) != 1.0:
                base.mul_(self._decay(group))
            update = (master - base).to(update_dtype(stored))
            self._merge_into(name, group, state, master, base, update, rounding, stored.dtype)

    def _merge(
        self,
        name: str,
        p: Tensor,
        group: dict[str, Any],
        master: Tensor,
        rounding: Rounding,
        stored: torch.dtype | None = None,
    ) -> None:
        """Close the interval of one parameter: merge what it has gathered, and begin the next."""
        state = self.state[p]
        if not self.merging.skips(name, group):
            base, update = self.merging.accumulated(state, master, None)
            self._merge_into(name, group, state, master, base, update, rounding, stored or p.dtype)
        self.merging.open_interval(state, master)

    def _merge_into(
        self,
        name: str,
        group: dict[str, Any],
        state: dict[str, Any],
        master: Tensor,
        base: Tensor,
        update: Tensor,
        rounding: Rounding,
        stored: torch.dtype,
    ) -> None:
        kept = stored if rounding == "nearest" else master.dtype
        self.merging.merge_into(master, base, update, name=name, group=group, step=state[COUNT], stored=kept)

    # -- masters of parameters below fp32, and of those with a rounding help

    def _show_master(self, p: Tensor, rounding: Rounding) -> None:
        """Let the wrapped optimizer see the wide master and gradient instead of the stored parameter."""
        master = read_master(p, self.state.get(p, {}), rounding)
        weight, grad = p.data, p.grad
        self._swapped[p] = (weight, grad)
        p.grad = None
        p.data = master
        p.grad = None if grad is None else grad.to(master.dtype)

    def _hide_gradient(self, p: Tensor) -> None:
        """Keep the gradient that a frozen parameter has left over from the wrapped optimizer."""
        if p.grad is not None:
            self._swapped[p] = (p.data, p.grad)
            p.grad = None

    def _swap_back(self) -> None:
        """Undo :meth:`_hide_gradient`, and :meth:`_show_master` where a step did not come to its end."""
        for p, (weight, grad) in self._swapped.items():
            p.grad = None
            p.data = weight
            p.grad = grad
        self._swapped = {}

    def _keeps_before(self, name: str, p: Tensor, group: dict[str, Any]) -> bool:
        if not self.merging.merges(name):
            return False
        if group["merge_every"] > 1:
            return SINCE not in self.state.get(p, {})
        return not self.merging.skips(name, group)

    def _decay(self, group: dict[str, Any]) -> float:
        decoupled = self.decoupled_decay
        if decoupled is None:
            decoupled = bool(group.get("decoupled_weight_decay", isinstance(self.optimizer, _DECOUPLED)))
        return 1.0 - float(group["lr"]) * float(group.get("weight_decay", 0)) if decoupled else 1.0

    def _rounding_key(self, name: str, state: dict[str, Any]) -> Any:
        return rounding_key(self.merging.seed, state[COUNT], name)

    def _parameters(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        return [
            (canonical_name(name), p, group)
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        ]
