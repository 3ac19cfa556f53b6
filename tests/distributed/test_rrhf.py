"""RRHF on two gloo processes: loss, gradients and metrics of one process with the same global batch.

Run as a module it is one of the processes: torchrun --nproc-per-node 2 -m tests.distributed.test_rrhf FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tests import tiny
from tests.distributed.processes import run_on_two

pytestmark = pytest.mark.xdist_group("train")

KINDS = ("sum", "token_mean")
SPLITS = {1: (2, 1), 2: (1, 2)}
"""Prompts of a micro-batch and how many are added up: four prompts on two processes, by the latter."""


def train(
    ft: Any, folder: Path, size: int, accumulated: int, *, evaluates_first: bool = False
) -> dict[str, Any]:
    """One step on four prompts with different numbers of responses; evaluation on the first three."""
    from datasets import Dataset

    from tests.unit.train.test_rrhf_trainer import SETTINGS, arguments, data, gradients
    from trimtab.train import OptimizerPlan
    from trimtab.train.rrhf_trainer import MergingRRHFTrainer, RRHFSettings

    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    model = tiny.model(tied=False)
    trainer = MergingRRHFTrainer(
        model,
        arguments(folder, per_device_eval_batch_size=1, eval_on_start=True, **split),
        settings=RRHFSettings(**SETTINGS, ft_normalization=ft),
        optimizer_plan=OptimizerPlan(lambda groups: torch.optim.SGD(groups, lr=1.0)),
        train_dataset=Dataset.from_list(data()),
        eval_dataset=Dataset.from_list(data()[:3]),
    )
    if evaluates_first:
        trainer.evaluate()
    slopes = gradients(model, trainer.train)
    first = next(line for line in trainer.state.log_history if "eval_loss" in line)
    held_out = {key: value for key, value in first.items() if not key.endswith(("time", "second"))}
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    judged = trainer.final_results()["rewards"]
    return {"gradients": slopes, "logged": logged, "held_out": held_out, "judged": judged}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rrhf-ddp")
    run_on_two("tests.distributed.test_rrhf", folder)
    return folder


@pytest.mark.parametrize("accumulated", SPLITS)
@pytest.mark.parametrize("ft", KINDS)
def test_two_processes_make_what_one_makes(ft: str, accumulated: int, runs: Path, tmp_path: Path) -> None:
    one = train(ft, tmp_path, size=4, accumulated=1)
    first, second = (torch.load(runs / f"{ft}.{accumulated}.{rank}.pt", weights_only=True) for rank in (0, 1))
    largest = max(float(slope.abs().max()) for slope in one["gradients"].values())
    assert largest > 0.01
    for name, slope in one["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        torch.testing.assert_close(first["gradients"][name], slope, rtol=1e-4, atol=2e-5 * largest)
    for part in ("logged", "held_out"):
        alone = {key: value for key, value in one[part].items() if key != "grad_norm"}
        together = {key: value for key, value in first[part].items() if key != "grad_norm"}
        assert together == pytest.approx(alone, rel=1e-4)
        assert any(key.endswith("loss") for key in alone)
    assert len(first["judged"]["scores"]) == 3
    assert first["judged"] == second["judged"]
    for found, known in zip(first["judged"]["scores"], one["judged"]["scores"], strict=True):
        assert found["ranks"] == known["ranks"]
        assert found["values"] == pytest.approx(known["values"], rel=1e-4)


def test_evaluating_first_leaves_the_processes_together(runs: Path) -> None:
    for rank in (0, 1):
        usual, found = (
            torch.load(runs / f"{name}.{rank}.pt", weights_only=True) for name in ("sum.1", "first")
        )
        for name, slope in usual["gradients"].items():
            assert torch.equal(found["gradients"][name], slope), name


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")  # ours, so that it outlives the first of several trainings
    for ft in KINDS:
        for accumulated, (size, count) in SPLITS.items():
            found = train(ft, folder / "run", size, count)
            torch.save(found, folder / f"{ft}.{accumulated}.{os.environ['RANK']}.pt")
    found = train("sum", folder / "run", 2, 1, evaluates_first=True)
    torch.save(found, folder / f"first.{os.environ['RANK']}.pt")
    sys.stdout.flush()
    # Everything is written. Taking the interpreter down would join gloo's threads, which now and then aborts
    # ("terminate called without an active exception") after the work is done.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
