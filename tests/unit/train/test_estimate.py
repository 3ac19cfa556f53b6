"""The dry run's numbers against a real training's."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests import tiny
from trimtab.recipe import make_recipe
from trimtab.terminal import plain_libraries
from trimtab.train import config_class
from trimtab.train.dpo import make_trainer
from trimtab.train.dry_run import gigabytes
from trimtab.train.estimate import count_steps, measure
from trimtab.train.optimizers import unwrapped
from trimtab.train.parts import gather_parts

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL


def test_steps_are_counted_as_the_trainer_counts_them(tmp_path: Path) -> None:
    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(torch.nn.Linear(1, 1), plain, train_dataset=[0])
    checked = 0
    for rows, epochs in product((1, 7, 8, 9, 33), (1.0, 2.0, 0.3, 2.5)):
        for batch, accumulation, drop in ((2, 1, False), (2, 3, False), (4, 2, True)):
            changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            arguments = replace(plain, num_train_epochs=epochs, dataloader_drop_last=drop, **changes)
            loader = torch.utils.data.DataLoader(range(rows), batch_size=batch, drop_last=drop)
            if len(loader):
                expected = trainer.set_initial_training_values(arguments, loader)[-1]
                assert count_steps(rows, arguments) == expected, (rows, epochs, changes)
                checked += 1
    assert checked == 56


def tensors_of(trainer: Any) -> dict[str, int]:
    """What is really allocated, by what it is for."""
    optimizer = unwrapped(trainer.optimizer)

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state(*names: str) -> int:
        return size(entry[name] for entry in optimizer.state.values() for name in names if name in entry)

    merging = getattr(optimizer, "merging", None)
    held = list(merging._held._entries.values()) if merging else []
    sizes = {
        "weights": size(trainer.model.parameters()),
        "gradients": size(p for p in trainer.model.parameters() if p.requires_grad),
        "Adam's moments": state("exp_avg", "exp_avg_sq"),
        "Adafactor's averages": state("row_var", "col_var", "variance"),
        "GaLore's projectors": state("projector"),
        "weights before the step": size(getattr(optimizer, "_before", {}).values()),
        "reference delta": sum(entry.tau.nbytes for entry in held),
        "delta before F": size(entry.source for entry in held if entry.source is not None),
        "anchor of step-K": state("merge_anchor"),
        "reference model": size(trainer.ref_model.parameters()) if trainer.ref_model is not None else 0,
    }
    return {name: size for name, size in sizes.items() if size}


WRAPPING = {"name": "online_merging", "sparsify": "bernoulli", "consensus": "linear"}


@pytest.mark.parametrize(
    ("optimizer", "training", "more"),
    [
        ({}, {}, {}),
        ({"name": "onties", "merge_every": 2}, {}, {}),
        ({"fidelity": "released"}, {}, {}),
        ({"name": "onties"}, {}, {"schedule": {"reserve_rate": {"type": "linear", "end": 0.5}}}),
        ({"state_dtype": "bfloat16", "delta_storage": "bfloat16"}, {}, {}),
        (tiny.ADAMW, {"precompute_ref_log_probs": True}, {"base": None}),
        (tiny.ADAMW, {}, {"base": None, "adapter": {"r": 4, "alpha": 8}}),
        ({**tiny.ADAMW, "name": "adafactor"}, {}, {"base": None}),
        ({**tiny.ADAMW, "name": "galore", "galore": {"rank": 8, "plain": "embed"}}, {}, {"base": None}),
        ({**WRAPPING, "inner": "galore", "galore": {"rank": 4}}, {}, {}),
        ({**WRAPPING, "inner": "adafactor", "merge_every": 2}, {}, {}),
    ],
    ids=[
        "ondare",
        "onties K=2",
        "released",
        "onties with p moving",
        "half",
        "adamw precomputed",
        "lora",
        "adafactor",
        "galore",
        "merging galore",
        "merging adafactor K=2",
    ],
)
def test_the_memory_estimate_is_what_a_training_holds(
    optimizer: dict[str, Any], training: dict[str, Any], more: dict[str, Any],
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path,
) -> None:  # fmt: skip
    training = {"max_steps": 2, "save_strategy": "no", **training}
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "o", optimizer=optimizer, training=training,
        evaluation={"at_start": False}, **more,
    )  # fmt: skip
    with plain_libraries():
        parts = gather_parts(make_recipe(values, config_class=config_class), resumes=False)
        size = measure(parts)
        trainer = make_trainer(parts)
        trainer.train()
    found = tensors_of(trainer)
    assert size.memory.keys() == found.keys()
    for what, expected in size.memory.items():  # a sparse τ has tables of blocks, and k is rounded up
        assert found[what] == pytest.approx(expected, abs=24 * 20 if what == "reference delta" else 0), what
    assert size.parameters == sum(p.numel() for p in trainer.model.parameters())
    assert size.trainable == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert size.steps == trainer.state.max_steps == 2


def test_bytes_are_spelled() -> None:
    assert gigabytes(7_000_000_000) == "7.00 GB"
