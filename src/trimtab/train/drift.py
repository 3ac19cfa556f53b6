"""How far α·F(τ) adds up over a training: it is no restoring force, and every merge adds some more."""

from __future__ import annotations

from trimtab.ops import PRESETS
from trimtab.recipe import Recipe

HARM_BEGAN = 0.2
"""Drift, in units of τ, at which abilities began to suffer in the first experiments on the tiny model."""


class Drift:
    """The expected sum of α·F(τ) over a training, in units of τ, on the entries that F keeps.

    After T merges it is s·Σ α, with s = p where τ's mask is redrawn at each merge and nothing rescaled, 1/p
    where it is drawn once and rescaled, and 1 otherwise (redrawn and rescaled, drawn once, or ``top``). Under
    a sign consensus, which drops τ where Δ outweighs it, this is the most it can be. Parameter groups with
    their own α, p or K are not counted.

    Args:
        recipe: a checked recipe with an optimizer that merges.

    Examples:
        >>> from trimtab.recipe import make_recipe
        >>> values = {"method": "dpo", "reference": "org/sft", "base": "org/base", "output": "runs/a"}
        >>> optimizer = {"name": "ondare", "merge_weight": 1e-3, "reserve_rate": 0.5, "merge_every": 2}
        >>> recipe = make_recipe({**values, "data": {"train": "org/pairs"}, "optimizer": optimizer})
        >>> round(Drift(recipe).after(100, of=100), 12)
        0.025
    """

    def __init__(self, recipe: Recipe) -> None:
        self.optimizer, self.schedules = recipe.optimizer, recipe.schedule
        self.gap = self.optimizer.merge_every or 1
        self.redraw, self.rescales, self.top = _operator(recipe)
        self._sums: dict[int, list[float]] = {}

    def after(self, step: int, *, of: int) -> float:
        """Return the drift after ``step`` of ``of`` steps; what is pending at the end is merged then."""
        sums = self._sums.setdefault(of, [0.0])  # by the number of merges
        for merge in range(len(sums), step // self.gap + 1):
            sums.append(sums[-1] + self._once(self.gap * merge - 1, of))
        pending = step >= of and step % self.gap
        return sums[step // self.gap] + (self._once(step - 1, of) if pending else 0.0)

    def _once(self, step: int, of: int) -> float:
        """What the merge adds that follows ``step`` finished steps."""
        weight = (self.optimizer.merge_weight or 0.0) * self._factor("merge_weight", step, of)
        rate = (self.optimizer.reserve_rate or 1.0) * self._factor("reserve_rate", step, of)
        learning = self.schedules.lr.factor(step, of)
        if learning == 0 or self.optimizer.merge_weight_follows_lr:
            weight *= learning  # a step with lr = 0 moves nothing
        share = 1.0 if self.top or self.redraw == self.rescales else rate if self.redraw else 1 / rate
        return weight * share

    def _factor(self, key: str, step: int, of: int) -> float:
        schedule = getattr(self.schedules, key)
        return 1.0 if schedule is None else float(schedule.factor(step, of))


def _operator(recipe: Recipe) -> tuple[bool, bool, bool]:
    """Whether τ's mask is redrawn, whether what is kept is rescaled, and whether F is top (or keeps all)."""
    section = recipe.optimizer
    rescale, redraw, sparsify = section.rescale, section.redraw, section.sparsify
    if section.name in ("ondare", "onties"):
        row = PRESETS[section.name, section.fidelity or "paper"]  # type: ignore[index]
        rescale = row.operator.rescale if rescale is None else rescale
        redraw = row.redraw if redraw is None else redraw
        sparsify = row.operator.sparsify
    return redraw is not False, rescale not in (None, "none"), sparsify != "bernoulli"
