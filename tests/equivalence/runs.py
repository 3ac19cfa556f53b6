"""Whether two run folders hold the same training, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trimtab.train.checkpoints import last_complete

TIMING = ("time", "runtime", "per_second")
PER_CALL = ("train_loss", "total_flos", "merge/arrived_delta", "merge/arrived_update")
"""What is summed up over one call of ``train()``, or measured anew at the first merge of one."""


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Fail unless models, optimizers, schedulers, random states and logs are equal, bit for bit."""
    assert_same(tensors(ours / "model"), tensors(theirs / "model"), "model")
    first, second = last_complete(ours), last_complete(theirs)
    assert first is not None
    assert second is not None
    assert first.name == second.name
    assert_same(tensors(first), tensors(second), first.name)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        # These files were written by this test's own runs; the random state holds NumPy arrays.
        states = [torch.load(folder / name, weights_only=False) for folder in (first, second)]
        assert_same(*states, name)
    assert_same(logged(ours), logged(theirs), "metrics")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a model or adapter folder."""
    from safetensors.torch import load_file

    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.endswith(TIMING) and key not in PER_CALL
        }
        for line in lines
    ]


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Fail unless two nested values are equal, tensors and arrays bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    elif hasattr(ours, "tobytes"):
        assert ours.tobytes() == theirs.tobytes(), where
    else:
        assert ours == theirs, f"{where}: {ours} is not {theirs}"
