"""PPO beside the regularisers and the other optimizers: two steps each, and what must hold."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing the trainers

LOSS = {"rewards": "tests.tiny:share_of_small", "max_new_tokens": 6, "epochs": 2}
SECTIONS = {
    "ema": {"ema": {"coefficient": 0.5}},
    "child_tuning": {"child_tuning": {"variant": "F", "reserve_rate": 0.5}},
    "pull": {"pull": {"strength": 0.1}},
    "elastic_reset": {"elastic_reset": {"every": 1}},
    "projection": {"projection": {"rows": 4, "every": 1}},
    "galore": {"name": "galore", "galore": {"rank": 2}},
    "adafactor": {"name": "adafactor"},
}
"""What is added to AdamW's section."""


def recipe(models: Any, rows: Any, output: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
    return tiny.recipe(
        models,
        rows,
        output,
        method="ppo",
        loss=LOSS,
        optimizer={**tiny.ADAMW, **optimizer},
        base=None,
        training={"max_steps": 2},
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_two_steps(name: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    section = copy.deepcopy(SECTIONS[name])
    if name == "projection":
        rows = tiny.write_rows(tmp_path / "instructions.jsonl", tiny.instruction_rows(4))
        section["projection"]["data"] = str(rows)
    folder = tiny.train(recipe(tiny_models, tiny_pairs, tmp_path / "o", section))
    plain = tiny.train(recipe(tiny_models, tiny_pairs, tmp_path / "plain", {}))
    lines, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (folder, plain)
    )
    first, same = (next(line for line in run if "loss" in line) for run in (lines, expected))
    for key in ("loss", "reward", "kl", "entropy"):
        assert first[key] == pytest.approx(same[key], rel=1e-5), "the first step's loss is the plain one's"
    start, trained, beside = (
        tiny.weights(run) for run in (tiny_models[1], folder / "model", plain / "model")
    )
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)
    assert any(not torch.equal(trained[key], beside[key]) for key in start)
    head = load_file(folder / "checkpoint-2" / "value_head.safetensors")
    assert head["weight"].abs().max() > 0, "the values are learned"
