"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import UserError

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text, messages ``{"role", "content"}`` that end where an answer is due, or token ids."""


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids that a response follows.

    Args:
        tokenizer: the model's.
        prompt: token ids are taken as they are; a text is cut into tokens as the tokenizer does it (with the
            marks it puts around a text); messages go through the chat template, which adds the beginning of
            the answer.

    Raises:
        UserError: if there are no tokens, or messages meet a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], Mapping):
        if tokenizer.chat_template is None:
            raise UserError("a prompt of messages needs a tokenizer with a chat template; this one has none")
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = prompt
    if not len(ids):
        raise UserError(f"the prompt {prompt!r} has no tokens; a response needs at least one to follow")
    return [int(token) for token in ids]
