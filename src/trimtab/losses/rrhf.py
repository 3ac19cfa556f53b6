"""RRHF: rank responses by their length-normalized log-probability (arXiv 2304.05302, Eq. 2 to 5).

Shapes: R responses of all prompts together, B prompts; ``groups_R`` says which prompt a response answers, so
prompts may have any numbers of responses.

The authors' released code differs from the paper: its length normalization has no effect (a label tensor is
changed in place), its SFT term averages over padding, its batch is one prompt, and its rank weight is 100 by
default while every script passes 1. This is the paper's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FtNormalization = Literal["sum", "token_mean"]


@dataclass(frozen=True)
class RRHFTerms:
    """The parts of the loss and what is worth a look, one number a prompt, each of shape (B,).

    Args:
        rank: Σ_{r_i < r_j} max(0, p_i − p_j + margin), differentiable.
        ft: −Σ_t log P(y_t) of the best response, differentiable.
        ft_tokens: tokens of the best response.
        pairs: pairs of responses with different scores.
        ordered: those of them that the model orders as the scores do.
        others: responses other than the best.
        lead: Σ over the others of p_best − p_other.
        responses: responses.
        length: Σ over the responses of their tokens.
    """

    rank: torch.Tensor
    ft: torch.Tensor
    ft_tokens: torch.Tensor
    pairs: torch.Tensor
    ordered: torch.Tensor
    others: torch.Tensor
    lead: torch.Tensor
    responses: torch.Tensor
    length: torch.Tensor


def length_normalized(logps_R: torch.Tensor, lengths_R: torch.Tensor, exponent: float = 1.0) -> torch.Tensor:
    """Return p = Σ_t log P(y_t) / ‖y‖^γ (Eq. 2 of the paper for γ = 1).

    Args:
        logps_R: summed log-probabilities of the responses in nats, shape (R,).
        lengths_R: tokens of the responses, at least 1, shape (R,).
        exponent: γ; 0 leaves the sum.

    Examples:
        >>> length_normalized(torch.tensor([-6.0]), torch.tensor([3]))
        tensor([-2.])
    """
    return logps_R / lengths_R.to(logps_R.dtype) ** exponent


def rrhf_terms(
    logps_R: torch.Tensor,
    lengths_R: torch.Tensor,
    scores_R: torch.Tensor,
    groups_R: torch.Tensor,
    *,
    prompts: int,
    length_exponent: float = 1.0,
    margin: float = 0.0,
) -> RRHFTerms:
    """The parts of RRHF's loss for each prompt (Eq. 3 and 4).

    Equal scores contribute nothing to the ranking; the best response is the first of those with the highest
    score. A prompt with one response has a rank loss of 0. The comparisons are a table of R × R booleans.

    Args:
        logps_R: Σ_t log P(y_t | prompt, y_<t) of each response in nats, shape (R,).
        lengths_R: tokens of the responses, at least 1, shape (R,).
        scores_R: how good each response is, comparable within its prompt, not NaN, shape (R,).
        groups_R: which prompt each response answers, integers in [0, B), every prompt present, shape (R,).
        prompts: B.
        length_exponent: γ of :func:`length_normalized`.
        margin: by how much a better response should lead, in units of p; the paper has 0.

    Examples:
        >>> logps, lengths = torch.tensor([-2.0, -3.0]), torch.tensor([2, 1])
        >>> terms = rrhf_terms(logps, lengths, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), prompts=1)
        >>> terms.rank, terms.ft  # p is −1 and −3, and the second is the better one
        (tensor([2.]), tensor([3.]))
    """
    values_R = length_normalized(logps_R, lengths_R, length_exponent)
    same_RR = groups_R[:, None] == groups_R
    worse_RR = same_RR & (scores_R[:, None] < scores_R)
    best_R = _first_best(scores_R, same_RR, worse_RR)
    gap_RR = values_R[:, None] - values_R
    hinge_R = torch.where(worse_RR, gap_RR + margin, 0.0).relu().sum(1)

    def total(values: torch.Tensor) -> torch.Tensor:
        wide = values.to(logps_R.dtype)
        return wide.new_zeros(prompts).index_add(0, groups_R, wide)

    with torch.no_grad():
        ordered_R = (worse_RR & (gap_RR < 0)).sum(1)
        lead_R = torch.where(same_RR & best_R[:, None], gap_RR, 0.0).sum(1)
    responses_B = total(torch.ones_like(logps_R.detach()))
    return RRHFTerms(
        rank=total(hinge_R),
        ft=total(torch.where(best_R, -logps_R, 0.0)),
        ft_tokens=total(torch.where(best_R, lengths_R, 0)),
        pairs=total(worse_RR.sum(1)),
        ordered=total(ordered_R),
        others=responses_B - 1,
        lead=total(lead_R),
        responses=responses_B,
        length=total(lengths_R),
    )


def rrhf_loss(
    terms: RRHFTerms,
    *,
    rank_weight: float = 1.0,
    ft_normalization: FtNormalization = "sum",
    prompts: torch.Tensor | float | None = None,
    ft_tokens: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """L = w · L_rank + L_ft, averaged over the prompts of the global batch (Eq. 5).

    L_rank is the sum over a prompt's pairs, averaged over prompts. L_ft is, for ``sum`` (the paper's Eq. 4),
    the best responses' negative log-likelihood averaged over prompts; for ``token_mean`` it is averaged over
    their tokens, which is the usual SFT loss.

    The terms may be a part of the global batch: with the global counts given, the parts' losses add up to
    the whole's.

    Args:
        terms: of :func:`rrhf_terms`.
        rank_weight: w; the paper's scripts pass 1.
        ft_normalization: how L_ft is averaged.
        prompts: prompts of the global batch; those of ``terms`` when None.
        ft_tokens: tokens of the best responses of the global batch; those of ``terms`` when None.

    Returns:
        The loss, shape ().
    """
    prompts = terms.rank.shape[0] if prompts is None else prompts
    ft_tokens = terms.ft_tokens.sum() if ft_tokens is None else ft_tokens
    divisor = prompts if ft_normalization == "sum" else ft_tokens
    return rank_weight * (terms.rank.sum() / prompts) + terms.ft.sum() / divisor


def _first_best(scores_R: torch.Tensor, same_RR: torch.Tensor, worse_RR: torch.Tensor) -> torch.Tensor:
    """Which responses no other of their prompt beats, or equals at an earlier place."""
    places_R = torch.arange(scores_R.shape[0], device=scores_R.device)
    later_RR = same_RR & (scores_R[:, None] == scores_R) & (places_R[:, None] > places_R)
    return ~(worse_RR | later_RR).any(1)
