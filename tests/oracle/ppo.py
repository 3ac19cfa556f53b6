"""PPO on a language model, spelled out in float64: one response, one token, one process at a time.

Written from arXiv 1707.06347 (Eq. 7, 11, 12), 1909.08593 (section 2) and 1506.02438, not from our source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def rewards(score: float, logps: list[float], reference_logps: list[float], beta: float) -> list[float]:
    """The tokens' rewards of one response."""
    found = [-beta * (ours - theirs) for ours, theirs in zip(logps, reference_logps, strict=True)]
    found[-1] += score
    return found


def advantages(
    rewards: list[float], values: list[float], discount: float, trace: float
) -> tuple[list[float], list[float]]:
    """A_t = Σ_l (γλ)^l δ_{t+l} by the sum itself, and A_t + V_t, of one response."""
    known = [*values, 0.0]
    errors = [reward + discount * known[t + 1] - known[t] for t, reward in enumerate(rewards)]
    found = [
        sum((discount * trace) ** (later - t) * errors[later] for later in range(t, len(errors)))
        for t in range(len(errors))
    ]
    return found, [advantage + value for advantage, value in zip(found, values, strict=True)]


def whiten(responses: list[list[float]]) -> list[list[float]]:
    """Mean 0 and variance 1 over the tokens of all responses."""
    every = np.array([value for response in responses for value in response], dtype=np.float64)
    spread = math.sqrt(every.var() + 1e-8)
    return [[(value - every.mean()) / spread for value in response] for response in responses]


def policy_loss(logp: float, old_logp: float, advantage: float, clip: float) -> float:
    """−L^CLIP of one token."""
    ratio = math.exp(logp - old_logp)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def value_loss(value: float, old_value: float, target: float, clip: float) -> float:
    """Half the larger of the two squared errors of one token."""
    held = old_value + min(max(value - old_value, -clip), clip)
    return 0.5 * max((value - target) ** 2, (held - target) ** 2)


def entropy(logits: list[float]) -> float:
    """−Σ p log p of one distribution."""
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    shares = [weight / sum(weights) for weight in weights]
    return -sum(share * math.log(share) for share in shares if share > 0)


def explained_variance(values: list[float], returns: list[float]) -> float:
    """1 − Var(G − V) / Var(G)."""
    found = np.array(returns, dtype=np.float64)
    return float(1 - (found - np.array(values, dtype=np.float64)).var() / found.var())


@dataclass(frozen=True)
class Episode:
    """One response to one prompt, as sampled and scored; numbers are float64."""

    prompt: list[int]
    response: list[int]
    score: float


def token_terms(model: Any, head: Any, episode: Episode, temperature: float) -> tuple[Any, Any]:
    """log π_T(y_t) and V_t of one response, as float64 tensors with gradients; one row, no padding."""
    ids = torch.tensor([episode.prompt + episode.response])
    output = model(ids, output_hidden_states=True)
    before = slice(len(episode.prompt) - 1, ids.shape[1] - 1)
    logits = output.logits[0, before] / temperature
    logps = torch.log(torch.softmax(logits, -1))
    chosen = torch.stack([logps[t, token] for t, token in enumerate(episode.response)])
    weight, bias = head
    return chosen, output.hidden_states[-1][0, before] @ weight + bias


def step(
    policy: Any,
    head: Any,
    old: list[tuple[list[float], list[float]]],
    reference: Any,
    episodes: list[Episode],
    *,
    beta: float,
    clip: float,
    value_clip: float,
    value_coefficient: float,
    discount: float,
    trace: float,
    temperature: float,
) -> Any:
    """The loss of one minibatch that is the whole rollout, differentiable, from single tokens.

    ``old`` holds, for each episode, the log-probabilities and values when it was sampled.
    """
    found = []
    for episode, (logps, values) in zip(episodes, old, strict=True):
        with torch.no_grad():
            theirs, _ = token_terms(reference, head, episode, temperature)
        found.append(
            advantages(rewards(episode.score, logps, theirs.tolist(), beta), values, discount, trace)
        )
    white = whiten([one for one, _ in found])
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index, episode in enumerate(episodes):
        logps, values = token_terms(policy, head, episode, temperature)
        for t in range(len(episode.response)):
            ratio = torch.exp(logps[t] - old[index][0][t])
            advantage = white[index][t]
            if (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip):
                ratio = torch.tensor(1 + clip if advantage > 0 else 1 - clip, dtype=torch.float64)
            total = total - ratio * advantage
            was, target = old[index][1][t], found[index][1][t]
            error = (values[t] - target) ** 2
            if abs(values[t].item() - was) > value_clip:
                held = was + math.copysign(value_clip, values[t].item() - was)
                if (held - target) ** 2 > error.item():
                    error = torch.tensor((held - target) ** 2, dtype=torch.float64)
            total = total + value_coefficient * 0.5 * error
            tokens += 1
    return total / tokens
