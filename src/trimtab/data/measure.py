"""How long a row is once tokenized: counted exactly as TRL's trainers tokenize it.

- Messages: the chat template renders the whole conversation (prompt and answer together, with the row's
  tools), and the tokenizer adds nothing to that.
- Text: prompt and answer are joined, the end-of-sequence token is put behind unless it is there, and the
  tokenizer adds whatever it adds to text.

TRL splits the tokens of the whole into prompt and answer, so the length of the whole is the length it
trains on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.data.outcome import BadRow, Dropped
from trimtab.errors import UserError

Row = dict[str, Any]


class Measured(NamedTuple):
    """A row's length in tokens (of a pair: of the longer side), and whether it is too long."""

    length: int
    too_long: bool


class Ruler:
    """Renders rows and counts their tokens.

    Args:
        tokenizer: the tokenizer that the trainer will be given.
        max_length: longest row in tokens, or None.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def require(self, conversational: bool, place: str) -> None:
        """Check that the tokenizer can take such rows at all.

        Raises:
            UserError: if it has no chat template for messages, or no end-of-sequence token for text.
        """
        name = getattr(self.tokenizer, "name_or_path", "") or "the model"
        if conversational and not self.tokenizer.chat_template:
            raise UserError(
                f"{place} holds messages, but the tokenizer of {name} has no chat template: take a tokenizer "
                "that has one (a model's instruct version), set tokenizer.chat_template and save it with the "
                "model, or give the data as plain text"
            )
        if not conversational and self.tokenizer.eos_token is None:
            raise UserError(
                f"{place} holds plain text, which is ended with the end-of-sequence token, but the "
                f"tokenizer of {name} has none: set tokenizer.eos_token and save it with the model"
            )

    def render(self, row: Row) -> list[str]:
        """Return the texts of a row that are tokenized: both sides of a pair, or the one there is.

        Raises:
            BadRow: if the chat template refuses the messages, or leaves a function call out.
        """
        if "chosen" in row:
            return [self._joined(row, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        if "completion" in row:
            return [self._joined(row, row["prompt"], row["completion"])]
        return [self._joined(row, None, row["messages"] if "messages" in row else row["text"])]

    def render_prompt(self, prompt: Any) -> str:
        """Return the text that an answer follows; under the chat template that is the beginning of its turn.

        Raises:
            BadRow: if the chat template refuses the messages.
        """
        if isinstance(prompt, str):
            return prompt
        return self._template(prompt, {}, add_generation_prompt=True)

    def _joined(self, row: Row, prompt: Any, answer: Any) -> str:
        whole = answer if prompt is None else prompt + answer
        if isinstance(whole, list):
            return self._template(whole, row)
        end = "" if answer.endswith(self.tokenizer.eos_token) else self.tokenizer.eos_token
        return f"{whole}{end}"

    def _template(self, messages: list[dict[str, Any]], row: Row, **options: Any) -> str:
        import jinja2

        tools = json.loads(row["tools"]) if "tools" in row else None
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise BadRow(f"the tokenizer's chat template refuses these messages: {error}") from None
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            name = call["function"]["name"]
            if name not in text:
                raise BadRow(
                    f"the function {name!r} is called, but the tokenizer's chat template leaves calls out; "
                    "train a model whose template knows tools, or take the calls out of the data"
                )
        return text

    def shows_tools(self, row: Row) -> bool:
        """Return whether the chat template shows a row's tool definitions to the model."""
        messages = row.get("messages") or row["prompt"]
        return self._template(messages, row) != self._template(messages, {})

    def count(self, texts: Sequence[str], conversational: bool) -> list[int]:
        """Return the number of tokens of each rendered text."""
        return [len(ids) for ids in self.ids(texts, conversational)]

    def measure(self, rendered: Sequence[list[str]], conversational: bool) -> list[Measured]:
        """Count the tokens of several rendered rows at once, which is much faster than one by one."""
        counts = iter(self.count([text for texts in rendered for text in texts], conversational))
        lengths = [max(next(counts) for _ in texts) for texts in rendered]
        return [
            Measured(length, self.max_length is not None and length > self.max_length) for length in lengths
        ]

    def check_cut(self, row: Row, rendered: list[str], conversational: bool) -> None:
        """Check that a row still teaches something once TRL has cut its end off.

        Raises:
            Dropped: ``prompt_fills``, if the prompt alone reaches ``max_length``; TRL would drop the row
                unsaid. ``identical_cut``, if what is left of a pair's answers is the same.
        """
        if self.max_length is None or "prompt" not in row:
            return
        alone = row["prompt"]
        if conversational:
            alone = self._template(alone, row, add_generation_prompt=True)
        prompt, *wholes = self.ids([alone, *rendered], conversational)
        if min(_shared(prompt, whole) for whole in wholes) >= self.max_length:
            raise Dropped("prompt_fills")
        if len({tuple(whole[: self.max_length]) for whole in wholes}) < len(wholes):
            raise Dropped("identical_cut")

    def ids(self, texts: Sequence[str], conversational: bool) -> list[list[int]]:
        """Return the tokens of rendered texts."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=not conversational, verbose=False
        )["input_ids"]
        return ids


def _shared(first: list[int], second: list[int]) -> int:
    """Return how many tokens two sequences start with in common."""
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    return shared
