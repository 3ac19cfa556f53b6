"""The one place where sparsifiers F and consensus ⊕ meet, online and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.ops.consensus import CONSENSUS, Consensus, agreeing_terms, consensus
from trimtab.ops.masks import MaskKey
from trimtab.ops.sparsify import COUNTINGS, Counting, Rescale, Sparsifier, check_kind, thin, thinning


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
