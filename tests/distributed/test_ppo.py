"""PPO on two gloo processes: rollouts, whitening and the penalty are one process's, and a resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed.processes import run_on_two
from tests.equivalence.runs import assert_same, logged

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing the trainers

HELD_OUT = 5  # an odd number: one process answers a prompt more


def recipe(models: Any, folder: Path, name: str, batch: int, accumulated: int = 1) -> dict[str, Any]:
    # A large epsilon, because Adam's first steps are g/|g|: they make a whole step of a rounding error.
    return tiny.recipe(
        models,
        (folder / "train.jsonl", folder / "eval.jsonl"),
        folder / name,
        method="ppo",
        loss={
            "rewards": "tests.tiny:share_of_small",
            "max_new_tokens": 6,
            "epochs": 3,
            "beta": 0.3,
            "kl_target": 0.01,
            "missing_eos_penalty": 0.1,
        },
        optimizer={"eps": 1e-3},
        training={
            "max_steps": 7,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
            "save_steps": 5,
        },
    )


@pytest.fixture(scope="module")
def runs(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    tiny.write_rows(folder / "train.jsonl", tiny.preference_rows(10))
    tiny.write_rows(folder / "eval.jsonl", tiny.preference_rows(HELD_OUT, seed=1))
    whole = recipe(tiny_models, folder, "two", batch=2, accumulated=2)
    (folder / "ppo.json").write_text(json.dumps(whole))
    (folder / "ppo_resumed.json").write_text(json.dumps({**whole, "output": str(folder / "two-resumed")}))
    several = recipe(tiny_models, folder, "several", batch=1)
    several["loss"] |= {"minibatches": 2, "epochs": 2}
    (folder / "several.json").write_text(json.dumps(several))
    run_on_two("tests.distributed.train_worker", folder)
    return folder


def test_two_processes_do_what_one_does(runs: Path, tiny_models: Any) -> None:
    one = tiny.train(recipe(tiny_models, runs, "one", batch=8))
    first, second = (
        [line for line in logged(run) if "loss" in line or "eval_reward" in line]
        for run in (one, runs / "two")
    )
    assert [line["step"] for line in first] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    for ours, theirs in zip(first, second, strict=True):
        kept = [name for name in ours if not name.startswith(("merge/", "grad_norm"))]
        assert len(kept) >= 6
        assert [ours[name] for name in kept] == pytest.approx(
            [theirs[name] for name in kept], rel=1e-3, abs=1e-5
        )
    assert len({line["kl_coefficient"] for line in first if "loss" in line}) == 3
    trained = [tiny.weights(run / "model") for run in (one, runs / "two")]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_several_minibatches_leave_the_processes_together(runs: Path) -> None:
    first, second = (torch.load(runs / f"several.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["gradients"]) == 7
    assert_same(first, second, "several")
    steps = [line for line in logged(runs / "several") if "loss" in line]
    assert len({line["reward"] for line in steps}) == 2, "two rollouts of four steps, the last cut off"


def test_the_processes_end_the_same_and_resume_within_a_rollout(runs: Path) -> None:
    first, second = (torch.load(runs / f"ppo.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["gradients"]) == 7
    assert_same(first, second, "ppo")
    for rank in (0, 1):
        resumed = torch.load(runs / f"ppo_resumed.{rank}.pt", weights_only=True)
        whole = torch.load(runs / f"ppo.{rank}.pt", weights_only=True)
        assert_same(resumed["gradients"], whole["gradients"][5:], "gradients")
        assert_same(resumed["final"], whole["final"], "weights")
    rollouts = [
        torch.load(runs / "two" / "checkpoint-5" / f"rollout_{rank}.pt", weights_only=True)["rollout"]
        for rank in (0, 1)
    ]
    assert rollouts[0]["prompt_ids"] != rollouts[1]["prompt_ids"], "the prompts are split"
