"""The sections of a recipe's regularisers, all under ``optimizer``: what may be written and its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trimtab.recipe.section import Section, Sources
from trimtab.recipe.values import Positive, PositiveCount, PositiveShare, Share

FISHER_ROWS = 256
"""Rows that Fisher information is estimated on when their number is not given."""

Coefficient = Annotated[Positive, Field(le=1)]


class MovingAverage(Section):
    """Evaluate and keep a moving average of the weights: e <- (1 - c) e + c theta after each step."""

    coefficient: Coefficient = 1e-3
    """c, the share of the new weights (other libraries give 1 - c and call it the decay)."""
    every: PositiveCount = 1
    """Steps between averagings."""


class ChildTuning(Section):
    """Train with a part of the gradient (arXiv 2109.05687): random, or that of the weights that matter."""

    variant: Literal["F", "D"] = "F"
    """F: a new random mask at every step, divided by p; D: a fixed mask by Fisher information."""
    reserve_rate: PositiveShare = 0.3
    """p: share of the gradient's entries that are kept."""
    rows: PositiveCount | None = None
    """For D: rows that the Fisher information is estimated on; 256 when not given."""
    data: Sources | None = None
    """For D: instructions to estimate it on; null: the training rows, with the method's own loss."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Spell out the number of rows, which only D has."""
        if isinstance(values, dict) and values.get("variant") == "D" and values.get("rows") is None:
            return {**values, "rows": FISHER_ROWS}
        return values


class Pull(Section):
    """Pull the weights to where they started: eta (theta_r - theta) at every step, decoupled."""

    strength: Share = 1e-3
    """eta; it does not follow the learning rate's schedule."""


class ElasticReset(Section):
    """Every N steps the weights become their moving average, and that the start (arXiv 2312.07551)."""

    coefficient: Coefficient = 5e-3
    """c, the share of the new weights in the average."""
    every: PositiveCount = 260
    """N: steps between resets."""


class Projection(Section):
    """Remove from the gradient its part along capability gradients (OGPSA, arXiv 2602.07892)."""

    data: Sources
    """Instructions whose loss is to be left alone; each source gives one direction."""
    rows: PositiveCount = 200
    """Rows taken of each source, from its beginning."""
    every: PositiveCount = 5
    """M: steps between refreshes of the directions."""
