"""Confidence intervals for shares and for differences between two models on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with the lower and upper end of its confidence interval."""

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval.

        Examples:
            >>> Interval(0.2, 0.1, 0.3).excludes(0)
            True
        """
        return not self.low <= value <= self.high


def wilson(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share.

    Centre (s + z²/2) / (n + z²), half-width z/(n + z²) · √(s(n − s)/n + z²/4); Wilson, J. Am. Stat. Assoc. 22
    (1927). Unlike the normal interval it stays within [0, 1] and keeps its width at 0 and at n successes.

    Args:
        successes: number of successes, 0 … trials; a share of trials need not make a whole number.
        trials: number of trials, at least 1.
        confidence: in (0, 1).

    Returns:
        The observed share with its interval.

    Raises:
        ValueError: when the counts or the confidence are out of range.

    Examples:
        >>> found = wilson(8, 10)
        >>> f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
        '0.80 [0.49, 0.94]'
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"wilson needs 0 <= successes <= trials and trials >= 1, got {successes} of {trials}"
        )
    z = _z(confidence)
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return Interval(successes / trials, max(0.0, centre - half), min(1.0, centre + half))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean difference after − before, resampling prompts, both sides together.

    The same prompts are easy or hard for both models; pairing removes that common part, which is most of the
    noise. With ``weights`` (such as token counts) the mean is Σ wᵢ(afterᵢ − beforeᵢ) / Σ wᵢ and the weights
    are resampled along.

    Args:
        before: one number per prompt, shape (n,), n ≥ 1.
        after: the same prompts in the same order, shape (n,).
        weights: positive weights, shape (n,); equal when None.
        draws: bootstrap samples.
        confidence: in (0, 1).
        seed: of the resampling, so that a report can be rebuilt to the digit.

    Returns:
        The mean difference with its interval.

    Raises:
        ValueError: when the sequences are empty or differ in length, or a weight is not positive.

    Examples:
        >>> paired_bootstrap([0, 0, 1, 0], [1, 1, 1, 1]).estimate
        0.75
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    weight = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=np.float64)
    if (
        difference.ndim != 1
        or difference.size == 0
        or len(before) != len(after)
        or weight.shape != difference.shape
    ):
        raise ValueError(
            f"paired_bootstrap needs equally long, non-empty sequences, got {len(before)} and {len(after)}"
            + ("" if weights is None else f", {len(weights)} weights")
        )
    if not (weight > 0).all():
        raise ValueError("paired_bootstrap needs positive weights")
    picks = np.random.default_rng(seed).integers(difference.size, size=(draws, difference.size))
    means = (difference * weight)[picks].sum(axis=1) / weight[picks].sum(axis=1)
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float((difference * weight).sum() / weight.sum()), float(low), float(high))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + _checked(confidence)) / 2)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return confidence
