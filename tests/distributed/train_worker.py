"""One of the processes that torchrun starts: trains recipes and keeps what the optimizer was fed.

Usage: torchrun --nproc-per-node 2 -m tests.distributed.train_worker FOLDER

Trains every recipe FOLDER/NAME.json, in the order of their names, and writes FOLDER/NAME.RANK.pt with the
gradients of every step and the final parameters. NAME_resumed continues a copy of NAME's run, cut off.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests import tiny
from tests.equivalence.test_resume import cut_off
from trimtab.train import OnlineMergingMixin
from trimtab.train.optimizers import unwrapped

STEPS: list[dict[str, torch.Tensor]] = []


def keep_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    named = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    STEPS.append({name: p.grad.detach().clone() for name, p in named})


def create_optimizer(self: Any, model: Any = None) -> torch.optim.Optimizer:
    fresh = self.optimizer is None
    optimizer = create(self, model)
    if fresh:
        unwrapped(optimizer).register_step_pre_hook(keep_gradients)
        TRAINERS.append(self)
    return optimizer


create = OnlineMergingMixin.create_optimizer
TRAINERS: list[Any] = []


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")  # ours, so that it outlives the first of several trainings
    OnlineMergingMixin.create_optimizer = create_optimizer  # type: ignore[method-assign]
    for recipe in sorted(folder.glob("*.json")):
        values = json.loads(recipe.read_text())
        resumes = recipe.stem.endswith("_resumed")
        if resumes and rank == 0:
            whole = Path(values["output"].removesuffix("-resumed"))
            cut_off(whole, values["training"]["save_steps"], Path(values["output"]))
        distributed.barrier()
        STEPS.clear()
        tiny.train(values, resume=resumes)
        final = {name: p.detach().clone() for name, p in TRAINERS[-1].model.named_parameters()}
        torch.save({"gradients": STEPS, "final": final}, folder / f"{recipe.stem}.{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
