"""Reading a recipe's file: YAML with the line of every key, duplicates refused, overrides laid over it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import UserError
from trimtab.recipe.problems import Key, Problem, dotted
from trimtab.recipe.values import spelled

Written = dict[Key, str]
"""Where each key was written, in words."""


def read_recipe_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Written, list[Problem]]:
    """Read a YAML file that holds one mapping.

    Returns:
        The mapping, the place of each key in it, and the keys that were written twice.

    Raises:
        UserError: if there is no such file, or it is not UTF-8, not YAML, empty, or not a mapping.
    """
    text = _read_text(Path(path))
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else None
        places: Written = {}
        twice = list(_walk(node, (), places)) if node is not None else []
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {_say_yaml(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply, or an alias in it holds itself") from None
    if values is None:
        raise UserError(f"{path} is empty; a recipe is a mapping of keys such as method, model and data")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {spelled(values)}; a recipe is a mapping of keys to values")
    return values, places, twice


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no recipe {str(path)!r}; name a YAML file that exists") from None
    except IsADirectoryError:
        raise UserError(f"{str(path)!r} is a folder; name the recipe's YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None


def _say_yaml(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        if "'\\t'" in (error.problem or ""):
            return f"line {error.problem_mark.line + 1} is indented with a tab; use spaces"
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{error.problem or error.context} at {place}"
    return " ".join(str(error).split())


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


def lay_over(values: dict[str, Any], places: Written, overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``values`` with ``key=value`` overrides laid over them; ``places`` learns where they came from.

    Args:
        values: the mapping read from the file; it is left as it is.
        places: where each key was written; extended.
        overrides: texts such as ``optimizer.lr=1e-6`` or ``data.train.0.weight=2``; the value is YAML.

    Raises:
        UserError: if an override is not ``key=value``, or its key goes through something that has no keys.

    Examples:
        >>> lay_over({"loss": {"beta": 0.1}}, {}, ["loss.beta=0.5", "seed=1"])
        {'loss': {'beta': 0.5}, 'seed': 1}
    """
    result: dict[str, Any] = _copied(values)
    for override in overrides:
        name, equals, text = override.partition("=")
        key: Key = tuple(int(part) if part.isdigit() else part for part in name.strip().split("."))
        if not equals or "" in key:
            raise UserError(f"{override!r} is not an override; write key=value, such as optimizer.lr=1e-6")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"the value of the override {override!r} is not YAML: {_say_yaml(error)}"
            ) from None
        _put(result, key, value, override)
        for length in range(1, len(key)):
            places.setdefault(key[:length], f"override {override!r}")
        for part in _keys_of(value, key):
            places[part] = f"override {override!r}"
    return result


def _keys_of(value: Any, key: Key) -> Iterator[Key]:
    yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in items:
        yield from _keys_of(item, (*key, part))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _put(values: dict[str, Any], key: Key, value: Any, override: str) -> None:
    here: Any = values
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(here, list) and isinstance(part, int):
            if part >= len(here):
                raise UserError(
                    f"override {override!r}: {dotted(key[:depth])} has {len(here)} items, counted from 0"
                )
        elif isinstance(here, dict):
            if not last and here.get(str(part)) is None:
                here[str(part)] = {}
            part = str(part)
        else:
            kind = (
                "a list, which takes a number"
                if isinstance(here, list)
                else f"{spelled(here)}, which has no keys"
            )
            raise UserError(f"override {override!r}: {dotted(key[:depth])} is {kind}")
        if last:
            here[part] = value
        here = here[part]
