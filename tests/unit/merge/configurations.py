"""Right configurations that the tests change a little."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from trimtab.errors import UserError
from trimtab.merge.config import read_config
from trimtab.merge.methods import required_by

BASE = "org/base"


def config_of(method: str, **parameters: Any) -> dict[str, Any]:
    """A right configuration of two models, the base among them, with the method's required parameter."""
    values: dict[str, Any] = {
        "merge_method": method,
        "base_model": BASE,
        "models": [{"model": "org/a"}, {"model": BASE}],
        "parameters": {**dict.fromkeys(required_by(method), 0.5), **parameters},
    }
    if method == "linear":
        del values["base_model"]
    return values


def sliced_of(method: str) -> dict[str, Any]:
    """The same, over two slices."""
    values = config_of(method)
    sources = [{"model": item["model"], "layer_range": [0, 2]} for item in values.pop("models")]
    return {**values, "slices": [{"sources": sources}, {"sources": copy.deepcopy(sources)}]}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` with dotted keys set, or removed where the value is ``...``."""
    result = copy.deepcopy(values)
    for dotted, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in dotted.split(".")]
        here: Any = result
        for parent in parents:
            here = here[parent] if isinstance(parent, int) else here.setdefault(parent, {})
        if value is ...:
            del here[last]
        else:
            here[last] = value
    return result


def refusals(values: Any) -> list[str]:
    """The sentences with which ``values`` are refused, without what introduces them."""
    with pytest.raises(UserError) as caught:
        read_config(values)
    first, *rest = str(caught.value).splitlines()
    start = "merge configuration: "
    assert first.startswith(start)
    if not rest:
        return [first.removeprefix(start)]
    assert first == f"{start}{len(rest)} problems"
    return [line.removeprefix("  ") for line in rest]
