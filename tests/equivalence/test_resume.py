"""A training that is cut off and resumed is the training that was not, bit for bit, whatever is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.equivalence.runs import assert_same_run
from trimtab.train.checkpoints import checkpoint_folders

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

SCHEDULES = {
    "lr": {"type": "cosine", "warmup_steps": 2},
    "merge_weight": {"type": "linear", "warmup_steps": 3},
    "reserve_rate": {"type": "linear", "end": 0.4},
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ondare, K = 3, everything scheduled": (
        4,
        {"optimizer": {"merge_every": 3, "weight_decay": 0.1}, "schedule": SCHEDULES},
    ),
    "onties as released": (2, {"optimizer": {"name": "onties", "fidelity": "released"}}),
    "any pairing": (
        4,
        {"optimizer": {"name": "online_merging", "sparsify": "top", "consensus": "linear", "merge_every": 5}},
    ),
    "GaLore, merged, K = 3": (
        4,
        {
            "optimizer": {
                **{"name": "online_merging", "inner": "galore", "sparsify": "top", "consensus": "sign"},
                **{"galore": {"rank": 4, "update_proj_gap": 3}, "merge_every": 3, "lr": 0.01},
            }
        },
    ),
    "GaLore on bf16 weights": (
        2,
        {
            "base": None,
            "optimizer": {**tiny.ADAMW, "name": "galore", "galore": {"rank": 4, "update_proj_gap": 2}},
            "training": {"model_init_kwargs": {"dtype": "bfloat16"}},
        },
    ),
    "Adafactor, merged": (
        2,
        {
            "optimizer": {
                **{"name": "online_merging", "inner": "adafactor"},
                **{"sparsify": "bernoulli", "consensus": "linear"},
            }
        },
    ),
    "bf16 weights with residuals": (2, {"training": {"model_init_kwargs": {"dtype": "bfloat16"}}}),
    "bf16 autocast, checkpointing, accumulation": (
        4,
        {
            "training": {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
            "optimizer": {"rounding": "stochastic"},
        },
    ),
    "an adapter with dropout": (
        2,
        {"base": None, "optimizer": {**tiny.ADAMW, "lr": 0.05}, "adapter": {"r": 2, "dropout": 0.3}},
    ),
    "the end of an epoch": (
        12,
        {"training": {"max_steps": -1, "num_train_epochs": 2, "save_steps": 6, "logging_steps": 4}},
    ),
    "precomputed reference": (2, {"training": {"precompute_ref_log_probs": True}}),
    "rows as a stream": (4, {"data": {"streaming": True}}),
    "the best of the checkpoints is kept": (
        6,
        {
            "training": {
                "load_best_model_at_end": True,
                "metric_for_best_model": "rewards/margins",
                "greater_is_better": False,
                "save_steps": 3,
                "save_total_limit": 1,
            }
        },
    ),
    "killed after the last checkpoint": (6, {"optimizer": {"merge_every": 4}}),
}  # fmt: skip


def cut_off(run: Path, step: int, copy: Path) -> Path:
    """Copy a finished run and take away what a run killed soon after ``step`` would not have."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    (copy / "README.md").unlink()
    later = [folder for number, folder in checkpoint_folders(copy).items() if number > step]
    for folder in later[1:]:
        shutil.rmtree(folder)
    if later:
        (later[0] / "trimtab.json").unlink()
        (later[0] / "optimizer.pt").write_bytes(b"half")
    return copy


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    step, sections = CASES[name]
    sections = {**sections, "training": {"max_steps": 6, **sections.get("training", {})}}
    data = sections.pop("data", {})
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "whole", evaluation={"every": 3}, seed=5, **sections
    )
    values["data"] |= data
    whole = tiny.train(values)
    assert step in checkpoint_folders(whole)
    copy = cut_off(whole, step, tmp_path / "copy")
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)


def test_sft_with_dropout_resumes_in_the_middle_of_an_epoch(tiny_pairs: Any, tmp_path: Path) -> None:
    """Dropout draws from the global generator at every step, so its state must come back too."""
    tiny.write_models(tmp_path, dropout=0.3)
    values = {
        "method": "sft",
        "model": str(tmp_path / "base"),
        "data": {"train": str(tiny.write_rows(tmp_path / "rows.jsonl", tiny.instruction_rows(14)))},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 3,
            "logging_steps": 2,
        },
        "output": str(tmp_path / "whole"),
    }
    whole = tiny.train(values)
    assert list(checkpoint_folders(whole)) == [3, 6, 9, 12, 14]
    copy = cut_off(whole, 9, tmp_path / "copy")
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)
