"""What can become of a row: it is used, it is dropped for a reason that is counted, or it stops the run."""

from __future__ import annotations

from typing import Any

REASONS = {
    "overlong": "longer than max_length",
    "no_room": "prompt longer than max_length less max_new_tokens",
    "prompt_fills": "prompt alone fills max_length",
    "null": "a column that is needed is null",
    "empty_prompt": "empty prompt",
    "empty_response": "empty response",
    "no_question": "prompt does not end with the user's turn",
    "identical": "chosen and rejected are the same",
    "identical_cut": "chosen and rejected are the same within max_length",
    "prompts_differ": "chosen and rejected differ before the last answer",
    "tie": "all scores are equal",
    "single_response": "fewer than two responses",
    "few_left": "fewer than two responses left of those that differ, fit and are not empty",
    "repeated": "the same response to the same prompt is there before it",
    "labelled_bad": "labelled as undesirable",
    "malformed": "not a Human / Assistant transcript",
    "broken_unicode": "not valid Unicode (a lone surrogate)",
}
"""Why a row can be dropped, and how the report says it; reports list reasons in this order."""


class Dropped(Exception):
    """A row that is well-formed but cannot be trained on; it is left out and counted under ``reason``.

    Args:
        reason: a key of :data:`REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


class BadRow(ValueError):
    """A row that is not what its format says; it becomes a ``UserError`` that names the place."""


def describe(value: Any) -> str:
    """Return what a value is, in a user's words and short enough for a sentence.

    Examples:
        >>> describe(3), describe(None), describe({"a": 1}), describe([1, 2])
        ('the number 3', 'null', "an object with 'a'", 'a list of numbers')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:37] + '...'!r}"
    if isinstance(value, dict):
        return f"an object with {quoted(value)}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {_kinds(value[0])}" if value else "an empty list"
    return f"a value of type {type(value).__name__}"


def _kinds(value: Any) -> str:
    if isinstance(value, bool):
        return "true and false"
    if isinstance(value, int | float):
        return "numbers"
    plural = {str: "texts", dict: "objects", list: "lists", type(None): "nulls"}
    return plural.get(type(value), f"{type(value).__name__} values")


def quoted(names: Any) -> str:
    """Return names as a user reads them.

    Examples:
        >>> quoted(["prompt", "chosen"])
        "'prompt', 'chosen'"
    """
    return ", ".join(repr(name) for name in names)
