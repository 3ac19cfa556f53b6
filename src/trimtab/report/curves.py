"""Curves of reward against tax, and what is read off them: reward at equal tax, tax at equal reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean


@dataclass(frozen=True)
class Point:
    """One measured model.

    Attributes:
        reward: What training is meant to raise, 0 to 1.
        tax: Points of capability (0 to 100) lost against the reference; negative where capability was gained.
        label: What the model is, for instance ``step 40``.
    """

    reward: float
    tax: float
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """The models one run gives, in order, from the reference (tax 0) on.

    Attributes:
        method: Name of the method; curves of different seeds share it.
        seed: Seed of the reference model. Only curves of one seed are compared with each other.
        points: At least the reference; not necessarily monotone in anything.
    """

    method: str
    seed: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with the lowest and highest of them."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Summarise values; None when there are none."""
        values = list(values)
        return cls(fmean(values), min(values), max(values), len(values)) if values else None


def reward_at_tax(curve: Curve, tax: float) -> float | None:
    """Return the reward where the curve first pays ``tax``, interpolated linearly; None where it never does.

    Example:
        >>> reward_at_tax(Curve("dpo", 0, (Point(0.3, 0.0), Point(0.5, 10.0), Point(0.4, 20.0))), 5.0)
        0.4
    """
    return _crossing([(p.tax, p.reward) for p in curve.points], tax)


def tax_at_reward(curve: Curve, reward: float) -> float | None:
    """Return the tax where the curve first reaches ``reward``, interpolated; None where it never does."""
    return _crossing([(p.reward, p.tax) for p in curve.points], reward)


def _crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Return y where x first rises to ``level`` along a polyline of (x, y)."""
    if points and points[0][0] == level:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < level <= x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def by_method(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Group curves by method, in order of first appearance."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.method, []).append(curve)
    return groups


def rewards_at_tax(curves: Iterable[Curve], tax: float) -> dict[int, float]:
    """Return seed -> reward at ``tax`` for the curves that reach it."""
    found = {curve.seed: reward_at_tax(curve, tax) for curve in curves}
    return {seed: value for seed, value in found.items() if value is not None}


def taxes_at_reward(curves: Iterable[Curve], reward: float) -> dict[int, float]:
    """Return seed -> tax at ``reward`` for the curves that reach it."""
    found = {curve.seed: tax_at_reward(curve, reward) for curve in curves}
    return {seed: value for seed, value in found.items() if value is not None}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Return seed -> ours − theirs, for the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def mean_curve(curves: Sequence[Curve]) -> list[Point]:
    """Return the mean over seeds of the points that all curves have, matched by place."""
    shared = min(len(curve.points) for curve in curves)
    return [
        Point(
            fmean(curve.points[i].reward for curve in curves),
            fmean(curve.points[i].tax for curve in curves),
            curves[0].points[i].label,
        )
        for i in range(shared)
    ]
