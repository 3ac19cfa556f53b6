"""A language model as the judge that RRHF makes of it: by its length-normalized log-probability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.losses import length_normalized
from trimtab.rewards.accuracy import pairwise_accuracy
from trimtab.rewards.model import longest_input
from trimtab.rewards.ranked_batches import (
    Layout,
    RRHFCollator,
    check_shared_prefix,
    encode_ranked,
    in_eval_mode,
    padding_token,
    plain_head,
    response_log_probabilities,
)
from trimtab.rewards.reward import Prompt, Rows, checked_scores, prompt_key, shown


class RRHFScorer:
    """A model as a reward model, by its length-normalized log-probability.

    RRHF trains p = Σ_t log P(y_t) / ‖y‖^γ to follow the scores, so p can be used in their place
    (arXiv 2304.05302, section 4.4 compares its accuracy with a reward model's).

    Where prompt and response exceed the model's positions, the prompt loses its oldest tokens; a response
    that fills them alone loses its end.

    Args:
        model: a causal language model; it is put into eval mode while it scores.
        tokenizer: its tokenizer.
        length_exponent: γ, as in training.
        layout: how prompts are laid out; ``repeated`` works with every model.
        batch_size: prompts at once.
        name: what it is called as a reward.

    Attributes:
        truncated: how many responses did not fit behind their prompt so far.

    Raises:
        UserError: if the model cannot read a shared prefix.

    Examples:
        >>> RRHFScorer(model, tokenizer).score([("2 + 2 =", ["4", "5"])])  # doctest: +SKIP
        [[-0.3, -4.1]]
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        length_exponent: float = 1.0,
        *,
        layout: Layout = "shared_prefix",
        batch_size: int = 8,
        name: str = "likelihood",
    ) -> None:
        if layout == "shared_prefix":
            check_shared_prefix(model)
        self.model, self.tokenizer, self.length_exponent = model, tokenizer, length_exponent
        self.batch_size, self.name = batch_size, name
        self.max_length = longest_input(model, tokenizer)
        self.truncated = 0
        self._collator = RRHFCollator(padding_token(tokenizer), layout)
        self._head = plain_head(model)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: Rows | None = None
    ) -> list[float]:
        """Score responses as a :class:`~trimtab.rewards.Reward`; equal prompts are read once.

        Raises:
            UserError: as :meth:`score`, and if a score is not finite.
        """
        places: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            places.setdefault(prompt_key(prompt), []).append(index)
        groups = list(places.values())
        found = self.score([(prompts[group[0]], [responses[i] for i in group]) for group in groups])
        scores = [0.0] * len(responses)
        for group, values in zip(groups, found, strict=True):
            for index, value in zip(group, values, strict=True):
                scores[index] = value
        return checked_scores(self.name, prompts, responses, scores)

    def score(self, rows: Sequence[tuple[Any, Sequence[Any]]]) -> list[list[float]]:
        """Score responses.

        Args:
            rows: a prompt (a text or messages) and responses to it.

        Returns:
            p of each response, in nats per token for γ = 1, in the order given.

        Raises:
            UserError: for a prompt without responses, or one or the other without tokens.
        """
        parts = [
            (part, place, places)
            for place, (prompt, responses) in enumerate(rows)
            for part, places in self._parts(self._encoded(prompt, responses))
        ]
        parts.sort(key=lambda part: _size(part[0]))
        found = [[0.0] * len(responses) for _, responses in rows]
        with in_eval_mode(self.model):
            for first in range(0, len(parts), self.batch_size):
                batch = parts[first : first + self.batch_size]
                scored = self._score([part for part, _, _ in batch])
                for (_, place, places), values in zip(batch, scored, strict=True):
                    for index, value in zip(places, values, strict=True):
                        found[place][index] = value
        return found

    def _encoded(self, prompt: Prompt, responses: Sequence[Any]) -> dict[str, Any]:
        try:
            return encode_ranked(self.tokenizer, prompt, responses)
        except UserError as error:
            raise UserError(f"{self.name}, on the prompt {shown(prompt)}: {error}") from error

    def _parts(self, row: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """The responses that fit behind the prompt, together; each other one behind what fits of it."""
        limit, prompt, responses = self.max_length, row["prompt_ids"], row["response_ids"]
        fits = [limit is None or len(prompt) + len(ids) <= limit for ids in responses]
        together = [place for place, whole in enumerate(fits) if whole]
        if together or not responses:  # no responses at all are for the collator to refuse
            yield {"prompt_ids": prompt, "response_ids": [responses[i] for i in together]}, together
        for place, ids in enumerate(responses):
            if limit is not None and not fits[place]:
                self.truncated += 1
                kept = max(1, limit - len(ids))
                yield {"prompt_ids": prompt[-kept:], "response_ids": [ids[: limit - kept]]}, [place]

    @torch.no_grad()
    def _score(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        batch = self._collator([{**row, "scores": [0.0] * len(row["response_ids"])} for row in rows])
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        logps_R = response_log_probabilities(self.model, batch, head=self._head)
        values_R = length_normalized(logps_R, batch["lengths"], self.length_exponent)
        groups = torch.split(values_R, batch["group_sizes"].tolist())
        return [group.tolist() for group in groups]

    def accuracy(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """How often the chosen response scores higher than the rejected one; equal scores count as wrong.

        Args:
            pairs: held-out ``{"prompt", "chosen", "rejected"}``; texts, or messages. Give one pair a prompt:
                the interval takes them as independent.

        Returns:
            What :func:`~trimtab.rewards.pairwise_accuracy` gives.

        Raises:
            UserError: without pairs.
        """
        if not pairs:
            raise UserError("pairwise accuracy needs at least one held-out pair; got none")
        scores = self.score([(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs])
        return pairwise_accuracy([(chosen, rejected) for chosen, rejected in scores])


def _size(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + sum(map(len, row["response_ids"]))
