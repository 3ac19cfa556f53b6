"""What pydantic finds wrong with a recipe, in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.errors import nearest
from trimtab.recipe.recipe import METHODS
from trimtab.yaml_file import Key, Problem, dotted, spelled


def problems_of(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    """Yield what pydantic found wrong, in our words; ``model`` is what was validated."""
    for details in error.errors(include_url=False):
        key = tuple(details["loc"])
        message = _MESSAGES.get(details["type"], _as_pydantic_says)(details, key, model)
        close = (
            nearest(str(key[-1]), fields_at(model, key[:-1]))
            if details["type"] == "extra_forbidden"
            else None
        )
        yield Problem(key, message, also=((*key[:-1], close),) if close else ())


def fields_at(model: type[BaseModel], key: Key) -> list[str]:
    """Return the keys that may be written inside ``key``, seen from ``model``; empty where any may."""
    here: Any = model
    for part in key:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if _is_model(here) else None
        here = next(iter(_models_in(field.annotation)), None) if field else None
    return list(here.model_fields) if _is_model(here) else []


def _is_model(what: Any) -> bool:
    return isinstance(what, type) and issubclass(what, BaseModel)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if _is_model(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _unknown_key(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    known = fields_at(model, key[:-1])
    owner = _method_of(key)
    if owner is not None:
        return f"belongs to method {owner}"
    close = nearest(str(key[-1]), known)
    hint = f"did you mean {dotted((*key[:-1], close))}?" if close else f"known here: {', '.join(known)}"
    return f"is not a key of a recipe; {hint}"


def _method_of(key: Key) -> str | None:
    """The method whose recipes have ``key``, where this one's do not."""
    for name, recipe in METHODS.items():
        if key[-1] in fields_at(recipe, key[:-1]):
            return name
    return None


def _wrong_word(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    close = nearest(str(details["input"]), re.findall(r"'([^']*)'", details["ctx"]["expected"]))
    if close:
        return f"{spelled(details['input'])} is not known; did you mean {close!r}?"
    return f"must be {details['ctx']['expected']}, not {spelled(details['input'])}"


def _missing(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    return "is missing"


def _not_a_mapping(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    return f"must be a mapping, not {spelled(details['input'])}"


def _not_a_list(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    return f"must be a list, not {spelled(details['input'])}"


def _too_short(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    least = details["ctx"]["min_length"]
    return "must not be empty" if least == 1 else f"must have at least {least} items"


def _too_long(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    return f"must have at most {details['ctx']['max_length']} items"


def _out_of_range(symbol: str, bound: str) -> Any:
    def message(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
        return f"must be {symbol} {details['ctx'][bound]:g}, not {spelled(details['input'])}"

    return message


def _as_pydantic_says(details: ErrorDetails, key: Key, model: type[BaseModel]) -> str:
    return details["msg"][0].lower() + details["msg"][1:]


_MESSAGES = {
    "extra_forbidden": _unknown_key,
    "literal_error": _wrong_word,
    "missing": _missing,
    "model_type": _not_a_mapping,
    "model_attributes_type": _not_a_mapping,
    "dict_type": _not_a_mapping,
    "tuple_type": _not_a_list,
    "too_long": _too_long,
    "too_short": _too_short,
    "greater_than": _out_of_range("above", "gt"),
    "greater_than_equal": _out_of_range("at least", "ge"),
    "less_than": _out_of_range("below", "lt"),
    "less_than_equal": _out_of_range("at most", "le"),
}
