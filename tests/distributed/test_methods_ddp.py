"""Methods, GaLore and adapters on two gloo processes: held-out pairs are scored once, losses are one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed.processes import run_on_two
from tests.equivalence.runs import assert_same, logged, tensors
from trimtab.ops import canonical_name

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


def low_rank(models: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """GaLore inside online merging, and online merging in the space of an adapter."""
    galore = recipe(models, folder, "dpo", "galore-two", batch=2)
    galore["optimizer"] |= {
        "name": "online_merging",
        "inner": "galore",
        "sparsify": "top",
        "consensus": "sign",
    }
    galore["optimizer"] |= {"galore": {"rank": 4, "update_proj_gap": 2}}
    adapter = recipe(models, folder, "dpo", "adapter-two", batch=2)
    del adapter["base"]
    adapter["reference"] = str(tiny.write_adapter(models[1], folder / "adapter"))
    return {"galore": galore, "adapter": adapter}


def sampled_recipe(models: Any, folder: Path, method: str) -> dict[str, Any]:
    """Groups of four responses, two of them on each process; saved inside a generation."""
    return tiny.recipe(
        models,
        (folder / "train.jsonl", folder / "eval.jsonl"),
        folder / f"{method}-two",
        method=method,
        loss={
            "rewards": "tests.unit.train.rules:letters",
            "max_new_tokens": 4,
            "num_generations": 4,
            "num_iterations": 2,
        },
        training={
            "max_steps": 4,
            "save_steps": 3,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
        },
    )


@pytest.fixture(scope="module")
def runs(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny.write_rows(folder / "train.jsonl", tiny.preference_rows(24))
    tiny.write_rows(folder / "eval.jsonl", tiny.preference_rows(HELD_OUT, seed=1))
    for method in ("kto", "reward", "rrhf"):
        values = recipe(tiny_models, folder, method, f"{method}-two", batch=2)
        (folder / f"{method}.json").write_text(json.dumps(values))
    for name, values in low_rank(tiny_models, folder).items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    for method in ("grpo", "rloo"):
        values = sampled_recipe(tiny_models, folder, method)
        (folder / f"{method}.json").write_text(json.dumps(values))
    values = sampled_recipe(tiny_models, folder, "grpo")
    (folder / "grpo_resumed.json").write_text(json.dumps({**values, "output": f"{values['output']}-resumed"}))
    run_on_two("tests.distributed.train_worker", folder)
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


@pytest.mark.parametrize(("method", "steps"), [("kto", 3), ("grpo", 4), ("rloo", 4)])
def test_processes_end_the_same(method: str, steps: int, runs: Path) -> None:
    first, second = (torch.load(runs / f"{method}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["gradients"]) == steps
    assert_same(first, second, method)
    saved = tiny.weights(runs / f"{method}-two" / "model")
    assert_same({key: first["final"][key] for key in saved}, saved, "model")


def test_processes_resume_inside_a_generation(runs: Path) -> None:
    whole, resumed = runs / "grpo-two", runs / "grpo-two-resumed"
    assert {path.name for path in (resumed / "checkpoint-3").glob("responses_*")} == {
        "responses_0.pt",
        "responses_1.pt",
    }
    assert_same(tiny.weights(resumed / "model"), tiny.weights(whole / "model"), "model")
    assert_same(logged(resumed), logged(whole), "metrics")
    assert all(line["reward"] >= 0 for line in logged(whole) if "reward" in line)


@pytest.mark.parametrize("name", ["galore", "adapter"])
def test_processes_with_projectors_or_adapters_end_the_same(name: str, runs: Path) -> None:
    first, second = (torch.load(runs / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["gradients"]) == 3
    assert_same(first, second, name)
    saved = tensors(runs / f"{name}-two" / "model")
    start = tensors(runs / "adapter") if name == "adapter" else None
    final = {canonical_name(key): value for key, value in first["final"].items() if ".ref." not in key}
    assert_same({key: final[canonical_name(key)] for key in saved}, saved, "model")
    assert start is None or all(not torch.equal(saved[key], start[key]) for key in start)
