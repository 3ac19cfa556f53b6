"""Which tokens may be drawn, how often, and from which numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab import UserError
from trimtab.sampling import Sampling, draw, sampled_probabilities, uniforms


def expected_probabilities(logits: list[float], sampling: Sampling) -> list[float]:
    """Temperature, then top_k, then top_p, one token at a time."""
    scaled = [value / sampling.temperature for value in logits]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    order = order[: sampling.top_k or len(order)]
    whole, kept, reached = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if reached >= sampling.top_p:
            break
        kept.append(token)
        reached += weights[token] / whole
    norm = sum(weights[token] for token in kept)
    return [weights[token] / norm if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
        Sampling(temperature=1.5, top_k=5, top_p=0.8),
    ],
    ids=str,
)
def test_the_distribution(sampling: Sampling) -> None:
    logits = 2 * torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 3:7] = 0.5  # equally likely
    found = sampled_probabilities(logits, sampling)
    expected = [expected_probabilities(row, sampling) for row in logits.tolist()]
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-12, atol=0)


def test_it_is_what_transformers_samples_from() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    warped = logits
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.7)):
        warped = warper(None, warped)
    found = sampled_probabilities(logits, Sampling(temperature=0.8, top_k=12, top_p=0.7))
    torch.testing.assert_close(found.float(), warped.softmax(-1), rtol=1e-5, atol=1e-7)
    kept = (found > 0).sum(-1)
    assert int(kept.max()) > 1
    assert int(kept.min()) < 12


def test_temperature_0_takes_the_likeliest_and_the_first_of_several() -> None:
    found = sampled_probabilities(torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 1.0]]), Sampling(temperature=0))
    assert found.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    """Evenly spaced numbers hit each token's interval as often as it is wide, to one in the whole."""
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    numbers = torch.arange(1000, dtype=torch.float64) / 1000
    drawn = draw(probabilities.expand(1000, 4), numbers)
    counts = torch.bincount(drawn, minlength=4).tolist()
    assert counts == pytest.approx([200, 0, 500, 300], abs=1)
    assert counts[1] == 0


def test_the_largest_number_draws_no_impossible_token() -> None:
    probabilities = torch.tensor([[0.1] * 10 + [0.0] * 3]).double()
    probabilities = probabilities / probabilities.sum()
    assert draw(probabilities, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 9
    first = torch.tensor([[0.0, 1.0]]).double()
    assert draw(first, torch.zeros(1, dtype=torch.float64)).item() == 1


def test_streams_differ_by_seed_and_key() -> None:
    first = uniforms(0, [(0, 0), (0, 1), (1, 0)], 4)
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert not torch.equal(uniforms(1, [(0, 0)], 4), first[:1])
    assert torch.equal(uniforms(0, [(0, 1)], 9)[0, :4], first[1])
    many = uniforms(3, [(0, 0)], 4000)
    assert (many >= 0).all()
    assert (many < 1).all()
    assert float(many.mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1}, "temperature must be a number, 0 or above, not -1"),
        ({"temperature": math.nan}, "temperature must be a number, 0 or above, not nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
    ],
)
def test_what_is_no_sampling_is_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Sampling(**values)  # type: ignore[arg-type]
