"""From a recipe's ``optimizer`` and ``schedule`` sections to an optimizer over a model's named parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.delta import ReferenceDelta
from trimtab.errors import UserError
from trimtab.ops.moments import torchao_state
from trimtab.optim import GaLoreAdamW, OnDARE, OnlineMerging, OnTIES, parameter_groups, schedule
from trimtab.optim.groups import Groups
from trimtab.recipe import Optimizer as OptimizerSection
from trimtab.recipe import Recipe
from trimtab.recipe.sections import MERGE_SETTINGS
from trimtab.train.drift import Drift
from trimtab.train.regularisers import Regularisers


@dataclass(frozen=True)
class OptimizerPlan:
    """What :class:`~trimtab.train.mixin.OnlineMergingMixin` builds when the trainer asks for its optimizer.

    Args:
        make: builds the optimizer from parameter groups whose ``params`` are (name, parameter) pairs; any
            ``torch.optim.Optimizer`` will do.
        weight_decay: decoupled decay of the parameters that transformers would decay (all but biases and
            norms).
        groups: settings for parameters that a regular expression finds in their canonical name (``pattern``
            and what differs, see :func:`trimtab.parameter_groups`); the first group that fits counts. A
            ``weight_decay`` written here holds for norms and biases too.
        learning_rate: factor on the learning rate after ``step`` of ``total`` steps; None leaves it to the
            trainer.
        factors: the same for other keys of the parameter groups, such as ``merge_weight``.
        drift: what the merges are expected to have added up to, for the log; None leaves it out.
        regularisers: what is attached to the optimizer; None for nothing.
    """

    make: Callable[[Groups], torch.optim.Optimizer]
    weight_decay: float = 0.0
    groups: Sequence[Mapping[str, Any]] = ()
    learning_rate: Callable[[int, int], float] | None = None
    factors: Mapping[str, Callable[[int, int], float]] = field(default_factory=dict)
    drift: Drift | None = None
    regularisers: Regularisers | None = None

    def build(self, model: torch.nn.Module, decayed: set[str], trainer: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over the trainable parameters of ``model``, with its regularisers.

        Args:
            model: its ``named_parameters()`` that require a gradient are trained.
            decayed: names of the parameters that weight decay is for.
            trainer: the trainer that asks, for regularisers that take gradients of other rows' losses.
        """
        groups = parameter_groups(
            model.named_parameters(),
            self.groups,
            weight_decay=self.weight_decay,
            decayed=decayed,
            where="optimizer.groups",  # as a recipe calls them
        )
        optimizer = self.make(groups)
        if self.regularisers is not None:
            self.regularisers.attach(optimizer, trainer)
        return optimizer

    def schedule(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        """Schedule what the plan schedules besides the learning rate, over ``total`` steps.

        Each group's value is the factor times what it starts with.
        """
        for key, factor in self.factors.items():
            for index, group in enumerate(optimizer.param_groups):
                schedule(optimizer, key, _scaled(group[key], factor, total), group=index)

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, delta: ReferenceDelta | None, regularisers: Regularisers | None = None
    ) -> OptimizerPlan:
        """Read the plan from a recipe's ``optimizer`` and ``schedule`` sections.

        Args:
            recipe: a checked recipe.
            delta: the reference delta; needed by the optimizers that merge.
            regularisers: the recipe's, with their rows.
        """
        section, schedules = recipe.optimizer, recipe.schedule
        factors = {"merge_weight": schedules.merge_weight, "reserve_rate": schedules.reserve_rate}
        return cls(
            make=_maker(section, delta, recipe.seed),
            weight_decay=section.weight_decay,
            groups=[group.model_dump(exclude_none=True) for group in section.groups],
            # Without an end of its own it is one of transformers' schedules, which the trainer makes itself.
            learning_rate=schedules.lr.factor if schedules.lr.end else None,
            factors={key: value.factor for key, value in factors.items() if value is not None},
            drift=Drift(recipe) if section.merges else None,
            regularisers=regularisers,
        )


def _scaled(start: float, factor: Callable[[int, int], float], total: int) -> Callable[[int], float]:
    return lambda step: start * factor(step, total)


def _maker(
    section: OptimizerSection, delta: ReferenceDelta | None, seed: int
) -> Callable[[Groups], torch.optim.Optimizer]:
    """Return what builds the section's optimizer; settings not given keep the optimizer's defaults."""
    plain = _plain_maker(section)
    if not section.merges:
        return plain
    if delta is None:
        raise UserError(f"optimizer {section.name} merges a reference delta; give base or delta")
    given = section.model_dump(exclude_none=True, include=set(MERGE_SETTINGS))
    if section.name == "online_merging":
        # torchao's class is none that OnlineMerging knows; all four decay as AdamW does.
        return lambda groups: OnlineMerging(plain(groups), delta, decoupled_decay=True, seed=seed, **given)
    kind = {"ondare": OnDARE, "onties": OnTIES}[section.name]
    return lambda groups: kind(groups, delta, **_adam(section), **given, seed=seed)


def _plain_maker(section: OptimizerSection) -> Callable[[Groups], torch.optim.Optimizer]:
    """Return what builds the optimizer that takes the step, alone or inside online merging.

    Raises:
        UserError: torchao is wanted and is not installed.
    """
    if section.plain == "adafactor":
        return lambda groups: torch.optim.Adafactor(groups, lr=section.lr)
    adam = _adam(section)
    if section.plain == "adamw_8bit":
        kind = _adamw_8bit()
        return lambda groups: kind(groups, **adam)
    if section.plain == "galore":
        assert section.galore is not None
        galore = section.galore.model_dump()
        return lambda groups: GaLoreAdamW(groups, **adam, **galore)
    return lambda groups: torch.optim.AdamW(groups, **adam)


def _adam(section: OptimizerSection) -> dict[str, Any]:
    """Adam's settings; an epsilon that is not given is the optimizer's own default."""
    eps = {} if section.eps is None else {"eps": section.eps}
    return {"lr": section.lr, "betas": section.betas, **eps}


def _adamw_8bit() -> Any:
    try:
        torchao_state()
    except ValueError as error:
        raise UserError(
            "optimizer adamw_8bit keeps Adam's moments in torchao's 8-bit blocks, and torchao cannot be "
            "imported here; install it with: pip install 'trimtab[lowbit]'"
        ) from error
    return importlib.import_module("torchao.optim").AdamW8bit


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer itself where accelerate has wrapped it."""
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
