"""The one place where sparsifiers F and consensus ⊕ meet, online and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.ops.consensus import CONSENSUS, Consensus, agreeing_terms, consensus
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.sparsify import (
    COUNTINGS,
    Counting,
    Rescale,
    Sparsifier,
    Thinning,
    check_kind,
    thin,
    thinning,
)


@dataclass(frozen=True)
class Operator:
    """What F and ⊕ are: one row of the presets' mathematics.

    Args:
        sparsify: the sparsifier F.
        rescale: how F rescales what it keeps.
        consensus: the combination ⊕.
        normalize: divide by the sum of the agreeing weights (offline TIES).
        counting: how the top sparsifier's k follows from p.
    """

    sparsify: Sparsifier = "none"
    rescale: Rescale = "none"
    consensus: Consensus = "linear"
    normalize: bool = False
    counting: Counting = "ceil"

    def __post_init__(self) -> None:
        check_kind(self.sparsify, self.rescale, 1.0)
        if self.consensus not in CONSENSUS:
            raise ValueError(f"unknown consensus {self.consensus!r}; known: {', '.join(CONSENSUS)}")
        if self.counting not in COUNTINGS:
            raise ValueError(f"unknown counting {self.counting!r}; known: {', '.join(COUNTINGS)}")

    def is_identity_on_first(self, weights: Sequence[float], reserve_rate: float) -> bool:
        """Whether the merge is skipped, with δ₁ as its result: weights (1, 0, …) and F the identity.

        For ``linear`` and ``sign`` the arithmetic gives the same. ``sign_unweighted`` would let a delta of
        weight 0 vote; with α = 0 nothing is to be merged, so it is skipped there too.
        """
        sparse = self.sparsify != "none" and reserve_rate != 1
        return not sparse and weights[0] == 1 and all(w == 0 for w in weights[1:])


def sparse_terms(
    deltas: Sequence[Tensor],
    reserve_rates: Sequence[float],
    operator: Operator,
    keys: Sequence[MaskKey | None],
) -> list[Tensor]:
    """F(δᵢ; pᵢ) for each delta; pᵢ = 1 passes δᵢ through, which is how a delta that was masked once comes
    in.
    """
    how = [
        thinning(delta, operator.sparsify, p, rescale=operator.rescale, key=key, counting=operator.counting)
        for delta, p, key in zip(deltas, reserve_rates, keys, strict=True)
    ]
    return thin(deltas, how)


def combine(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    reserve_rates: Sequence[float],
    operator: Operator,
    keys: Sequence[MaskKey | None],
) -> Tensor:
    """Form ⊕_w(F(δ₁; p₁), F(δ₂; p₂), …) (arXiv 2405.17931, Eq. 3 to 7; offline: 2306.01708, 2311.03099).

    Args:
        deltas: tensors of one shape and dtype, in the dtype the arithmetic is to have.
        weights: one weight for each delta; online (1 − α, α).
        reserve_rates: one p in (0, 1] for each delta.
        operator: F and ⊕.
        keys: one mask key for each delta; None where F draws nothing.

    Returns:
        What is to be added to the anchor, once.
    """
    terms = sparse_terms(deltas, reserve_rates, operator, keys)
    return consensus(terms, weights, operator.consensus, normalize=operator.normalize)


def combine_parts(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    reserve_rates: Sequence[float],
    operator: Operator,
    keys: Sequence[MaskKey | None],
) -> list[Tensor]:
    """What each delta contributes to :func:`combine`: parts whose sum it is (without ``normalize``)."""
    return agreeing_terms(sparse_terms(deltas, reserve_rates, operator, keys), weights, operator.consensus)


def merge(
    anchor: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    reserve_rates: Sequence[float],
    operator: Operator,
    keys: Sequence[MaskKey | None],
) -> Tensor:
    """Form ``anchor + ⊕_w(F(δ₁), F(δ₂), …)``, the function that online and offline merging share.

    Offline, classic: the anchor is θ_b and δᵢ = θᵢ − θ_b. Offline as step-K reaches it: the anchor is θ_r, δ₁
    = θ − θ_r and δ₂ = τ = θ_r − θ_b. Online, the anchor is θ after the last merge.

    Examples:
        >>> import torch
        >>> mean = Operator(consensus="linear")
        >>> models = [torch.ones(2), torch.full((2,), 3.0)]
        >>> merge(torch.zeros(2), models, [0.5, 0.5], [1, 1], mean, [None, None]).tolist()
        [2.0, 2.0]
    """
    return anchor + combine(deltas, weights, reserve_rates, operator, keys)


def merge_range(
    anchor: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    how: Sequence[Thinning],
    operator: Operator,
    *,
    scale: float = 1.0,
    place: Place | None = None,
) -> Tensor:
    """:func:`merge` of a range of a tensor: anchor + λ·⊕_w(F(δ₁), F(δ₂), …).

    Args:
        anchor: its range of the anchor.
        deltas: the same range of each delta, in the anchor's dtype.
        weights: one weight for each delta.
        how: what F does to each delta, decided over the whole tensor
            (:func:`trimtab.ops.sparsify.thinning`).
        operator: ⊕.
        scale: λ (TIES, arXiv 2306.01708, Algorithm 1).
        place: where the range lies; None for a whole tensor.

    Examples:
        >>> one, vote = torch.ones(2), Operator(consensus="sign")
        >>> merge_range(one, [one, -3 * one], [1.0, 1.0], [Thinning()] * 2, vote).tolist()
        [-2.0, -2.0]
    """
    mixed = consensus(thin(deltas, how, place), weights, operator.consensus, normalize=operator.normalize)
    return anchor + (mixed if scale == 1 else mixed * scale)


def weighted_sum(terms: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Σ wᵢ·xᵢ of models, divided by Σ wᵢ where ``normalize`` (arXiv 2203.05482).

    Formed in fp32 (fp64 where a term is), each product added with a single rounding where the processor can:
    the operation is torch.addcmul, as in mergekit.

    Examples:
        >>> weighted_sum([torch.ones(2), torch.full((2,), 3.0)], [1, 3], normalize=True).tolist()
        [2.5, 2.5]
    """
    dtype = torch.float64 if any(term.dtype == torch.float64 for term in terms) else torch.float32
    factors = [torch.full((1,), float(weight), dtype=dtype) for weight in weights]
    total = torch.zeros_like(terms[0], dtype=dtype)
    for term, factor in zip(terms, factors, strict=True):
        total.addcmul_(term, factor)
    return total.div_(torch.cat(factors).sum()) if normalize else total
