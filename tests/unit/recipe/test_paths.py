"""Folders and files a recipe names: what is there, what is whole, what would be overwritten."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.unit.recipe.conftest import DPO, SFT, changed
from trimtab.errors import UserError
from trimtab.recipe import make_recipe

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder ``model`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(WEIGHTS)
    return model


def refusal(values: dict) -> str:
    with pytest.raises(UserError) as caught:
        make_recipe(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_model_folder_is_taken(folder):
    assert make_recipe(changed(SFT, {"model": "model"})).model == "model"
    assert make_recipe(changed(SFT, {"model": str(folder)})).model == str(folder)


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert make_recipe(changed(SFT, {"model": "~/model"})).model == "~/model"
    assert "model '~/nowhere' does not exist" in refusal(changed(SFT, {"model": "~/nowhere"}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(WEIGHTS[:-1]), "is damaged: its header promises"),
        (lambda f: (f / "model.safetensors").write_bytes(WEIGHTS + b"x"), "is damaged: its header promises"),
        (lambda f: (f / "model.safetensors").write_bytes(WEIGHTS[:20]), "is cut short: its header alone is"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"),
            "is not a safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
            "its header cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "holds pickled weights (pytorch_model.bin)",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"w": "part-2.safetensors"}}'
            ),
            "lacks part-2.safetensors, which its index names",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("nonsense"), "is not a safetensors index"),
    ],
)
def test_a_folder_that_is_no_model(break_it, message, folder):
    break_it(folder)
    sentence = refusal(changed(SFT, {"model": "./model"}))
    assert sentence.startswith("recipe: model '")
    assert message in sentence


@pytest.mark.parametrize(("given", "filled"), [("model", "reference"), ("reference", "model")])
def test_a_model_that_is_not_there_is_named_by_the_key_that_was_written(given, filled):
    values = changed(DPO, {given: "./nowhere", filled: None})
    assert refusal(values).startswith(f"recipe: {given} './nowhere' does not exist")


def test_a_file_is_no_model(folder):
    assert "is a file; a model is a folder" in refusal(changed(SFT, {"model": "model/config.json"}))


def test_a_delta_is_a_folder_with_a_record(folder):
    sentence = refusal(changed(DPO, {"base": ..., "delta": "model"}))
    assert "delta 'model' has no delta.json; name a folder made with trimtab delta" in sentence


def test_a_missing_model_is_said_once_at_the_key_that_was_written(folder):
    assert refusal(changed(DPO, {"reference": "./nowhere"})).startswith("recipe: reference './nowhere'")
    values = changed(SFT, {"model": "./nowhere", "base": "org/b", "optimizer.name": "ondare"})
    assert refusal(values).startswith("recipe: model './nowhere'")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("model", "output 'model' is or holds 'model', which is read"),
        ("./model/", "is or holds 'model', which is read"),
        (".", "is or holds 'model', which is read"),
        ("model/run", "output 'model/run' lies inside 'model', which is read"),
        ("model/config.json", "output 'model/config.json' is a file; name a folder"),
        ("rows.jsonl/run", "output 'rows.jsonl/run' cannot be made: 'rows.jsonl' is a file"),
    ],
)
def test_an_output_overwrites_nothing_that_is_read(output, message, folder):
    (folder.parent / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as caught:
        make_recipe(changed(SFT, {"model": "model", "data.train": "rows.jsonl", "output": output}))
    assert message in str(caught.value)


def test_an_output_beside_its_input_is_fine(folder):
    assert make_recipe(changed(SFT, {"model": "model", "output": "model-sft"})).output == "model-sft"


def test_data_is_a_file_a_folder_or_a_hub_id(folder):
    for path in ("model", "model/config.json", "org/rows"):
        assert make_recipe(changed(SFT, {"data.train": path})).data.train[0].path == path
    for path in ("rows", "a/b/c", "org/rows.parquet", "../rows"):
        assert refusal(changed(SFT, {"data.train": path})).startswith(f"recipe: data.train.0.path {path!r}")
