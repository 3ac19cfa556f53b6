"""A YAML file that a user wrote: its values, the line of every key, and what is wrong with it, all at once.

YAML 1.1, which PyYAML speaks, reads ``1e-6`` as text (a float needs a dot there: ``1.0e-6``), and ``yes`` as
a boolean. Numbers written as text are therefore read as numbers, and booleans never count as numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import UserError

Key = tuple[str | int, ...]
"""A place in a file: ``("data", "train", 0, "path")`` is ``data.train.0.path``."""

_MOST_COPIES = 100_000
"""Values that the aliases of a file may stand for, together."""

Written = dict[Key, str]
"""Where each key was written, in words."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one key; it stands only while the keys in ``also`` are right."""

    key: Key
    message: str
    also: tuple[Key, ...] = ()


@dataclass(frozen=True)
class YamlFile:
    """A file that holds one mapping.

    Args:
        text: the file as it was written.
        values: the mapping.
        places: where each key in it was written.
        twice: the keys that were written twice.
    """

    text: str
    values: dict[str, Any]
    places: Written
    twice: list[Problem]


def read_yaml_file(path: str | os.PathLike[str], what: str, keys: str) -> YamlFile:
    """Read a YAML file that holds one mapping.

    Args:
        path: the file.
        what: what it is, for the sentences: ``"recipe"``.
        keys: some keys that it has, for the sentences: ``"method, model and data"``.

    Raises:
        UserError: if there is no such file, or it is not UTF-8, not YAML, empty, or not a mapping, or its
            aliases stand for too much.
    """
    text = _read_text(Path(path), what)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_aliases(node, path)
        values = loader.construct_document(node) if node is not None else None
        places: Written = {}
        twice = list(_walk(node, (), places)) if node is not None else []
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {say_yaml_error(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply, or an alias in it holds itself") from None
    except ValueError as error:  # a date that is none (2026-13-01), or a number too long to read
        raise UserError(f"{path} holds a value that cannot be read: {error}") from None
    if values is None:
        raise UserError(f"{path} is empty; a {what} is a mapping of keys such as {keys}")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {spelled(values)}; a {what} is a mapping of keys to values")
    return YamlFile(text, values, places, twice)


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {what} {str(path)!r}; name a YAML file that exists") from None
    except IsADirectoryError:
        raise UserError(f"{str(path)!r} is a folder; name the {what}'s YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save the {what} as UTF-8") from None


def say_yaml_error(error: yaml.YAMLError) -> str:
    """Return what the YAML reader found wrong, in one line, with the place where it knows one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        if "'\\t'" in (error.problem or ""):
            return f"line {error.problem_mark.line + 1} is indented with a tab; use spaces"
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{error.problem or error.context} at {place}"
    return " ".join(str(error).split())


def _check_aliases(node: yaml.Node | None, path: str | os.PathLike[str]) -> None:
    """Refuse a short file that stands for a very long one, by aliases of aliases.

    Raises:
        UserError: so it is.
        RecursionError: an alias holds itself.
    """
    sizes: dict[int, int | None] = {}

    def size(one: yaml.Node) -> int:
        if id(one) in sizes:
            known = sizes[id(one)]
            if known is None:
                raise RecursionError
            return known
        sizes[id(one)] = None
        parts = one.value if isinstance(one, yaml.CollectionNode) else []
        total = 1 + sum(sum(map(size, part)) if isinstance(part, tuple) else size(part) for part in parts)
        sizes[id(one)] = total
        return total

    if node is not None and size(node) > len(sizes) + _MOST_COPIES:
        raise UserError(f"{path} has aliases that stand for more than {_MOST_COPIES} values; write them out")


def _walk(node: yaml.Node, key: Key, places: Written) -> Iterator[Problem]:
    """Note the line of every key under ``node`` and yield the keys that are written twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*key, index)] = f"line {item.start_mark.line + 1}"
            yield from _walk(item, (*key, index), places)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, item in node.value:
            line = name.start_mark.line + 1
            if name.value in seen and name.tag != "tag:yaml.org,2002:merge":
                yield Problem((*key, name.value), f"is written twice, on lines {seen[name.value]} and {line}")
            seen[name.value] = line
            places[(*key, name.value)] = f"line {line}"
            yield from _walk(item, (*key, name.value), places)


class Places:
    """Where each key was written: a line of the file, or an override of the command line."""

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


def refusal(source: str, problems: Sequence[Problem], places: Places) -> UserError:
    """Return the error that lists all ``problems``: one sentence for one, a line for each of several."""
    ordered = sorted(problems, key=lambda problem: places.order(problem.key))
    lines = list(dict.fromkeys(places.say(problem) for problem in ordered))
    if len(lines) == 1:
        comma = ", " if lines[0].startswith(("line ", "override ")) else ": "
        return UserError(f"{source}{comma}{lines[0]}")
    return UserError("\n".join([f"{source}: {len(lines)} problems", *(f"  {line}" for line in lines)]))


def dotted(key: Iterable[str | int]) -> str:
    """Return the key as overrides write it.

    Examples:
        >>> dotted(("data", "train", 0))
        'data.train.0'
    """
    texts = (str(part) for part in key)
    return ".".join(text if text.isprintable() else repr(text) for text in texts)


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


class WrongValue(ValueError):
    """A value that is not what its key takes; the message continues a sentence that opens with the key."""

    def __init__(self, wanted: str, value: Any) -> None:
        super().__init__(f"{wanted}, not {spelled(value)}")


def number_in(value: Any) -> float:
    """Return ``value`` as a finite float; text that spells a number counts, a boolean does not.

    Raises:
        WrongValue: it is none.

    Examples:
        >>> number_in("1e-6")
        1e-06
    """
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise WrongValue("must be a number", value) from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongValue("must be a number", value)
    else:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise WrongValue("must be a finite number", number)
    return number


def count_in(value: Any) -> int:
    """Return ``value`` as an int when it is a whole number; ``"1e3"`` and ``8.0`` count, a boolean does not.

    Raises:
        WrongValue: it is none.

    Examples:
        >>> count_in("1e3")
        1000
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = number_in(value)
    except WrongValue:
        raise WrongValue("must be a whole number", value) from None
    if number != int(number):
        raise WrongValue("must be a whole number", value)
    return int(number)


def flag_in(value: Any) -> bool:
    """Return ``value`` when it is a boolean; nothing else is read as one.

    Raises:
        WrongValue: it is none.
    """
    if not isinstance(value, bool):
        raise WrongValue("must be true or false", value)
    return value


def text_in(value: Any) -> str:
    """Return ``value`` when it is text with something in it.

    Raises:
        WrongValue: it is none.
    """
    if not isinstance(value, str) or not value.strip():
        raise WrongValue("must be text", value)
    if "\0" in value:  # no path can hold one, and no name does
        raise WrongValue("must be text without null characters", value)
    if any("\ud800" <= character <= "\udfff" for character in value):  # no file can hold one
        raise WrongValue("must be text without halves of surrogate pairs", value)
    return value
