"""Every recipe that is shipped takes two steps on the real 135M model, each after those it builds on."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.slow.test_smollm2 import (  # noqa: F401 (fixtures)
    INSTRUCTIONS,
    PAIRS,
    published,
    trimtab,
    write_jsonl,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RECIPES = {path.stem: path for path in Path(__file__).resolve().parents[2].glob("recipes/smollm2-*.yaml")}
TWO_STEPS = [
    "training.max_steps=2",
    "training.save_steps=2",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "schedule.lr.warmup_steps=0",  # the first step would have lr 0, which moves nothing by design
]


@pytest.fixture(scope="module")
def runs(published, tmp_path_factory):  # noqa: F811
    """The run folder of a recipe, by its name; what it starts from is run before."""
    place = tmp_path_factory.mktemp("recipes")
    instructions = write_jsonl(place / "instructions.jsonl", INSTRUCTIONS)
    pairs = write_jsonl(place / "pairs.jsonl", PAIRS)

    def own(value):
        """Where a model or a delta that a recipe names lies here."""
        if value == "./runs/smollm2-delta":
            return delta()
        earlier = re.fullmatch(r"\./runs/([\w-]+)/model", value)
        return run(earlier[1]) / "model" if earlier else published

    @cache
    def delta():
        reference = run("smollm2-sft") / "model"
        trimtab("delta", "--reference", reference, "--base", published, place / "delta")
        return place / "delta"

    @cache
    def run(name):
        values = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
        rows = instructions if values["method"] == "sft" else pairs
        settings = [
            f"{key}={own(values[key])}" for key in ("model", "reference", "base", "delta") if values.get(key)
        ]
        settings += [f"data.{part}={rows}" for part in ("train", "eval") if values["data"].get(part)]
        if "projection" in values["optimizer"]:
            settings.append(f"optimizer.projection.data={instructions}")
        if "rewards" in values.get("loss", {}):
            settings += [f"loss.rewards={own(values['loss']['rewards'])}", "loss.max_new_tokens=8"]
        trimtab("train", RECIPES[name], *settings, *TWO_STEPS, f"output={place / name}")
        return place / name

    return run


def tensors(folder):
    """The weights of a model or an adapter."""
    found = {}
    for name in ("model", "adapter_model"):
        if (folder / f"{name}.safetensors").is_file():
            found |= load_file(folder / f"{name}.safetensors")
    return found


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_steps(name, runs, published):  # noqa: F811
    folder = runs(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
    kept, before = tensors(folder / "model"), tensors(published)
    assert kept
    assert all(value.isfinite().all() for value in kept.values())
    shared = kept.keys() & before.keys()
    assert len(shared) in (0, 272)  # an adapter, or a whole model
    assert not shared or any(not torch.equal(kept[name], before[name]) for name in shared)
