"""PPO's functions against sums over single tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracle import ppo as oracle
from trimtab.losses import ppo

LENGTHS = (4, 1, 6, 3)


def table(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Numbers for every place, those behind the ends included: they must not count."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(LENGTHS), max(LENGTHS), dtype=torch.float64, generator=generator)


MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def ragged(values: torch.Tensor) -> list[list[float]]:
    return [row[:length].tolist() for row, length in zip(values, LENGTHS, strict=True)]


def assert_ragged(found: torch.Tensor, expected: list[list[float]]) -> None:
    assert torch.all(found[~MASK] == 0), "behind the end there is nothing"
    for ours, theirs in zip(ragged(found), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-14)


def test_a_token_s_reward_is_its_penalty_and_the_last_has_the_score() -> None:
    logps, reference, scores = table(0), table(1), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    found = ppo.token_rewards(scores, logps, reference, MASK, 0.3)
    rows = zip(scores.tolist(), ragged(logps), ragged(reference), strict=True)
    assert_ragged(found, [oracle.rewards(*row, beta=0.3) for row in rows])


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_advantages(discount: float, trace: float) -> None:
    rewards, values = table(2), table(3)
    found, returns = ppo.generalized_advantages(rewards, values, MASK, discount=discount, trace=trace)
    expected = [
        oracle.advantages(*row, discount, trace) for row in zip(ragged(rewards), ragged(values), strict=True)
    ]
    assert_ragged(found, [one for one, _ in expected])
    assert_ragged(returns, [one for _, one in expected])


def test_a_trace_of_1_is_what_is_still_to_come() -> None:
    rewards, values = table(4), table(5)
    _, returns = ppo.generalized_advantages(rewards, values, MASK, trace=1.0)
    assert_ragged(returns, [[sum(row[t:]) for t in range(len(row))] for row in ragged(rewards)])


def test_advantages_carry_no_gradient() -> None:
    values = table(3).requires_grad_()
    advantages, returns = ppo.generalized_advantages(table(2), values, MASK)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_whitening() -> None:
    values = table(6, scale=5.0) + 3
    assert_ragged(ppo.whitened(values, MASK), oracle.whiten(ragged(values)))
    assert torch.all(ppo.whitened(torch.full_like(values, 2.5), MASK) == 0)


def test_whitening_over_two_processes_is_that_of_one() -> None:
    """``total`` adds up what the other process has: here, by computing its sums beside ours."""
    values, whole = table(6) + 3, ppo.whitened(table(6) + 3, MASK)
    other = iter([torch.tensor(float(MASK[2:].sum())), values[2:][MASK[2:]].sum(), None])
    mean = values[MASK].mean()

    def total(ours: torch.Tensor) -> torch.Tensor:
        theirs = next(other)
        return ours + (((values[2:][MASK[2:]] - mean) ** 2).sum() if theirs is None else theirs)

    found = ppo.whitened(values[:2], MASK[:2], total)
    torch.testing.assert_close(found, whole[:2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_the_clipped_surrogate(clip: float) -> None:
    old, advantages = table(7, 0.3), table(9)
    logps = (old + table(8, 0.6)).requires_grad_()
    found = ppo.clipped_surrogate(logps, old, advantages, clip)
    rows = list(
        zip(logps.flatten().tolist(), old.flatten().tolist(), advantages.flatten().tolist(), strict=True)
    )
    expected = [oracle.policy_loss(*row, clip) for row in rows]
    assert found.loss.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    ratios = [math.exp(new - was) for new, was, _ in rows]
    assert found.ratio.flatten().tolist() == pytest.approx(ratios, rel=1e-12)
    outside = [
        (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
        for ratio, (_, _, a) in zip(ratios, rows, strict=True)
    ]
    assert 0 < sum(outside) < len(outside)
    assert found.clipped.flatten().bool().tolist() == outside
    (slope,) = torch.autograd.grad(found.loss.sum(), logps)
    free = [0.0 if held else -a * ratio for held, ratio, (_, _, a) in zip(outside, ratios, rows, strict=True)]
    assert slope.flatten().tolist() == pytest.approx(free, rel=1e-12)
    half = [0.5 * (new - was) ** 2 for new, was, _ in rows]
    assert found.approximate_kl.flatten().tolist() == pytest.approx(half, rel=1e-12)


def test_the_clipped_value_loss() -> None:
    old, returns = table(10), table(12)
    values = (old + table(11, 0.4)).requires_grad_()
    found = ppo.clipped_value_loss(values, old, returns, 0.2)
    rows = list(zip(*(one.flatten().tolist() for one in (values, old, returns)), strict=True))
    assert found.loss.flatten().tolist() == pytest.approx(
        [oracle.value_loss(*row, 0.2) for row in rows], rel=1e-12
    )
    (slope,) = torch.autograd.grad(found.loss.sum(), values)
    expected = []
    for value, was, target in rows:
        held = was + min(max(value - was, -0.2), 0.2)
        worse = (held - target) ** 2 > (value - target) ** 2
        expected.append(0.0 if worse else value - target)
    assert 0 < found.clipped.sum() < found.clipped.numel()
    assert (slope.flatten() == 0).tolist() == found.clipped.flatten().bool().tolist()
    assert slope.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_entropy() -> None:
    logits = table(13, 3.0)
    expected = [oracle.entropy(row) for row in logits.tolist()]
    assert ppo.entropy(logits).tolist() == pytest.approx(expected, rel=1e-12)
    assert ppo.entropy(torch.tensor([0.0, -torch.inf])) == 0
    assert ppo.entropy(logits.bfloat16()).dtype == torch.float32


def test_explained_variance() -> None:
    values, returns = table(14), table(15)
    flat = [[x for row in ragged(one) for x in row] for one in (values, returns)]
    found = ppo.explained_variance(values, returns, MASK)
    assert float(found) == pytest.approx(oracle.explained_variance(*flat), rel=1e-12)
    assert ppo.explained_variance(returns, returns, MASK) == 1
    assert torch.isnan(ppo.explained_variance(values, torch.ones_like(values), MASK))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.5), (6.6, 0.5 * 1.01), (60.0, 0.5 * 1.02), (0.0, 0.5 * 0.98), (-3.0, 0.5 * 0.98)],
)
def test_the_penalty_follows_its_target(kl: float, expected: float) -> None:
    assert ppo.adapted_kl_coefficient(0.5, kl, 6.0) == pytest.approx(expected, rel=1e-12)
