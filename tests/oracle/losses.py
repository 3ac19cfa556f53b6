"""The losses of preference training, spelled out over float64 log-probabilities of single tokens.

Each answer is the list of its tokens' log-probabilities, under the policy and under the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Answer = tuple[list[float], list[float]]
"""One answer: its tokens' log-probabilities under the policy, and under the reference."""


def dpo(chosen: Answer, rejected: Answer, beta: float) -> float:
    """DPO, Eq. 7 of arXiv 2305.18290, for one pair."""
    margin = beta * (_summed(chosen) - _summed(rejected))
    return math.log(1 + math.exp(-margin))


def ipo(chosen: Answer, rejected: Answer, beta: float, *, per_token: bool = True) -> float:
    """IPO, Eq. 17 of arXiv 2310.12036; ``per_token`` is TRL's mean over tokens instead of the sum."""
    ratios = []
    for policy, reference in (chosen, rejected):
        total = 0.0
        for ours, theirs in zip(policy, reference, strict=True):
            total += ours - theirs
        ratios.append(total / len(policy) if per_token else total)
    return (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2


def kto(
    answers: list[tuple[Answer, bool]],
    mismatched: list[Answer],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[float, float]:
    """KTO, arXiv 2402.01306, and the reference point z (the KL term) it was computed with."""
    reference_point = max(0.0, sum(_summed(one) for one in mismatched) / len(mismatched))
    total = 0.0
    for one, desirable in answers:
        above = beta * (_summed(one) - reference_point)
        value = 1 / (1 + math.exp(-above if desirable else above))
        total += (desirable_weight if desirable else undesirable_weight) * (1 - value)
    return total / len(answers), reference_point


def reward(chosen: list[float], rejected: list[float], center: float = 0.0) -> float:
    """Bradley and Terry's loss of the scores of pairs, and what keeps them around 0."""
    total = 0.0
    for higher, lower in zip(chosen, rejected, strict=True):
        total += math.log(1 + math.exp(lower - higher)) + center * (higher + lower) ** 2
    return total / len(chosen)


def _summed(one: Answer) -> float:
    return sum(ours - theirs for ours, theirs in zip(*one, strict=True))


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """The tokens' log-probabilities in float64: one row, no padding, all logits."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + answer])).logits[0]
    result = []
    for place, token in enumerate(answer, start=len(prompt) - 1):
        row = logits[place].tolist()
        top = max(row)
        result.append(row[token] - top - math.log(sum(math.exp(value - top) for value in row)))
    return result


def answer(policy: Any, reference: Any, prompt: list[int], tokens: list[int]) -> Answer:
    """One answer to one prompt, under both models."""
    return log_probabilities(policy, prompt, tokens), log_probabilities(reference, prompt, tokens)
