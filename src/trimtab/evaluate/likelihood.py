"""Log-probabilities of given answers: what a model thinks of a text it did not write.

Shapes: R rows in a batch, L tokens (padded on the right), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer, and where the answer starts."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Scored:
    """log π(answer | prompt), summed over the answer's tokens (nats), and their number."""

    logp: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Length-normalised log-probability, nats per token."""
        return self.logp / self.tokens


def encode(tokenizer: Any, prompt: Messages, answer: Messages) -> Encoded:
    """Turn a conversation and its answer into token ids under the tokenizer's chat template.

    The answer is what the template writes after the generation prompt, its end-of-turn mark included; this is
    how TRL cuts it in training, so that the same tokens are measured as were trained.

    Raises:
        ValueError: when the templated prompt is not a prefix of the templated whole, or nothing follows it.
    """
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(prompt + answer, tokenize=True, return_dict=False)
    if whole[: len(head)] != head or len(whole) == len(head):
        raise ValueError(f"the chat template does not write the answer after the prompt: {answer!r}")
    return Encoded(tuple(whole), len(head))


@torch.inference_mode()
def score(
    model: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Compute log π(answer | prompt) = Σ_t log softmax(logits_{t−1})[token_t] over the answer's tokens.

    Rows are batched by length (less padding) and returned in the order given. Softmax is taken in fp32
    whatever the model's dtype; bf16 weights or autocast still move a sum by tenths of a nat, so load the
    model in fp32 to compare.

    Args:
        model: a causal language model; it is put into eval mode.
        rows: prompt and answer as token ids.
        batch_size: rows in one forward pass.
        progress: called with the number of rows just finished.

    Returns:
        One ``Scored`` per row.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    scored: dict[int, Scored] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for index, logp in zip(batch, _answer_logps(model, [rows[i] for i in batch]), strict=True):
            scored[index] = Scored(logp, len(rows[index].ids) - rows[index].start)
        if progress is not None:
            progress(len(batch))
    return [scored[index] for index in range(len(rows))]


def _answer_logps(model: Any, rows: Sequence[Encoded]) -> list[float]:
    """Summed log-probability of each row's answer, in one forward pass."""
    longest = max(len(row.ids) for row in rows)
    ids_RL = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_RL = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids_RL[place, : len(row.ids)] = torch.tensor(row.ids)
        mask_RL[place, : len(row.ids)] = 1
    ids_RL, mask_RL = ids_RL.to(model.device), mask_RL.to(model.device)
    logits_RLV = model(input_ids=ids_RL, attention_mask=mask_RL, use_cache=False).logits
    sums = []
    # Row by row: a log-softmax over the whole batch would hold a second R·L·V tensor.
    for place, row in enumerate(rows):
        logits_LV = logits_RLV[place, row.start - 1 : len(row.ids) - 1].float()
        targets_L = ids_RL[place, row.start : len(row.ids)]
        logps_L = logits_LV.gather(-1, targets_L[:, None]).squeeze(-1) - logits_LV.logsumexp(-1)
        sums.append(float(logps_L.double().sum()))
    return sums
