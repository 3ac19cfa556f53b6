"""How far α·F(τ) adds up over a training: it is no restoring force, and every merge adds some more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from trimtab.ops import PRESETS, Operator
from trimtab.optim.measuring import one_merge
from trimtab.recipe import Recipe


class Drift:
    """The drift ‖Σ α·F(τ)‖ / ‖τ‖ that a recipe leads to, before anything is trained.

    As :mod:`trimtab.optim.diagnostics` works it out: √((Σ α·q)² + Σ α²·(r − q²)), with q = r = p where τ's
    mask is redrawn at each merge and nothing rescaled, q = 1 and r = 1/p where it is rescaled, and for a mask
    drawn once q = √p, or √(1/p) rescaled. With ``top`` (q = 1 here, though what it keeps holds less than all
    of τ) or a vote it is the most that it can be. Parameter groups with their own α, p or K are not counted.

    Args:
        recipe: a checked recipe with an optimizer that merges.

    Examples:
        >>> from trimtab.recipe import make_recipe
        >>> values = {"method": "dpo", "reference": "org/sft", "base": "org/base", "output": "runs/a"}
        >>> optimizer = {"name": "ondare", "merge_weight": 1e-3, "reserve_rate": 0.5, "merge_every": 2}
        >>> recipe = make_recipe({**values, "data": {"train": "org/pairs"}, "optimizer": optimizer})
        >>> round(Drift(recipe).after(100, of=100), 4)
        0.0252
    """

    def __init__(self, recipe: Recipe) -> None:
        self.optimizer, self.schedules = recipe.optimizer, recipe.schedule
        self.gap = self.optimizer.merge_every or 1
        self.operator, self.redraw = _operator(recipe)
        self._sums: dict[int, list[tuple[float, float]]] = {}

    def after(self, step: int, of: int) -> float:
        """Return the drift after ``step`` of ``of`` steps; what is pending at the end is merged then."""
        sums = self._sums.setdefault(of, [(0.0, 0.0)])  # by the number of merges
        for merge in range(len(sums), step // self.gap + 1):
            sums.append(self._added(sums[-1], self.gap * merge - 1, of))
        total = sums[step // self.gap]
        if step >= of and step % self.gap:
            total = self._added(total, step - 1, of)
        return math.sqrt(total[0] ** 2 + total[1])

    def _added(self, sums: tuple[float, float], step: int, of: int) -> tuple[float, float]:
        """(Σ α·q, Σ α²·(r − q²)) with the merge that follows ``step`` finished steps."""
        weight = (self.optimizer.merge_weight or 0.0) * self._factor("merge_weight", step, of)
        rate = (self.optimizer.reserve_rate or 1.0) * self._factor("reserve_rate", step, of)
        learning = self.schedules.lr.factor(step, of)
        if learning == 0 or self.optimizer.merge_weight_follows_lr:
            weight *= learning  # a step with lr = 0 moves nothing
        mean, square = one_merge(self.operator, self.redraw, rate)
        return sums[0] + weight * mean, sums[1] + weight**2 * (square - mean**2)

    def _factor(self, key: str, step: int, of: int) -> float:
        schedule = getattr(self.schedules, key)
        return 1.0 if schedule is None else float(schedule.factor(step, of))


def _operator(recipe: Recipe) -> tuple[Operator, bool]:
    """What the recipe's optimizer merges with, and whether τ's mask is redrawn."""
    section = recipe.optimizer
    given: dict[str, Any] = {"rescale": section.rescale} if section.rescale is not None else {}
    if section.name in ("ondare", "onties"):
        row = PRESETS[section.name, section.fidelity or "paper"]  # type: ignore[index]
        return replace(row.operator, **given), row.redraw if section.redraw is None else section.redraw
    return Operator(section.sparsify or "bernoulli", **given), section.redraw is not False
