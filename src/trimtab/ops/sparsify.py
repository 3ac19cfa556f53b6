"""Sparsifiers F(x; p) and their rescaling, on one logical (unsharded) tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trimtab.ops import bits
from trimtab.ops.exact_sum import exact_l1
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place, bernoulli_bits

Sparsifier = Literal["none", "bernoulli", "top"]
Rescale = Literal["none", "expected", "l1"]
Counting = Literal["ceil", "floor", "truncate"]
COUNTINGS: tuple[Counting, ...] = ("ceil", "floor", "truncate")


def top_count(n: int, p: float, counting: Counting = "ceil") -> int:
    """How many of ``n`` entries the top sparsifier keeps.

    ``ceil``: k = min(n, max(1, ⌈p·n⌉)) with p taken as the decimal that was written, so 0.07 of 100 is 7.
    ``floor``: k = int(p·n) in floating point, and all n when that is 0, as the released code of arXiv
    2405.17931 does. ``truncate``: max(1, int(p·n)), as mergekit does.

    Examples:
        >>> top_count(100, 0.07), top_count(1000, 5e-4), top_count(1000, 5e-4, "floor"), top_count(0, 0.5)
        (7, 1, 1000, 0)
    """
    _check_rate(p)
    if counting == "truncate":
        return min(n, max(1, int(p * n)))
    if counting == "floor":
        return int(p * n) or n
    return min(n, max(1, math.ceil(Fraction(repr(float(p))) * n)))


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the top sparsifier cuts: what it keeps is a function of the entry and its index alone.

    An entry of :func:`magnitude_bits` b is kept when ``b > bits``, or when ``b == bits`` and its row-major
    index in the unsharded tensor is below ``index``.
    """

    bits: int
    index: int


def top_cut(x: Tensor, k: int) -> Cut:
    """Where to cut so that exactly ``k`` entries of an unsharded tensor are kept, 0 ≤ k ≤ numel.

    Ties go to the lower row-major index; NaN ranks above infinity.
    """
    if not 0 <= k <= x.numel():
        raise ValueError(f"cannot keep {k} of {x.numel()} entries")
    magnitudes = bits.magnitude(x.reshape(-1))
    if k == 0:
        return Cut(torch.iinfo(magnitudes.dtype).max, 0)
    rank = magnitudes.numel() - k
    if magnitudes.device.type == "cpu":  # NumPy's introselect takes a tenth of torch.kthvalue's time
        threshold = int(np.partition(magnitudes.numpy(), rank)[rank])
    else:
        threshold = int(magnitudes.kthvalue(rank + 1).values)
    tied = bits.places(magnitudes, threshold)
    spare = k - int((magnitudes > threshold).sum())
    return Cut(threshold, x.numel() if spare == tied.numel() else int(tied[spare]))


def kept_by(cut: Cut, x: Tensor, place: Place | None = None) -> Tensor:
    """Mask of the entries that ``cut`` keeps: integers of x's size and shape, −1 where kept, else 0.

    Args:
        cut: see :class:`Cut`.
        x: floating tensor; of a shard, its local part.
        place: where a local part, or a range of it, lies; None for the whole tensor.
    """
    magnitudes = bits.magnitude(x.reshape(-1))
    layout, low = (Layout.whole((x.numel(),)), 0) if place is None else place
    all_ties = cut.index >= layout.total
    if not all_ties:
        tied = bits.places(magnitudes, cut.bits)
    # b > t is ~(b − t − 1 < 0): of two magnitudes the difference cannot overflow.
    kept = magnitudes.sub_(cut.bits + (not all_ties)).bitwise_right_shift_(8 * x.element_size() - 1)
    kept.bitwise_not_()
    if not all_ties and tied.numel():
        index = tied + low if layout.is_whole else layout.indices(low, low + x.numel(), device=x.device)[tied]
        kept[tied[index < cut.index]] = -1
    return kept.view(x.shape)


def top_mask(x: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` entries of largest magnitude (TIES trim, arXiv 2306.01708, §3).

    Exactly k entries are kept: ties go to the lower row-major index; NaN ranks above infinity.

    Args:
        x: floating tensor of any shape.
        k: entries to keep, 0 ≤ k ≤ numel.

    Returns:
        bool tensor of x's shape.

    Examples:
        >>> top_mask(torch.tensor([1.0, -3.0, 3.0, 2.0]), 1).tolist()
        [False, True, False, False]
    """
    n = x.numel()
    if not 0 <= k <= n:
        raise ValueError(f"cannot keep {k} of {n} entries")
    if k == n or k == 0:
        return torch.full(x.shape, k > 0, dtype=torch.bool, device=x.device)
    return kept_by(top_cut(x, k), x).to(torch.bool)


def sparsify(
    x: Tensor,
    kind: Sparsifier,
    reserve_rate: float,
    *,
    rescale: Rescale = "none",
    key: MaskKey | None = None,
    count: int | None = None,
    counting: Counting = "ceil",
) -> Tensor:
    """Apply F(x; p): keep a share p of the entries, set the others to exactly 0, rescale.

    ``bernoulli`` keeps each entry with probability p (DARE, arXiv 2311.03099); ``top`` keeps the ⌈p·n⌉ of
    largest magnitude (TIES, arXiv 2306.01708); ``none`` and p = 1 are the identity. Rescaling of what is
    kept: ``none`` (arXiv 2405.17931, Eq. 4), ``expected`` (× 1/p, DARE Eq. 3, bernoulli only), ``l1`` (×
        ‖x‖₁/‖F(x)‖₁, factor 1 where a sum is 0 or not finite).

    Args:
        x: floating tensor of any shape; not changed.
        kind: the sparsifier.
        reserve_rate: p in (0, 1].
        rescale: see above.
        key: source of the mask; needed by ``bernoulli``.
        count: k for ``top`` where it was computed before; else :func:`top_count`.
        counting: how k follows from p, for ``top``.

    Returns:
        A tensor like x (x itself where F is the identity).
    """
    how = thinning(x, kind, reserve_rate, rescale=rescale, key=key, count=count, counting=counting)
    return thin([x], [how])[0]


@dataclass(frozen=True, slots=True)
class Thinning:
    """What F does to one tensor, decided: any part of the tensor can now be thinned on its own.

    Args:
        rate: p; with a key, the probability of keeping.
        key: source of a Bernoulli mask.
        cut: where top cuts. Without key and cut everything is kept.
        factor: what kept entries are multiplied with.
    """

    rate: float = 1.0
    key: MaskKey | None = None
    cut: Cut | None = None
    factor: float = 1.0


def thinning(
    x: Tensor,
    kind: Sparsifier,
    reserve_rate: float,
    *,
    rescale: Rescale = "none",
    key: MaskKey | None = None,
    count: int | None = None,
    counting: Counting = "ceil",
) -> Thinning:
    """Decide what F does to an unsharded tensor; arguments as for :func:`sparsify`."""
    check_kind(kind, rescale, reserve_rate)
    if kind == "none" or reserve_rate == 1 or x.numel() == 0:
        return Thinning()
    if kind == "bernoulli":
        if key is None:
            raise ValueError("sparsify 'bernoulli' needs a key")
        how = Thinning(reserve_rate, key=key)
    else:
        k = top_count(x.numel(), reserve_rate, counting) if count is None else count
        if k == x.numel():
            return Thinning()
        how = Thinning(reserve_rate, cut=top_cut(x, k))
    if rescale == "expected":
        return replace(how, factor=1.0 / reserve_rate)
    return how if rescale == "none" else replace(how, factor=l1_factor(x, thin([x], [how])[0]))


def thin(xs: Sequence[Tensor], how: Sequence[Thinning], place: Place | None = None) -> list[Tensor]:
    """Thin tensors of one shape, or the ranges of them that ``place`` says. The identity returns x itself."""
    drawn = {i: one.key for i, one in enumerate(how) if one.key is not None}
    masks: dict[int, Tensor] = {}
    if drawn:
        rates, keys = [how[i].rate for i in drawn], list(drawn.values())
        made = bernoulli_bits(xs[0].numel(), rates, keys, place=place, device=xs[0].device)
        masks = {i: mask.view(xs[0].shape) for i, mask in zip(drawn, made, strict=True)}
    result = []
    for i, (x, one) in enumerate(zip(xs, how, strict=True)):
        if one.cut is not None:
            masks[i] = kept_by(one.cut, x, place)
        kept = bits.selected(x, masks[i]) if i in masks else x
        result.append(kept if one.factor == 1 else kept * one.factor)
    return result


def l1_factor(x: Tensor, kept: Tensor) -> float:
    """‖x‖₁/‖F(x)‖₁, and 1 where a sum is 0 or not finite."""
    return l1_ratio(l1_norm(x), l1_norm(kept))


def l1_ratio(before: float, after: float) -> float:
    """The factor that restores an L1 norm: before/after, and 1 where one of them is 0 or not finite."""
    usable = math.isfinite(before) and math.isfinite(after) and before > 0 and after > 0
    return before / after if usable else 1.0


def l1_norm(x: Tensor) -> float:
    """Σ|x|, rounded once to float64; NaN where an entry is not finite."""
    return exact_l1([x])[0]


def magnitude_bits(flat: Tensor) -> Tensor:
    """Integers in the order of |x|, NaN last: int32, or int64 for fp64."""
    found = bits.magnitude(flat)
    return found.to(torch.int32) if found.dtype == torch.int16 else found


def check_kind(kind: Sparsifier, rescale: Rescale, p: float) -> None:
    """Refuse unknown kinds, pairs that are not defined, and rates out of range."""
    _check_rate(p)
    if kind not in ("none", "bernoulli", "top"):
        raise ValueError(f"unknown sparsifier {kind!r}; known: none, bernoulli, top")
    if rescale not in ("none", "expected", "l1"):
        raise ValueError(f"unknown rescale {rescale!r}; known: none, expected, l1")
    if rescale == "expected" and kind == "top":
        raise ValueError("rescale 'expected' is defined for 'bernoulli' only; use 'none' or 'l1' with 'top'")


def _check_rate(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"reserve_rate must be in (0, 1], got {p}")
