"""Offline merging in float64 NumPy, whole models at a time: from the papers, and from what mergekit does.

A model is a mapping of names to arrays; the order of the names is the order of the file. Nothing here knows
of trimtab. DARE's masks are arguments.

Weight averaging 2203.05482 and 2309.06256, task arithmetic 2212.04089, TIES 2306.01708, DARE 2311.03099,
slerp: Shoemake, SIGGRAPH 1985.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Model = Mapping[str, Array]
Masks = Mapping[str, np.ndarray[Any, np.dtype[np.bool_]]]
Zero = Literal["nothing", "plus"]


# sums


def linear(models: Sequence[Model], weights: Sequence[float], normalize: bool = True) -> dict[str, Array]:
    """The weighted mean of the models (2203.05482), or their weighted sum."""
    result = {}
    for name in models[0]:
        total = sum(w * model[name] for w, model in zip(weights, models, strict=True))
        result[name] = total / sum(weights) if normalize else total
    return result


def hma(base: Model, other: Model, ratio: Callable[[str], float]) -> dict[str, Array]:
    """Heterogeneous model averaging (2309.06256): (1 − r)·base + r·other, r by the tensor's block."""
    return {name: (1 - ratio(name)) * base[name] + ratio(name) * other[name] for name in base}


def block_of(layer: int, layers: int, blocks: int) -> int:
    """Which of as many consecutive blocks a layer is in, those of ⌊layers/blocks⌋ or one more layers."""
    bounds = [math.ceil(layers * block / blocks) for block in range(1, blocks + 1)]
    return next(block for block, bound in enumerate(bounds) if layer < bound)


def deltas(base: Model, models: Sequence[Model]) -> list[dict[str, Array]]:
    """The task vectors θ − θ_b (2212.04089)."""
    return [{name: model[name] - base[name] for name in base} for model in models]


def task_arithmetic(
    base: Model,
    models: Sequence[Model],
    weights: Sequence[float],
    scale: float = 1.0,
    normalize: bool = False,
) -> dict[str, Array]:
    """θ_b + λ Σ wᵢ δᵢ."""
    mixed = linear(deltas(base, models), weights, normalize)
    return {name: base[name] + scale * mixed[name] for name in base}


# trimming


def paper_count(n: int, density: float) -> int:
    """⌈p n⌉ of the decimal that was written, and at least one entry (2306.01708 keeps "the top k %")."""
    return min(n, max(1, math.ceil(Fraction(repr(float(density))) * n))) if density else 0


def mergekit_count(n: int, density: float) -> int:
    """mergekit: ⌊p n⌋ in floating point, at least one entry."""
    return min(n, max(1, int(density * n))) if density else 0


def largest(values: Array, k: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The k entries of largest magnitude, of equals those of lower index."""
    order = np.argsort(-np.abs(values), kind="stable")
    kept = np.zeros(len(values), dtype=bool)
    kept[order[:k]] = True
    return kept


def trimmed_together(delta: Model, density: float) -> dict[str, Array]:
    """2306.01708, Algorithm 1: the task vector is one vector, of which the k largest entries stay."""
    together = np.concatenate([delta[name].reshape(-1) for name in delta] or [np.zeros(0)])
    kept = largest(together, paper_count(together.size, density))
    result, at = {}, 0
    for name, values in delta.items():
        part = kept[at : at + values.size].reshape(values.shape)
        result[name] = np.where(part, values, 0.0)
        at += values.size
    return result


def trimmed_apart(delta: Model, density: float) -> dict[str, Array]:
    """mergekit: each tensor is trimmed on its own."""
    result = {}
    for name, values in delta.items():
        kept = largest(values.reshape(-1), mergekit_count(values.size, density))
        result[name] = np.where(kept.reshape(values.shape), values, 0.0)
    return result


def thresholds(delta: Model, density: float, *, together: bool) -> dict[str, float]:
    """For each tensor the magnitude of the last entry that is kept; −1 where all or none are."""
    groups = [list(delta)] if together else [[name] for name in delta]
    found = {}
    for names in groups:
        sizes = np.sort(np.concatenate([np.abs(delta[name]).reshape(-1) for name in names]))[::-1]
        k = (paper_count if together else mergekit_count)(len(sizes), density)
        found |= dict.fromkeys(names, float(sizes[k - 1]) if 0 < k < len(sizes) else -1.0)
    return found


# dropping


def dropped(delta: Model, masks: Masks) -> dict[str, Array]:
    """DARE drops the entries that its mask does not keep (2311.03099, Eq. 2)."""
    return {name: np.where(masks[name], values, 0.0) for name, values in delta.items()}


def divided_by_rate(sparse: Model, density: float) -> dict[str, Array]:
    """DARE's rescaling (2311.03099, Eq. 3)."""
    return {name: values / density if density else values for name, values in sparse.items()}


def norm_restored(sparse: Model, whole: Model) -> dict[str, Array]:
    """mergekit's rescaling: each tensor's L1 norm is what it was; not where one of both norms is 0."""
    result = {}
    for name, values in sparse.items():
        before, after = float(np.abs(whole[name]).sum()), float(np.abs(values).sum())
        result[name] = values * (before / after) if before and after else values
    return result


# the vote


def elected(base: Model, terms: Sequence[Model], weights: Sequence[float], scale: float, normalize: bool,
            zero: Zero) -> dict[str, Array]:  # fmt: skip
    """2306.01708, Algorithm 1, entry by entry: elect the sign of the weighted sum, then merge what has it.

    ``zero``: a sum of 0 elects nothing (the paper), or plus (mergekit, which then divides by 1 where the
    weights that agree sum to 0).
    """
    result = {}
    for name in base:
        columns = [term[name].reshape(-1) for term in terms]
        entries = [vote(column, weights, normalize, zero)[0] for column in zip(*columns, strict=True)]
        result[name] = base[name] + scale * np.array(entries, dtype=np.float64).reshape(base[name].shape)
    return result


def vote(
    entries: Sequence[float], weights: Sequence[float], normalize: bool, zero: Zero
) -> tuple[float, float]:
    """What one entry becomes, and the sum of the weights that agreed."""
    weighted = [w * x for w, x in zip(weights, entries, strict=True)]
    total = sum(weighted)
    if total == 0 and zero == "nothing":
        return 0.0, 0.0
    sign = -1.0 if total < 0 else 1.0
    agreed = [(w, a) for w, a in zip(weights, weighted, strict=True) if a * sign > 0]
    merged, votes = sum(a for _, a in agreed), sum(w for w, _ in agreed)
    if not normalize:
        return merged, votes
    if votes == 0:
        return (0.0 if zero == "nothing" else merged), votes
    return merged / votes, votes


# slerp


def slerp(base: Model, other: Model, t: Callable[[str], float]) -> dict[str, Array]:
    """sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b; a straight line where the two are nearly parallel."""
    return {name: slerp_of_two(base[name], other[name], t(name)) for name in base}


def slerp_of_two(a: Array, b: Array, t: float) -> Array:
    lengths = [float(np.sqrt((x * x).sum())) for x in (a, b)]
    divisors = [length if length > 1e-8 else 1.0 for length in lengths]
    cosine = min(1.0, max(-1.0, float((a / divisors[0] * (b / divisors[1])).sum())))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    straight: Array = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    return straight
