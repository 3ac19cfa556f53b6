"""Every recipe that is shipped is read, checked and dry-run, on tiny models in the place of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests import tiny
from trimtab.delta import ReferenceDelta

pytestmark = pytest.mark.xdist_group("cli")

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
FOUND = sorted(FOLDER.rglob("*.y*ml"))
MERGES = [path for path in FOUND if path.parent.name == "merge"]
RECIPES = [path for path in FOUND if path not in MERGES]


def test_the_recipes_are_found():
    assert {path.name for path in RECIPES} >= {
        "smollm2-sft.yaml",
        "smollm2-dpo.yaml",
        "smollm2-grpo.yaml",
        "smollm2-rloo.yaml",
    }
    methods = {yaml.safe_load(path.read_text(encoding="utf-8"))["merge_method"] for path in MERGES}
    assert methods == {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "hma"}


@pytest.mark.parametrize("path", MERGES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_merge(path, place, trimtab):
    text = path.read_text(encoding="utf-8")
    assert f"    trimtab merge recipes/merge/{path.name} merged" in text, "a recipe opens with its command"
    values = yaml.safe_load(text)
    named = dict.fromkeys([values.get("base_model"), *(one["model"] for one in values["models"])])
    stand_ins = dict(zip(filter(None, named), ("more/base", "more/reference", "other"), strict=False))
    tiny.write_models(place.folder / "more", num_hidden_layers=3)
    shutil.copytree(place.folder / "more" / "reference", place.folder / "other")
    for name, folder in stand_ins.items():
        text = re.sub(rf"(?m)model: {re.escape(name)}(?=\s|$)", f"model: ./{folder}", text)
    (place.folder / "merge.yaml").write_text(text, encoding="utf-8")
    assert text.count("./") == len(values["models"]) + ("base_model" in values)
    result = trimtab("merge", "merge.yaml", "merged", "--dry-run")
    assert result.code == 0, result.err
    assert "GB in" in result.out
    assert not (place.folder / "merged").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_recipe(path, place, trimtab):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    ReferenceDelta.between(reference="reference", base="base").save("tau")
    if values["method"] == "sft":
        tiny.write_rows(place.folder / "pairs.jsonl", tiny.instruction_rows(24))
    stand_ins = {"model": "./reference", "reference": "./reference", "base": "./base", "delta": "./tau"}
    if "lora" in values.get("reference", ""):
        stand_ins["reference"] = f"./{tiny.write_adapter(Path('reference'), Path('adapter'))}"
    overrides = [f"{key}={stand_in}" for key, stand_in in stand_ins.items() if values.get(key)]
    overrides += [f"data.{part}=pairs.jsonl" for part in ("train", "eval") if values["data"].get(part)]
    overrides += ["optimizer.projection.data=pairs.jsonl"] * ("projection" in values.get("optimizer", {}))
    if "rewards" in values.get("loss", {}):
        overrides.append("loss.rewards=operator:concat")  # any function will do
    before = place.files()
    result = trimtab("train", str(path), "--dry-run", *overrides)
    assert result.code == 0, result.err
    assert f"output: {values['output']}" in result.out
    assert "steps" in result.out
    assert place.files() == before, "a dry run writes nothing"
    opening = path.read_text(encoding="utf-8").partition("\nmethod")[0]
    assert f"trimtab train recipes/{path.relative_to(FOLDER)}" in opening, "a recipe opens with its command"
