"""Reward and capability of a model: greedy answers to fixed questions, scored by the world's own rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import DynamicCache, PreTrainedModel

from trimtab.lab.answers import capability, reward
from trimtab.lab.documents import prompt_words
from trimtab.lab.preferences import draw_preference_task
from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import END_ID, decode, encode
from trimtab.lab.world import CAPABILITIES, Task, Words, draw_task

LONGEST_ANSWER = 24
SIZES = {"test": (180, 500), "dev": (60, 200)}
"""Capability questions per capability, and reward questions."""


@lru_cache
def capability_tasks(part: str = "test") -> tuple[Task, ...]:
    """Return the capability questions, the same for every seed: 180 (test) or 60 (dev) per capability."""
    stream = Stream("capability", part)
    return tuple(draw_task(stream, command) for command in CAPABILITIES for _ in range(SIZES[part][0]))


@lru_cache
def reward_tasks(part: str = "test") -> tuple[Task, ...]:
    """Return the reward questions, the same for every seed: 500 (test) or 200 (dev)."""
    stream = Stream("reward", part)
    return tuple(draw_preference_task(stream) for _ in range(SIZES[part][1]))


@torch.inference_mode()
def greedy_answers(model: PreTrainedModel, tasks: Sequence[Task]) -> list[Words | None]:
    """Answer the tasks greedily, at most 24 words each.

    Prompts of one length go through the model together, so nothing is padded; answers that have ended leave
    the batch.

    Returns:
        Per task the words before ``<end>``, or None where there was no end.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    prompts = [encode(prompt_words(task)) for task in tasks]
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers: list[Words | None] = [None] * len(tasks)
    for indices in by_length.values():
        written = _generate(model, torch.tensor([prompts[i] for i in indices]))
        for index, tokens in zip(indices, written.tolist(), strict=True):
            if END_ID in tokens:
                answers[index] = decode(tokens[: tokens.index(END_ID)])
    return answers


def _generate(model: PreTrainedModel, prompts_BL: torch.Tensor) -> torch.Tensor:
    written = torch.full((len(prompts_BL), LONGEST_ANSWER), -1)
    rows = torch.arange(len(prompts_BL))
    cache, tokens = DynamicCache(config=model.config), prompts_BL
    for place in range(LONGEST_ANSWER):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = output.logits[:, -1].argmax(-1)
        written[rows, place] = chosen
        going = chosen != END_ID
        if not going.any():
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero().squeeze(-1))
            rows, chosen = rows[going], chosen[going]
        tokens = chosen.unsqueeze(-1)
    return written


@dataclass(frozen=True)
class Score:
    """What was measured on one model.

    Attributes:
        reward: Mean reward, 0 to 1.
        capability: Mean share of right answers over the nine capabilities, 0 to 1.
        per_capability: The same for each.
    """

    reward: float
    capability: float
    per_capability: dict[str, float]

    def tax(self, reference: Score) -> float:
        """Return the points of capability lost against ``reference``."""
        return 100 * (reference.capability - self.capability)


def measure(model: PreTrainedModel, part: str = "test") -> Score:
    """Measure reward and capability on the fixed questions of ``part`` (about one CPU second)."""
    able, liked = capability_tasks(part), reward_tasks(part)
    training = model.training
    model.eval()
    answers = greedy_answers(model, [*able, *liked])
    model.train(training)
    right = [capability(task, answer) for task, answer in zip(able, answers[: len(able)], strict=True)]
    each = SIZES[part][0]
    per = {name: sum(right[i * each : (i + 1) * each]) / each for i, name in enumerate(CAPABILITIES)}
    rewards = [reward(task, answer) for task, answer in zip(liked, answers[len(able) :], strict=True)]
    return Score(sum(rewards) / len(rewards), sum(per.values()) / len(per), per)
