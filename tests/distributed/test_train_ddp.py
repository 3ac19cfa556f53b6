"""Two gloo processes under torchrun against one with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed.processes import run_on_two
from tests.equivalence.runs import assert_same, logged
from trimtab import OnDARE, OnTIES, ReferenceDelta
from trimtab.train.checkpoints import last_complete, read_marker

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

STEPS = 4
MERGES = {
    "ondare": {"name": "ondare", "merge_every": 1},
    "onties": {"name": "onties", "merge_every": 3},
}
KINDS = {"ondare": OnDARE, "onties": OnTIES}
# A large epsilon, because Adam's first steps are g/|g|: they make a whole step of a rounding error.
COMMON = {"lr": 1e-3, "reserve_rate": 0.5, "merge_weight": 1e-2, "weight_decay": 0.1, "eps": 1e-3}


def recipe(models: Any, pairs: Any, output: Path, optimizer: dict[str, Any], batch: int) -> dict[str, Any]:
    training = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": batch}
    section = {**COMMON, **optimizer}
    return tiny.recipe(models, pairs, output, optimizer=section, training=training, seed=3)


def regularised(models: Any, pairs: Any, output: Path, rows: Path, batch: int) -> dict[str, Any]:
    """Regularisers that take gradients of other rows, and the average that is kept."""
    section = {
        **MERGES["ondare"],
        "child_tuning": {"variant": "D", "rows": 3},
        "projection": {"data": str(rows), "rows": 5, "every": 2},
        "ema": {"coefficient": 0.5},
    }
    return recipe(models, pairs, output, section, batch=batch)


@pytest.fixture(scope="module")
def runs(tiny_models: Any, tiny_pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of the recipes: gradients, parameters and run folders."""
    folder = tmp_path_factory.mktemp("ddp")
    for name, merge in MERGES.items():
        values = recipe(tiny_models, tiny_pairs, folder / f"run-{name}", merge, batch=2)
        (folder / f"{name}.json").write_text(json.dumps(values))
    resumed = {**values, "output": values["output"] + "-resumed"}
    (folder / "onties_resumed.json").write_text(json.dumps(resumed))
    rows = tiny.write_rows(folder / "instructions.jsonl", tiny.instruction_rows(5, seed=3))
    values = regularised(tiny_models, tiny_pairs, folder / "run-regularised", rows, batch=2)
    (folder / "regularised.json").write_text(json.dumps(values))
    run_on_two("tests.distributed.train_worker", folder)
    return folder


def load(runs: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(runs / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", MERGES)
def test_both_processes_have_the_same_gradients_and_end_the_same(name: str, runs: Path) -> None:
    first, second = load(runs, name)
    assert len(first["gradients"]) == STEPS
    assert_same(first, second, name)
    saved = tiny.weights(runs / f"run-{name}" / "model")
    assert_same({key: first["final"][key] for key in saved}, saved, "model")


@pytest.mark.parametrize("name", MERGES)
def test_one_process_given_their_gradients_ends_the_same_bit_for_bit(
    name: str, runs: Path, tiny_models: Any
) -> None:
    """The optimizer, outside any trainer, fed what two processes reduced and clipped."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models[1])
    delta = ReferenceDelta.between(reference=tiny_models[1], base=tiny_models[0])
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if "norm" not in n], "weight_decay": COMMON["weight_decay"]},
        {"params": [(n, p) for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    settings = {key: COMMON[key] for key in ("reserve_rate", "merge_weight", "eps")}
    gap = MERGES[name]["merge_every"]
    optimizer = KINDS[name](groups, delta, lr=COMMON["lr"], merge_every=gap, seed=3, **settings)
    recorded = load(runs, name)[0]
    for step, gradients in enumerate(recorded["gradients"]):
        for group in optimizer.param_groups:
            group["lr"] = COMMON["lr"] * max(0.0, float(STEPS - step) / float(max(1, STEPS)))
        for key, parameter in named:
            parameter.grad = gradients[key]
        optimizer.step()
    optimizer.merge_now()
    assert_same({key: p.detach() for key, p in named}, recorded["final"], name)


@pytest.mark.parametrize("name", MERGES)
def test_two_processes_train_what_one_trains_with_the_same_global_batch(
    name: str, runs: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    """Sums have another order, so gradients agree to rounding only and top sets may differ in an entry."""
    one = tiny.train(recipe(tiny_models, tiny_pairs, tmp_path / name, MERGES[name], batch=4))
    ours, theirs = tiny.weights(one / "model"), tiny.weights(runs / f"run-{name}" / "model")
    start = tiny.weights(tiny_models[1])
    moved = torch.cat([(ours[key] - start[key]).abs().flatten() for key in ours])
    apart = torch.cat([(ours[key] - theirs[key]).abs().flatten() for key in ours])
    assert moved.max() > 1e-3
    assert (apart > 2e-6).float().mean() < (1e-3 if name == "onties" else 1e-9)
    losses = [[line["loss"] for line in logged(run) if "loss" in line] for run in (one, runs / f"run-{name}")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_resumed_pair_is_the_uninterrupted_pair(runs: Path) -> None:
    whole, resumed = runs / "run-onties", runs / "run-onties-resumed"
    marker = read_marker(last_complete(resumed))
    assert marker is not None
    assert marker["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= marker["files"].keys()
    assert (
        len(load(runs, "onties_resumed")[0]["gradients"]) == 2
    )  # only the steps after the cut were taken again
    assert_same(tiny.weights(resumed / "model"), tiny.weights(whole / "model"), "model")
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(last_complete(run) / name, weights_only=True) for run in (resumed, whole)]
        assert_same(*states, name)
    assert_same(logged(resumed), logged(whole), "metrics")


def test_regularisers_do_the_same_in_both_processes_and_what_they_do_in_one(
    runs: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    first, second = load(runs, "regularised")
    assert_same(first, second, "regularised")
    rows = runs / "instructions.jsonl"
    one = tiny.train(regularised(tiny_models, tiny_pairs, tmp_path / "one", rows, batch=4))
    ours, theirs = tiny.weights(one / "model"), tiny.weights(runs / "run-regularised" / "model")
    assert_same({key: first["final"][key] for key in theirs}, theirs, "model/ is the average")
    masked = torch.cat([gradient.flatten() == 0 for gradient in first["gradients"][0].values()])
    assert 0.69 < masked.float().mean() < 0.71
    apart = torch.cat([(ours[key] - theirs[key]).abs().flatten() for key in ours])
    assert (apart > 2e-6).float().mean() < 1e-3  # the mask may differ in an entry at its threshold
