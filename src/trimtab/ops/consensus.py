"""Consensus ⊕: how weighted terms are combined, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trimtab.ops import bits

Consensus = Literal["linear", "sign", "sign_or_plus", "sign_unweighted"]
CONSENSUS: tuple[Consensus, ...] = ("linear", "sign", "sign_or_plus", "sign_unweighted")


def agreeing_terms(terms: Sequence[Tensor], weights: Sequence[float], kind: Consensus) -> list[Tensor]:
    """The weighted terms aᵢ = wᵢ·xᵢ, each 0 where it is outvoted; their sum is the consensus.

    ``linear``: nothing is outvoted. ``sign`` (TIES elect and disjoint merge, arXiv 2306.01708 §3; arXiv
    2405.17931 Eq. 7): aᵢ stays where sign aᵢ = sign Σ aᵢ, and everything is 0 where the sum is 0.
    ``sign_or_plus`` (mergekit): as ``sign``, but a sum of 0 counts as +.
    ``sign_unweighted`` (the released code of arXiv 2405.17931): the vote is sign Σ xᵢ, before weighting, and
    a sum of 0 counts as +. NaN propagates.

    Args:
        terms: tensors xᵢ of one shape and dtype.
        weights: one weight for each.
        kind: see above.

    Returns:
        A list as long as ``terms``.
    """
    if not terms or len(terms) != len(weights):
        raise ValueError(f"{len(terms)} terms need as many weights (at least one), got {len(weights)}")
    weighted = [term * weight for term, weight in zip(terms, weights, strict=True)]
    if kind == "linear":
        return weighted
    if kind == "sign":
        total = _sum(weighted)
        decided = bits.nonzero(total)
        keep = [bits.agreeing(a, total).bitwise_and_(decided) for a in weighted]
    elif kind in ("sign_or_plus", "sign_unweighted"):
        # A sum of 0 counts as +, −0 included, and no term of 0 has anything to lose.
        total = _sum(weighted if kind == "sign_or_plus" else terms) + 0.0
        keep = [bits.agreeing(a, total) for a in weighted]
    else:
        raise ValueError(f"unknown consensus {kind!r}; known: {', '.join(CONSENSUS)}")
    undecided = bits.nan(total)
    return [bits.selected(a, agrees.bitwise_or_(undecided)) for a, agrees in zip(weighted, keep, strict=True)]


def consensus(
    terms: Sequence[Tensor], weights: Sequence[float], kind: Consensus, *, normalize: bool = False
) -> Tensor:
    """Combine weighted terms: Σ of the :func:`agreeing_terms`, from left to right.

    Args:
        terms: tensors xᵢ of one shape and dtype.
        weights: one weight for each.
        kind: which entries of which terms count.
        normalize: divide by the sum of the weights that agree (offline TIES; all of them for ``linear``); 0
            where that sum is 0, but for ``sign_or_plus``, which does not divide there (mergekit).

    Returns:
        A tensor like the terms.

    Examples:
        >>> x, y = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([2.0, 3.0, -1.0])
        >>> consensus([x, y], [1.0, 1.0], "linear").tolist()
        [3.0, 2.0, 0.0]
        >>> consensus([x, y], [1.0, 1.0], "sign").tolist()
        [3.0, 3.0, 0.0]
    """
    parts = agreeing_terms(terms, weights, kind)
    total = _sum(parts)
    if not normalize:
        return total
    if kind == "linear":  # a weighted mean: an entry of 0 has agreed too; in a vote it has not
        cast = [total.new_full((1,), float(w)) for w in weights]
    else:
        none = total.new_zeros(())
        cast = [
            torch.where(part != 0, total.new_full((), float(w)), none)
            for part, w in zip(parts, weights, strict=True)
        ]
    votes = _sum(cast)
    undivided = total if kind == "sign_or_plus" else torch.zeros_like(total)
    return torch.where(votes == 0, undivided, total / votes)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum from left to right; 16-bit parts are summed in fp32 and rounded once, as by torch.sum."""
    total = parts[0]
    if len(parts) > 2 and total.dtype in (torch.bfloat16, torch.float16):
        total = total.to(torch.float32)
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)
