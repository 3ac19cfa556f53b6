"""The types a recipe's values have: ``beta: "yes"`` is refused, ``lr: 1e-6`` is a number."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from trimtab.yaml_file import WrongValue, count_in, flag_in, number_in, text_in

T = TypeVar("T")


def as_number(value: Any) -> float:
    """Return ``value`` as a finite float; text that spells a number counts, a boolean does not.

    Examples:
        >>> as_number("1e-6")
        1e-06
    """
    return _read(number_in, value)


def as_count(value: Any) -> int:
    """Return ``value`` as an int when it is a whole number; ``"1e3"`` and ``8.0`` count, a boolean does not.

    Examples:
        >>> as_count("1e3")
        1000
    """
    return _read(count_in, value)


def as_flag(value: Any) -> bool:
    """Return ``value`` when it is a boolean; nothing else is read as one."""
    return _read(flag_in, value)


def as_text(value: Any) -> str:
    """Return ``value`` when it is text with something in it."""
    return _read(text_in, value)


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


def _read(read: Callable[[Any], T], value: Any) -> T:
    """Return ``read(value)``; what it refuses, pydantic is told."""
    try:
        return read(value)
    except WrongValue as error:
        raise _told(str(error)) from None


def _refused(what: str, value: Any) -> PydanticCustomError:
    return _told(str(WrongValue(what, value)))


def _told(sentence: str) -> PydanticCustomError:
    # The words travel as context: the template is formatted, and a brace in a value must not be a field.
    return PydanticCustomError("refused", "{sentence}", {"sentence": sentence})


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
