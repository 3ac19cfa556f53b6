"""What a reward is: anything that gives a number to a response."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.errors import UserError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
"""A text, or messages ``{"role", "content"}`` that end where an answer is due."""

Rows = Sequence[Mapping[str, Any]]
"""What the data says about each prompt besides (a known answer, tests): rules may look at it."""


class Reward(Protocol):
    """Scores responses; higher is better. What a method maximises, and what ranks responses."""

    @property
    def name(self) -> str:
        """What it is called in logs and errors."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: Rows | None = None
    ) -> list[float]:
        """Score responses.

        Args:
            prompts: N of them; a prompt with several responses stands here once for each.
            responses: N texts.
            rows: the row of the data that each prompt is from, N of them; None where there are none.

        Returns:
            N finite numbers.

        Raises:
            UserError: if a score is not finite, naming the prompt.
        """


@dataclass(frozen=True)
class WeightedSum:
    """Σ_i w_i · r_i of several rewards; itself a reward.

    Args:
        parts: the rewards r_i; their names differ.
        weights: w_i, one for each.

    Examples:
        >>> class Length:
        ...     name = "length"
        ...     def __call__(self, prompts, responses, rows=None): return [float(len(r)) for r in responses]
        >>> WeightedSum((Length(),), (-0.5,))(["hi"], ["good day"])
        [-4.0]
    """

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """Its parts with their weights."""
        terms = zip(self.weights, self.parts, strict=True)
        return " + ".join(part.name if weight == 1 else f"{weight:g} {part.name}" for weight, part in terms)

    @property
    def truncated(self) -> int:
        """How many inputs were too long for a part so far."""
        return sum(getattr(part, "truncated", 0) for part in self.parts)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: Rows | None = None
    ) -> list[float]:
        """Score responses by all parts and add the scores up."""
        return self.total(self.by_part(prompts, responses, rows))

    def by_part(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: Rows | None = None
    ) -> dict[str, list[float]]:
        """Return each part's scores, without its weight, under its name: their means are worth a log."""
        return {part.name: part(prompts, responses, rows) for part in self.parts}

    def total(self, by_part: Mapping[str, Sequence[float]]) -> list[float]:
        """Return the weighted sum of what :meth:`by_part` gave."""
        columns = [by_part[part.name] for part in self.parts]
        return [
            sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
            for scores in zip(*columns, strict=True)
        ]


def checked_scores(
    name: str, prompts: Sequence[Prompt], responses: Sequence[str], scores: Sequence[Any]
) -> list[float]:
    """Return scores as finite floats, one for each response.

    Raises:
        UserError: if there are more or fewer than responses, or one is no finite number; names the prompt.
    """
    if len(scores) != len(responses):
        raise UserError(
            f"{name} gives {len(scores)} scores to {len(responses)} responses; one each is needed"
        )
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        if not _is_finite(score):
            raise UserError(
                f"{name} gives the score {score!r} to the response {shown(response)} to the prompt "
                f"{shown(prompt)}; every score must be a finite number"
            )
    return [float(score) for score in scores]


def _is_finite(score: Any) -> bool:
    if isinstance(score, str | bytes):
        return False
    try:
        return math.isfinite(score)
    except (TypeError, ValueError, OverflowError):
        return False


def shown(what: Prompt) -> str:
    """Return a prompt or a response as a sentence quotes it: its last words where it is long.

    Examples:
        >>> shown([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}])
        "'hi'"
    """
    text = what if isinstance(what, str) else str(what[-1].get("content") if what else "")
    return repr(text if len(text) <= 60 else f"…{text[-57:]}")


def prompt_key(prompt: Prompt) -> str:
    """Return a text that is the same for equal prompts, and differs for a text and messages.

    Examples:
        >>> prompt_key("hi") == prompt_key([{"role": "user", "content": "hi"}])
        False
    """
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)
