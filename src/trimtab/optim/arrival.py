"""How much of what is added to a parameter arrives there after rounding."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


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


class ArrivalMeter:
    """Sums, over the parameters of one step, what was to arrive and what did.

    For a part b of the bracket a + b, entry by entry: arrived = clip(sign(b)·(fl(θ + (a + b)) − fl(θ + a)),
    0, |b|), with fl the rounding to what is stored. The share is Σ arrived / Σ |b|. Clipping keeps an entry
    that rounds up to a whole unit in the last place from making up for another one that is lost.
    """

    def __init__(self) -> None:
        self._arrived = [0.0, 0.0]
        self._wanted = [0.0, 0.0]

    def add(self, before: Tensor, parts: list[Tensor], stored: torch.dtype) -> None:
        """Count one parameter: ``before`` is θ before the bracket, ``parts`` are those of Δ and of τ."""
        after = (before + (parts[0] + parts[1])).to(stored).to(torch.float64)
        for i, (part, other) in enumerate(((parts[0], parts[1]), (parts[1], parts[0]))):
            without = (before + other).to(stored).to(torch.float64)
            wanted = part.to(torch.float64)
            arrived = torch.minimum(((after - without) * wanted.sign()).clamp_(min=0), wanted.abs())
            self._arrived[i] += float(arrived.sum())
            self._wanted[i] += float(wanted.abs().sum())

    @property
    def counted(self) -> bool:
        """Whether any parameter was merged."""
        return any(self._wanted)

    def result(self, step: int) -> Arrival:
        """The shares so far."""
        update, delta = (
            arrived / wanted if wanted else float("nan")
            for arrived, wanted in zip(self._arrived, self._wanted, strict=True)
        )
        return Arrival(step, delta=delta, update=update)


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
