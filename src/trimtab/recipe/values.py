"""The types a recipe's values have: ``beta: "yes"`` is refused, ``lr: 1e-6`` is a number.

YAML 1.1, which PyYAML speaks, reads ``1e-6`` as text (a float needs a dot there: ``1.0e-6``), and ``yes`` as
a boolean. Numbers written as text are therefore read as numbers, and booleans never count as numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError


def as_number(value: Any) -> float:
    """Return ``value`` as a finite float; text that spells a number counts, a boolean does not.

    Examples:
        >>> as_number("1e-6")
        1e-06
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _refused("must be a number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused("must be a number", value)
    if not math.isfinite(value):
        raise _refused("must be a finite number", value)
    return float(value)


def as_count(value: Any) -> int:
    """Return ``value`` as an int when it is a whole number; ``"1e3"`` and ``8.0`` count, a boolean does not.

    Examples:
        >>> as_count("1e3")
        1000
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = as_number(value)
    except PydanticCustomError:
        raise _refused("must be a whole number", value) from None
    if number != int(number):
        raise _refused("must be a whole number", value)
    return int(number)


def as_flag(value: Any) -> bool:
    """Return ``value`` when it is a boolean; nothing else is read as one."""
    if not isinstance(value, bool):
        raise _refused("must be true or false", value)
    return value


def as_text(value: Any) -> str:
    """Return ``value`` when it is text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise _refused("must be text", value)
    if "\0" in value:  # no path can hold one, and no name does
        raise _refused("must be text without null characters", value)
    return value


def as_pattern(value: Any) -> str:
    """Return ``value`` when it is a regular expression that compiles."""
    text = as_text(value)
    try:
        re.compile(text)
    except re.error as error:
        raise _refused(f"must be a regular expression ({error})", value) from None
    return text


def as_texts(value: Any) -> tuple[str, ...]:
    """Return one text or a list of texts as a tuple of texts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence):
        raise _refused("must be text or a list of texts", value)
    return tuple(as_text(item) for item in value)


def as_patterns(value: Any) -> tuple[str, ...]:
    """Return one regular expression or a list of them as a tuple, when all compile."""
    return tuple(as_pattern(item) for item in as_texts(value))


def as_text_or_texts(value: Any) -> str | tuple[str, ...]:
    """Return one text as it is, and a list of texts as a tuple."""
    return as_text(value) if isinstance(value, str) else as_texts(value)


def _refused(what: str, value: Any) -> PydanticCustomError:
    # The words travel as context: the template is formatted, and a brace in a value must not be a field.
    return PydanticCustomError("refused", "{what}, not {value}", {"what": what, "value": spelled(value)})


def spelled(value: Any) -> str:
    """Return ``value`` as a short piece of YAML, for use in a sentence.

    Examples:
        >>> spelled(True), spelled(None), spelled("yes")
        ('true', 'null', "'yes'")
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]


def _as_yaml(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


Number = Annotated[float, BeforeValidator(as_number)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
PositiveShare = Annotated[Number, Field(gt=0, le=1)]
ShareBelowOne = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(as_count)]
PositiveCount = Annotated[Count, Field(ge=1)]
NonNegativeCount = Annotated[Count, Field(ge=0)]
Flag = Annotated[bool, BeforeValidator(as_flag)]
Text = Annotated[str, BeforeValidator(as_text)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_texts)]
TextOrTexts = Annotated[
    str | tuple[str, ...], PlainValidator(as_text_or_texts), PlainSerializer(_as_yaml, when_used="json")
]
Pattern = Annotated[str, BeforeValidator(as_pattern)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_patterns)]
