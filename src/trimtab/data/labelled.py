"""Rows of labelled answers, as TRL's KTOTrainer wants them: ``prompt``, ``completion`` and ``label``.

``label`` is true for an answer that is desirable and false for one that is not. A pair is two such rows.
"""

from __future__ import annotations

from typing import Any

from trimtab.data.instructions import alpaca_completion, chat_completion, trl_completion
from trimtab.data.messages import Message, conversation
from trimtab.data.outcome import BadRow, Dropped, describe
from trimtab.data.pairs import Row, sharegpt_messages, with_tools

COLUMNS = ("prompt", "completion", "label")
"""The columns of a labelled answer."""


def trl_labelled(row: Row) -> Row:
    """Convert TRL's rows with ``prompt``, ``completion`` and ``label``: text, messages, or one of each."""
    return _labelled(trl_completion(_unlabelled(row)), row)


def messages_labelled(row: Row) -> Row:
    """Convert rows with ``messages`` and ``label``: the last message is what the label is about."""
    return _labelled(with_tools(_answered(conversation(row["messages"], "messages")), row), row)


def sharegpt_labelled(row: Row) -> Row:
    """Convert LLaMA-Factory's sharegpt rows with a ``kto_tag``: the last message is what it is about."""
    return _labelled(with_tools(_answered(sharegpt_messages(row)), row), row)


def alpaca_labelled(row: Row) -> Row:
    """Convert LLaMA-Factory's alpaca rows with a ``kto_tag``."""
    return _labelled(alpaca_completion(row), row)


def chat_labelled(row: Row) -> Row:
    """Convert prompt and completion that are text, as a user's and an assistant's message."""
    return _labelled(chat_completion(row), row)


def unpaired(row: Row) -> list[Row]:
    """Return a pair as its two labelled answers, and a labelled answer as it is.

    Examples:
        >>> [row["label"] for row in unpaired({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})]
        [True, False]
    """
    if "chosen" not in row:
        return [row]
    shared = {"tools": row["tools"]} if "tools" in row else {}
    return [
        {"prompt": row["prompt"], "completion": row[side], **shared, "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]


def _labelled(made: Row, row: Row) -> Row:
    column = "label" if row.get("label") is not None else "kto_tag"
    label: Any = row[column]
    if not isinstance(label, bool):
        raise BadRow(f"column {column!r} holds {describe(label)}; true (desirable) or false is needed")
    return {**made, "label": label}


def _unlabelled(row: Row) -> Row:
    """The row as instruction data, where a label of false would leave it out."""
    return {name: value for name, value in row.items() if name != "label"}


def _answered(messages: list[Message]) -> Row:
    if not messages or messages[-1]["role"] != "assistant":
        raise Dropped("empty_response")
    return {"prompt": messages[:-1], "completion": messages[-1:]}
