"""Every recipe that is shipped is read, checked and dry-run, on tiny models in the place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests import tiny
from trimtab.delta import ReferenceDelta

pytestmark = pytest.mark.xdist_group("cli")

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.y*ml"))


def test_the_recipes_are_found():
    assert len(RECIPES) >= 2
    assert {path.name for path in RECIPES} >= {"smollm2-sft.yaml", "smollm2-dpo.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_recipe(path, place, trimtab):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    ReferenceDelta.between(reference="reference", base="base").save("tau")
    if values["method"] == "sft":
        tiny.write_rows(place.folder / "pairs.jsonl", tiny.instruction_rows(24))
    stand_ins = {"model": "./reference", "reference": "./reference", "base": "./base", "delta": "./tau"}
    overrides = [f"{key}={stand_in}" for key, stand_in in stand_ins.items() if values.get(key)]
    overrides += [f"data.{part}=pairs.jsonl" for part in ("train", "eval") if values["data"].get(part)]
    before = place.files()
    result = trimtab("train", str(path), "--dry-run", *overrides)
    assert result.code == 0, result.err
    assert f"output: {values['output']}" in result.out
    assert "steps" in result.out
    assert place.files() == before, "a dry run writes nothing"
    opening = path.read_text(encoding="utf-8").partition("\nmethod")[0]
    assert f"trimtab train recipes/{path.relative_to(FOLDER)}" in opening, "a recipe opens with its command"
