"""GRPO's and RLOO's losses, spelled out over float64 log-probabilities of single tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

Sampled = tuple[list[float], list[float], list[float]]
"""A response's tokens' log-probabilities: under the policy, the policy it was drawn from, the reference."""


@dataclass
class Tempered:
    """A model whose logits are divided by a temperature, for ``losses.log_probabilities``."""

    model: Any
    temperature: float

    def double(self) -> Tempered:
        """The model in float64."""
        self.model.double()
        return self

    def __call__(self, ids: Any) -> SimpleNamespace:
        """Its logits."""
        return SimpleNamespace(logits=self.model(ids).logits / self.temperature)


def grpo_advantages(rewards: list[list[float]], scale: str) -> list[list[float]]:
    """Advantages within groups, section 4.1.2 of arXiv 2402.03300; deviations are TRL's: n - 1, plus 1e-4."""
    everything = [value for group in rewards for value in group]
    result = []
    for group in rewards:
        mean = sum(group) / len(group)
        spread = {"group": _deviation(group), "batch": _deviation(everything), "none": 1 - 1e-4}[scale]
        result.append([(value - mean) / (spread + 1e-4) for value in group])
    return result


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def grpo(
    responses: list[Sampled],
    advantages: list[float],
    *,
    beta: float,
    epsilon: float,
    kind: str = "grpo",
    longest: int = 0,
) -> tuple[float, float]:
    """GRPO, Eq. 3 and 4 of arXiv 2402.03300, and the share of tokens whose ratio was clipped.

    ``kind`` is what sums over tokens are divided by: each response's length, all tokens (dapo, bnpo), or
    ``longest`` a response (dr_grpo).
    """
    total, tokens, clipped = 0.0, 0, 0
    for (policy, old, reference), advantage in zip(responses, advantages, strict=True):
        one = 0.0
        for ours, before, theirs in zip(policy, old, reference, strict=True):
            ratio = math.exp(ours - before)
            inside = min(max(ratio, 1 - epsilon), 1 + epsilon)
            divergence = math.exp(theirs - ours) - (theirs - ours) - 1
            one += min(ratio * advantage, inside * advantage) - beta * divergence
            clipped += ratio * advantage > inside * advantage
        total += one / len(policy) if kind == "grpo" else one
        tokens += len(policy)
    divisor = {"grpo": len(responses), "dr_grpo": len(responses) * longest}.get(kind, tokens)
    return -total / divisor, clipped / tokens


def rloo(
    groups: list[list[tuple[Sampled, float]]], *, beta: float, epsilon: float, normalized: bool = False
) -> tuple[float, float]:
    """RLOO, arXiv 2402.14740, on TRL's clipped ratio of responses, and the share that was clipped."""
    advantages, ratios = [], []
    for group in groups:
        returns = [
            reward - beta * sum(before - theirs for before, theirs in zip(old, reference, strict=True))
            for (_, old, reference), reward in group
        ]
        for place, value in enumerate(returns):
            others = returns[:place] + returns[place + 1 :]
            advantages.append(value - sum(others) / len(others))
        ratios += [math.exp(sum(policy) - sum(old)) for (policy, old, _), _ in group]
    if normalized:
        mean, spread = sum(advantages) / len(advantages), _deviation(advantages)
        advantages = [(value - mean) / (spread + 1e-4) for value in advantages]
    total, clipped = 0.0, 0
    for ratio, advantage in zip(ratios, advantages, strict=True):
        inside = min(max(ratio, 1 - epsilon), 1 + epsilon)
        total += min(ratio * advantage, inside * advantage)
        clipped += ratio * advantage > inside * advantage
    return -total / len(ratios), clipped / len(ratios)
