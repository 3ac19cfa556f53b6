"""What is wrong with a recipe: one line per problem, with its place, and the sentence they add up to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.errors import UserError, nearest
from trimtab.recipe.recipe import METHODS
from trimtab.recipe.values import spelled

Key = tuple[str | int, ...]
"""A place in a recipe: ``("data", "train", 0, "path")`` is ``data.train.0.path``."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one key; it stands only while the keys in ``also`` are right."""

    key: Key
    message: str
    also: tuple[Key, ...] = ()


class Places:
    """Where each key of a recipe was written: a line of the file, or an override of the command line."""

    def __init__(self, places: Mapping[Key, str] | None = None) -> None:
        self._places = dict(places or {})

    def written(self, key: Key) -> Key:
        """Return ``key`` as it was written: a list may be written as its only item, a source as its path."""
        path: Key = ()
        for part in key:
            if isinstance(part, int) and (*path, part) not in self._places and self._places:
                continue
            path = (*path, part)
        bare = path[-1:] == ("path",) and path not in self._places and path[:-1] in self._places
        return path[:-1] if bare else path

    def of(self, key: Key) -> str | None:
        """Return where ``key``, or the nearest key around it, was written."""
        path = self.written(key)
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path) if path else None

    def order(self, key: Key) -> tuple[int, int]:
        """Return what sorts keys as they are read: by line, then the overrides, then what was not written."""
        place = self.of(key) or ""
        return (0, int(place[5:])) if place.startswith("line ") else (1 if place else 2, 0)

    def say(self, problem: Problem) -> str:
        """Return the problem as a line: where it was written, the key, and what is wrong."""
        place = self.of(problem.key)
        sentence = f"{dotted(self.written(problem.key))} {problem.message}"
        return f"{place}: {sentence}" if place else sentence


def dotted(key: Iterable[str | int]) -> str:
    """Return the key as overrides write it.

    Examples:
        >>> dotted(("data", "train", 0))
        'data.train.0'
    """
    return ".".join(str(part) for part in key)


def refusal(source: str, problems: Sequence[Problem], places: Places) -> UserError:
    """Return the error that lists all ``problems``: one sentence for one, a line for each of several."""
    ordered = sorted(problems, key=lambda problem: places.order(problem.key))
    lines = list(dict.fromkeys(places.say(problem) for problem in ordered))
    if len(lines) == 1:
        comma = ", " if lines[0].startswith(("line ", "override ")) else ": "
        return UserError(f"{source}{comma}{lines[0]}")
    return UserError("\n".join([f"{source}: {len(lines)} problems", *(f"  {line}" for line in lines)]))


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
