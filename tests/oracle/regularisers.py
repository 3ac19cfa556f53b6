"""What regularisers compute, in float64 and entry by entry, written from the papers' equations.

Moving averages as arXiv 2405.17931 and 2312.07551 have them, ChildTuning from 2109.05687, the projection from
2602.07892. Nothing here imports the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = list[float]


def moved(x: Sequence[float], target: Sequence[float], share: float) -> Vector:
    """(1 − s)·x + s·target."""
    return [(1 - share) * a + share * b for a, b in zip(x, target, strict=True)]


def masked(gradient: Sequence[float], kept: Sequence[bool], divisor: float = 1.0) -> Vector:
    """g·M / p."""
    return [g / divisor if keep else 0.0 for g, keep in zip(gradient, kept, strict=True)]


def most_informed(gradients_of_rows: Sequence[Sequence[Vector]], share: float) -> list[list[bool]]:
    """Which entries of several tensors have the most Fisher information, over all tensors together.

    Args:
        gradients_of_rows: for each row its gradient of each tensor.
        share: of all entries; ties with the last one are kept, zeros never.
    """
    rows = len(gradients_of_rows)
    information: list[Vector] = []
    for tensor in range(len(gradients_of_rows[0])):
        sums = [0.0] * len(gradients_of_rows[0][tensor])
        for row in gradients_of_rows:
            for place, value in enumerate(row[tensor]):
                sums[place] += value * value
        information.append([value / rows for value in sums])
    ranked = sorted((value for values in information for value in values), reverse=True)
    least = ranked[math.ceil(share * len(ranked) - 1e-9) - 1]
    return [[value >= least and value > 0 for value in values] for values in information]


def rejected(gradient: Vector, directions: Sequence[Vector]) -> Vector:
    """The gradient without its part in the span of the directions, by Gram and Schmidt, twice over."""
    basis: list[Vector] = []
    for direction in directions:
        rest = _without(_without(direction, basis), basis)
        length = math.sqrt(_dot(rest, rest))
        if length > 1e-9 * max(1e-300, math.sqrt(_dot(direction, direction))):
            basis.append([value / length for value in rest])
    return _without(_without(gradient, basis), basis)


def _without(vector: Vector, basis: Sequence[Vector]) -> Vector:
    for axis in basis:
        share = _dot(vector, axis)
        vector = [a - share * b for a, b in zip(vector, axis, strict=True)]
    return vector


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
