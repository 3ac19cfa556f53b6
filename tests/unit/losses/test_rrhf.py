"""RRHF's loss against plain float64 loops written from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.losses import length_normalized, rrhf_loss, rrhf_terms

Prompt = list[tuple[list[float], float]]
"""The responses of a prompt: their tokens' log-probabilities, and their score."""


def oracle(prompts: list[Prompt], exponent: float, margin: float, weight: float, ft: str) -> float:
    """Eq. 2 to 5 of arXiv 2304.05302, one response and one pair at a time."""
    rank, nll, tokens = 0.0, 0.0, 0
    for responses in prompts:
        values = [sum(logps) / len(logps) ** exponent for logps, _ in responses]
        scores = [score for _, score in responses]
        for i in range(len(responses)):
            for j in range(len(responses)):
                if scores[i] < scores[j]:
                    rank += max(0.0, values[i] - values[j] + margin)
        best = responses[scores.index(max(scores))][0]
        nll -= sum(best)
        tokens += len(best)
    return weight * rank / len(prompts) + nll / (len(prompts) if ft == "sum" else tokens)


def tensors(prompts: list[Prompt]) -> dict[str, Any]:
    flat = [(place, *response) for place, responses in enumerate(prompts) for response in responses]
    return {
        "logps_R": torch.tensor([sum(logps) for _, logps, _ in flat], dtype=torch.float64),
        "lengths_R": torch.tensor([len(logps) for _, logps, _ in flat]),
        "scores_R": torch.tensor([score for *_, score in flat], dtype=torch.float64),
        "groups_R": torch.tensor([place for place, *_ in flat]),
        "prompts": len(prompts),
    }


logps = st.lists(st.floats(-20, 0, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=6)
responses = st.lists(st.tuples(logps, st.integers(0, 3).map(float)), min_size=1, max_size=5)
batches = st.lists(responses, min_size=1, max_size=4)


@given(
    batches,
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from(["sum", "token_mean"]),
)
def test_the_loss_is_the_papers(
    prompts: list[Prompt], exponent: float, margin: float, weight: float, ft: Any
) -> None:
    terms = rrhf_terms(**tensors(prompts), length_exponent=exponent, margin=margin)
    loss = rrhf_loss(terms, rank_weight=weight, ft_normalization=ft)
    assert float(loss) == pytest.approx(oracle(prompts, exponent, margin, weight, ft), rel=1e-9, abs=1e-9)


@given(batches, st.sampled_from(["sum", "token_mean"]), st.data())
def test_parts_of_a_global_batch_add_up(prompts: list[Prompt], ft: Any, data: Any) -> None:
    cut = data.draw(st.integers(0, len(prompts)))
    whole = rrhf_terms(**tensors(prompts))
    counts = {"prompts": len(prompts), "ft_tokens": float(whole.ft_tokens.sum())}
    parts = [rrhf_terms(**tensors(part)) for part in (prompts[:cut], prompts[cut:]) if part]
    losses = sum(float(rrhf_loss(part, ft_normalization=ft, **counts)) for part in parts)
    assert losses == pytest.approx(float(rrhf_loss(whole, ft_normalization=ft)), rel=1e-9, abs=1e-9)


@given(batches)
def test_what_is_counted(prompts: list[Prompt]) -> None:
    terms = rrhf_terms(**tensors(prompts))
    for place, group in enumerate(prompts):
        values = [sum(logps) / len(logps) for logps, _ in group]
        scores = [score for _, score in group]
        best = scores.index(max(scores))
        pairs = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a < b]
        gaps = float(length_normalized(torch.tensor(0.0), torch.tensor(1)))
        gaps += sum(values[best] - value for value in values)
        assert terms.pairs[place] == len(pairs)
        # Equal values need not be bit-equal between the two ways of summing: leave them to either side.
        near = sum(abs(values[i] - values[j]) < 1e-9 for i, j in pairs)
        ordered = sum(values[i] < values[j] for i, j in pairs)
        assert abs(float(terms.ordered[place]) - ordered) <= near
        assert float(terms.lead[place]) == pytest.approx(gaps, abs=1e-9)
        assert terms.others[place] == len(group) - 1
        assert terms.responses[place] == len(group)
        assert terms.length[place] == sum(len(logps) for logps, _ in group)
        assert terms.ft_tokens[place] == len(group[best][0])


def test_gradients_go_to_misordered_pairs_and_to_the_best() -> None:
    """p is −1, −2, −3 and the scores are 0, 1, 1: the first is misordered with both, the others are tied."""
    values = tensors([[([-1.0], 0.0), ([-2.0, -2.0], 1.0), ([-3.0], 1.0)]])
    values["logps_R"].requires_grad_()
    terms = rrhf_terms(**values)
    assert terms.rank.tolist() == [1 + 2]
    assert terms.ft.tolist() == [4]  # the first of the two best
    rrhf_loss(terms).backward()
    # Two hinges raise p_0; each raises its better one's p by −1, over its length; L_ft gives −1 to the best.
    assert values["logps_R"].grad.tolist() == [2.0, -0.5 - 1.0, -1.0]


def test_one_response_is_sft() -> None:
    """``token_mean`` with k = 1 is cross-entropy over all tokens of the batch."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(5, (7,), generator=draw)
    lengths = torch.tensor([3, 4])
    logps = torch.log_softmax(logits, -1)[torch.arange(7), targets]
    sums = torch.stack([logps[:3].sum(), logps[3:].sum()])
    terms = rrhf_terms(sums, lengths, torch.zeros(2), torch.arange(2), prompts=2)
    loss = rrhf_loss(terms, ft_normalization="token_mean")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))


def test_an_impossible_response_does_not_make_nan_of_the_others() -> None:
    values = tensors([[([-1.0], 0.0), ([-2.0], 1.0)], [([-1.0], 1.0)]])
    values["logps_R"][0] = -torch.inf
    terms = rrhf_terms(**values)
    assert terms.rank.tolist() == [0.0, 0.0]
    assert terms.ft.tolist() == [2.0, 1.0]
