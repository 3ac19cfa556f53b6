"""Sparsifiers F(x; p) and their rescaling, on one logical (unsharded) tensor."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from trimtab.ops.masks import MaskKey, bernoulli_mask

Sparsifier = Literal["none", "bernoulli", "top"]
Rescale = Literal["none", "expected", "l1"]
Counting = Literal["ceil", "floor"]

# Entries per float64 partial sum of the L1 norm: fixed, so that the sum does not depend on the layout.
_BLOCK = 4096


def top_count(n: int, p: float, counting: Counting = "ceil") -> int:
    """How many of ``n`` entries the top sparsifier keeps.

    ``ceil``: k = min(n, max(1, ⌈p·n⌉)) with p taken as the decimal that was written, so 0.07 of 100 is 7.
    ``floor``: k = int(p·n) in floating point, and all n when that is 0, as the released code of arXiv
    2405.17931 does.

    Examples:
        >>> top_count(100, 0.07), top_count(1000, 5e-4), top_count(1000, 5e-4, "floor"), top_count(0, 0.5)
        (7, 1, 1000, 0)
    """
    _check_rate(p)
    if counting == "floor":
        return int(p * n) or n
    return min(n, max(1, math.ceil(Fraction(repr(float(p))) * n)))


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
    magnitude = _magnitude_order(x.reshape(-1))
    threshold = magnitude.kthvalue(n - k + 1).values
    above = magnitude > threshold
    tied = (magnitude == threshold).nonzero().squeeze(1)
    above[tied[: k - int(above.sum())]] = True
    return above.view(x.shape)


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
    _check_rate(reserve_rate)
    if rescale == "expected" and kind == "top":
        raise ValueError("rescale 'expected' is defined for 'bernoulli' only; use 'none' or 'l1' with 'top'")
    if kind == "none" or reserve_rate == 1 or x.numel() == 0:
        return x
    if kind == "bernoulli":
        if key is None:
            raise ValueError("sparsify 'bernoulli' needs a key")
        mask = bernoulli_mask(x.shape, reserve_rate, key, device=x.device)
    elif kind == "top":
        mask = top_mask(x, top_count(x.numel(), reserve_rate, counting) if count is None else count)
    else:
        raise ValueError(f"unknown sparsifier {kind!r}; known: none, bernoulli, top")
    return _rescaled(
        x, torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)), rescale, reserve_rate
    )


def l1_norm(x: Tensor) -> float:
    """Σ|x| in float64, summed in fixed blocks of 4,096 entries by row-major index, then exactly over
    blocks.
    """
    flat = x.reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    sums = flat[:whole].view(-1, _BLOCK).abs().sum(dim=1, dtype=torch.float64).tolist()
    if whole < flat.numel():
        sums.append(float(flat[whole:].abs().sum(dtype=torch.float64)))
    return math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan


def _rescaled(x: Tensor, kept: Tensor, rescale: Rescale, p: float) -> Tensor:
    if rescale == "none":
        return kept
    if rescale == "expected":
        return kept * (1.0 / p)
    if rescale == "l1":
        before, after = l1_norm(x), l1_norm(kept)
        usable = math.isfinite(before) and math.isfinite(after) and before > 0 and after > 0
        return kept * (before / after) if usable else kept
    raise ValueError(f"unknown rescale {rescale!r}; known: none, expected, l1")


def _magnitude_order(flat: Tensor) -> Tensor:
    """Integers in the order of |x|: the bit pattern without its sign, and one value above infinity for every
    NaN.
    """
    if flat.dtype == torch.float64:
        bits, top = flat.view(torch.int64) & 0x7FFFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF
    elif flat.dtype == torch.float32:
        bits, top = flat.view(torch.int32) & 0x7FFFFFFF, 0x7FFFFFFF
    elif flat.dtype in (torch.float16, torch.bfloat16):
        bits, top = flat.view(torch.int16).to(torch.int32) & 0x7FFF, 0x7FFF
    else:
        raise ValueError(f"top needs a floating tensor, got {flat.dtype}")
    return bits.masked_fill_(flat.isnan(), top)


def _check_rate(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"reserve_rate must be in (0, 1], got {p}")
