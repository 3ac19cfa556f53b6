"""KTO, RRHF and reward models on two gloo processes: held-out pairs are scored once, and losses are one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.equivalence.runs import assert_same, logged

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

HELD_OUT = 7  # an odd number: one process scores a pair again that the other has


def recipe(models: Any, folder: Path, method: str, name: str, batch: int) -> dict[str, Any]:
    # A large epsilon, because Adam's first steps are g/|g|: they make a whole step of a rounding error.
    return tiny.recipe(
        models,
        (folder / "train.jsonl", folder / "eval.jsonl"),
        folder / name,
        method=method,
        optimizer={"eps": 1e-3},
        training={"max_steps": 3, "per_device_train_batch_size": batch, "per_device_eval_batch_size": 2},
    )


@pytest.fixture(scope="module")
def runs(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny.write_rows(folder / "train.jsonl", tiny.preference_rows(24))
    tiny.write_rows(folder / "eval.jsonl", tiny.preference_rows(HELD_OUT, seed=1))
    for method in ("kto", "reward", "rrhf"):
        values = recipe(tiny_models, folder, method, f"{method}-two", batch=2)
        (folder / f"{method}.json").write_text(json.dumps(values))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launch, "-m", "tests.distributed.train_worker", str(folder)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_a_reward_model_is_the_one_of_one_process(runs: Path, tiny_models: Any) -> None:
    one = tiny.train(recipe(tiny_models, runs, "reward", "reward-one", batch=4))
    two = runs / "reward-two"
    losses = [[line["loss"] for line in logged(run) if "loss" in line] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    results = [json.loads((run / "results" / "rewards.json").read_text()) for run in (one, two)]
    assert [result["pairs"] for result in results] == [HELD_OUT, HELD_OUT]
    scores = [
        [result["scores"][index][side] for index in range(HELD_OUT) for side in ("chosen", "rejected")]
        for result in results
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert len(set(scores[0])) == 2 * HELD_OUT


def test_rrhf_is_the_one_of_one_process(runs: Path, tiny_models: Any) -> None:
    one = tiny.train(recipe(tiny_models, runs, "rrhf", "rrhf-one", batch=4))
    first, second = (
        [line for line in logged(run) if "loss" in line or "eval_loss" in line]
        for run in (one, runs / "rrhf-two")
    )
    assert [line["step"] for line in first] == [0, 1, 2, 3, 3]
    for ours, theirs in zip(first, second, strict=True):
        kept = [name for name in ours if "loss" in name or "rewards" in name or "length" in name]
        assert len(kept) >= 6
        assert [ours[name] for name in kept] == pytest.approx([theirs[name] for name in kept], rel=1e-5)


def test_kto_s_processes_end_the_same(runs: Path) -> None:
    import torch

    first, second = (torch.load(runs / f"kto.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["gradients"]) == 3
    assert_same(first, second, "kto")
    saved = tiny.weights(runs / "kto-two" / "model")
    assert_same({key: first["final"][key] for key in saved}, saved, "model")
