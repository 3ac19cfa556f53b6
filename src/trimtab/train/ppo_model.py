"""A policy with a value head, read token by token.

Shapes: B responses, L length of a sequence, T tokens of the longest response, N response tokens, V
vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.losses import selective_log_softmax

Batch = dict[str, torch.Tensor]


class ValueHead(torch.nn.Linear):
    """V of the states before tokens: linear in the hidden state, in the head's own precision.

    It starts at 0, which draws no random number and leaves the layers below alone until it has learned.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Start at 0."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values, shape (…), of hidden states, shape (…, D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


def add_value_head(model: Any) -> None:
    """Give a causal language model (or PEFT's wrapper of one) a ``value_head``, trained with the rest.

    Raises:
        UserError: if it has no output embedding.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise UserError(f"{type(model).__name__} has no output embedding, so it can give no answers")
    model.value_head = ValueHead(output.weight.shape[1])


@contextmanager
def without_value_head(model: Any) -> Iterator[torch.nn.Module]:
    """The model as it was, to be saved or loaded; yields the head that is put back."""
    head = model.value_head
    del model.value_head
    try:
        yield head
    finally:
        model.value_head = head


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Make dropout do nothing, so that a response has one probability; the configuration stays."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def sequences(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], padding: int) -> Batch:
    """Prompts with responses as a batch that a model reads.

    Args:
        pairs: token ids of a prompt and of a response, each at least one.
        padding: what shorter ones are filled up with on the right.

    Returns:
        ``input_ids`` (B, L), ``starts`` (where responses start, B) and ``response_mask`` (B, T). There is no
        mask of the padding, which stands behind all that a causal model makes of a row.

    Examples:
        >>> batch = sequences([([5, 6], [7]), ([5], [8, 9])], padding=0)
        >>> batch["input_ids"].tolist(), batch["starts"].tolist(), batch["response_mask"].int().tolist()
        ([[5, 6, 7], [5, 8, 9]], [2, 1], [[1, 0], [1, 1]])
    """
    rows = [[*prompt, *response] for prompt, response in pairs]
    length, longest = max(map(len, rows)), max(len(response) for _, response in pairs)
    answers_B = torch.tensor([len(response) for _, response in pairs])
    return {
        "input_ids": torch.tensor([row + [padding] * (length - len(row)) for row in rows]),
        "starts": torch.tensor([len(prompt) for prompt, _ in pairs]),
        "response_mask": torch.arange(longest) < answers_B[:, None],
    }


def read_tokens(
    model: Any, batch: Batch, *, head: ValueHead, temperature: float = 1.0, through: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a model makes of the response tokens of a batch, response after response.

    Args:
        model: a causal language model.
        batch: of :func:`sequences`, on the model's device.
        head: gives values from the hidden states that the output embedding reads.
        temperature: what logits are divided by.
        through: the wrapper to call the model through, such as DDP's; the model itself when None.

    Returns:
        log π of each token (N,), V before it (N,), and the logits it was drawn from (N, V).
    """
    ids_BL, starts_B = batch["input_ids"], batch["starts"]
    rows_N, places_N = batch["response_mask"].nonzero(as_tuple=True)
    predictors_N = starts_B[rows_N] + places_N - 1
    targets_N = ids_BL[rows_N, predictors_N + 1]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's wrapper
    skipped, only = 0, {}
    if "logits_to_keep" in signature(type(inner).forward).parameters:
        skipped = int(starts_B.min()) - 1
        only = {"logits_to_keep": ids_BL.shape[1] - skipped}
    with _read_by(model.get_output_embeddings()) as seen:
        caller = model if through is None else through
        seen_BL = torch.ones_like(ids_BL)
        logits_BLV = caller(input_ids=ids_BL, attention_mask=seen_BL, use_cache=False, **only).logits
    logits_NV = logits_BLV[rows_N, predictors_N - skipped] / temperature
    values_N = head(seen[0][rows_N, predictors_N - skipped])
    return selective_log_softmax(logits_NV, targets_N), values_N, logits_NV


@contextmanager
def _read_by(output: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep the hidden states that the output embedding reads."""
    seen: list[torch.Tensor] = []
    handle = output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
