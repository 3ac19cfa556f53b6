"""How much of what is added to a parameter arrives there after rounding."""

from __future__ import annotations

import warnings
from dataclasses import dataclass


class PrecisionWarning(UserWarning):
    """Rounding swallows most of what the optimizer adds."""


@dataclass(frozen=True)
class Arrival:
    """Shares of the L1 mass that changed the stored parameters, in [0, 1]; NaN where nothing was to be added.

    Args:
        step: the optimizer's step at which it was measured, from 1.
        delta: share of α·F(τ) that arrived.
        update: share of (1 − α)·F(Δ) that arrived.
    """

    step: int
    delta: float
    update: float


def warn_if_lost(arrival: Arrival) -> bool:
    """Warn where less than half arrives. Returns whether it warned."""
    what = [
        f"{share:.0%} of {name}"
        for share, name in ((arrival.delta, "the merged delta α·F(τ)"), (arrival.update, "the update Δ"))
        if share < 0.5
    ]
    if what:
        warnings.warn(
            f"at step {arrival.step} only {' and '.join(what)} arrives in the parameters: the rest is lost "
            "to rounding; pass rounding='residual' or 'stochastic', or a larger merge_weight",
            PrecisionWarning,
            stacklevel=4,
        )
    return bool(what)
