"""Rules that score responses, as a user would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def letters(prompts: Any, responses: Sequence[str], rows: Any) -> list[float]:
    """How many letters a response has."""
    return [float(sum(character.isalpha() for character in text)) for text in responses]


def shared(prompts: Any, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How many different letters of the row's word a response has."""
    return [float(len(set(row["word"]) & set(text))) for row, text in zip(rows, responses, strict=True)]
