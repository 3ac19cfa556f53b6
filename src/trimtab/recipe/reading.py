"""Reading a recipe's file, and laying the command line's overrides over it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from trimtab.errors import UserError
from trimtab.yaml_file import Key, Written, YamlFile, dotted, read_yaml_file, say_yaml_error, spelled


def read_recipe_file(path: str | os.PathLike[str]) -> YamlFile:
    """Read a recipe's YAML.

    Raises:
        UserError: if there is no such file, or it is not UTF-8, not YAML, empty, or not a mapping.
    """
    return read_yaml_file(path, "recipe", "method, model and data")


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
                f"the value of the override {override!r} is not YAML: {say_yaml_error(error)}"
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
