"""What the tests of the methods share: a trainer from a recipe, and its models in float64 for the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from trimtab.recipe import make_recipe
from trimtab.terminal import plain_libraries
from trimtab.train import config_class
from trimtab.train.parts import gather_parts


@pytest.fixture
def trainer_of(
    tiny_models: tuple[Path, Path], tiny_pairs: tuple[Path, Path], tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Make a method's trainer from the tiny recipe with the given sections (and files of rows)."""

    def make(rows: Any = None, **sections: Any) -> Any:
        recipe = make_recipe(
            tiny.recipe(tiny_models, rows or tiny_pairs, tmp_path / "run", **sections),
            config_class=config_class,
        )
        module = import_module(f"trimtab.train.{recipe.method}")
        return module.make_trainer(gather_parts(recipe, resumes=False))

    with plain_libraries():
        yield make


@pytest.fixture
def in_float64() -> Callable[[Path], Any]:
    """Load a model folder in float64, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
