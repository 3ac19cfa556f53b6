"""Recipes on disk, and the recipe that every test changes a little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DPO: dict[str, Any] = {
    "method": "dpo",
    "reference": "org/sft",
    "base": "org/base",
    "data": {"train": "org/pairs"},
    "optimizer": {"name": "ondare", "lr": 1e-6},
    "output": "runs/dpo",
}
SFT: dict[str, Any] = {
    "method": "sft",
    "model": "org/base",
    "data": {"train": "org/rows"},
    "output": "runs/sft",
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` with dotted keys set, or removed where the value is ``...``."""
    result = copy.deepcopy(values)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        here = result
        for parent in parents:
            here = here.setdefault(parent, {})
        if value is ...:
            del here[last]
        else:
            here[last] = value
    return result


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a recipe (values, text or bytes) and return its path."""

    def write(content: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(content, sort_keys=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
