"""What trainers are guarded against, on two gloo processes: training apart, losses that are not finite.

Run as a module it is one of the processes: torchrun --nproc-per-node 2 -m tests.distributed.test_guard_ddp F
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tests import tiny
from tests.distributed.processes import run_on_two
from tests.equivalence.runs import assert_same

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

METHODS = ("sft", "reward", "grpo")
"""Where there is no second model (sft, reward), accelerate prepares the policy when it is evaluated."""


def recipe(folder: Path, method: str, name: str, **sections: Any) -> dict[str, Any]:
    training = {"max_steps": 2, "per_device_train_batch_size": 2, **sections.pop("training", {})}
    loss = {"rewards": "tests.unit.train.rules:letters", "max_new_tokens": 4, "num_generations": 4}
    rows = "instructions" if method == "sft" else "pairs"
    return tiny.recipe(
        (folder / "base", folder / "reference"),
        (folder / f"{rows}.jsonl", folder / f"{rows}.jsonl"),
        folder / name,
        **{
            "method": method,
            "loss": loss if method == "grpo" else {},
            "evaluation": {"at_start": False},
            "training": {"per_device_eval_batch_size": 2, **training},
            **sections,
        },
    )


def poisoned_recipe(folder: Path, method: str) -> dict[str, Any]:
    """Two micro-batches a step; one of eight rows has a letter whose embedding is not a number."""
    values = recipe(
        folder,
        method,
        f"poisoned-{method}",
        model=str(folder / "poisoned"),
        reference=str(folder / "poisoned"),
        optimizer=tiny.ADAMW,
        base=None,
        training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2},
    )
    values["data"] = {"train": str(folder / "one-bad.jsonl"), "max_length": 64}
    return values


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard-ddp")
    tiny.write_models(folder)
    tiny.write_poisoned_model(folder / "poisoned", "%")
    tiny.write_rows(folder / "pairs.jsonl", tiny.preference_rows(8))
    tiny.write_rows(folder / "instructions.jsonl", tiny.instruction_rows(8))
    rows = tiny.preference_rows(8)
    rows[5]["prompt"][0]["content"] = "say 100 %"
    tiny.write_rows(folder / "one-bad.jsonl", rows)
    run_on_two("tests.distributed.test_guard_ddp", folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_evaluating_first_leaves_the_processes_together(method: str, runs: Path) -> None:
    first, second = (torch.load(runs / f"{method}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first["evaluated"], second["evaluated"], method)
    if method != "grpo":  # its evaluation draws answers, so training goes on with other random numbers
        assert_same(first["evaluated"], first["usual"], method)


def test_the_row_of_another_process_is_named(runs: Path) -> None:
    said = [(runs / f"poisoned.{rank}").read_text() for rank in (0, 1)]
    for sentence in said:
        assert "on the rows 'say 100 %', so training stopped before it" in sentence
    assert sum("the loss is nan at step" in sentence for sentence in said) == 1
    assert sum("the loss is not finite on another process at step" in sentence for sentence in said) == 1


def weights_after(values: dict[str, Any], *, evaluates_first: bool) -> dict[str, torch.Tensor]:
    from trimtab.recipe import make_recipe
    from trimtab.terminal import plain_libraries
    from trimtab.train import config_class
    from trimtab.train.parts import gather_parts

    with plain_libraries():
        parts = gather_parts(make_recipe(values, config_class=config_class), resumes=False)
        trainer = import_module(f"trimtab.train.{values['method']}").make_trainer(parts)
        if evaluates_first:
            trainer.evaluate()
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def main(folder: Path) -> None:
    from trimtab import UserError

    rank = os.environ["RANK"]
    distributed.init_process_group("gloo")  # ours, so that it outlives the first of several trainings
    for method in METHODS:
        found = {
            name: weights_after(
                recipe(folder, method, f"{method}-{name}"), evaluates_first=name == "evaluated"
            )
            for name in ("usual", "evaluated")
        }
        torch.save(found, folder / f"{method}.{rank}.pt")
    try:
        tiny.train(poisoned_recipe(folder, "dpo"))
    except UserError as error:
        (folder / f"poisoned.{rank}").write_text(str(error))
    sys.stdout.flush()
    os._exit(0)  # taking the interpreter down would join gloo's threads, which now and then aborts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
