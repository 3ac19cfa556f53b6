"""Two processes with a half of each parameter measure what one with all of it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.diagnostics_worker import EXACT, SAMPLED, SIZE

pytestmark = pytest.mark.xdist_group("sharding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, root = tmp_path_factory.mktemp("diagnostics"), Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.distributed.diagnostics_worker", str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def flattened(value: Any, name: str = "") -> dict[str, float]:
    """Every number, by its path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list | tuple):
        value = list(enumerate(value))
    else:
        return {name: float(value)}
    return {k: v for key, inner in value for k, v in flattened(inner, f"{name}/{key}").items()}


def measured(kind: str, folder: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """By one process with everything, and by each of those with a part."""
    alone = flattened(torch.load(folder / "alone.pt", weights_only=True)[kind])
    parts = [flattened(torch.load(folder / f"{rank}.pt", weights_only=True)[kind]) for rank in range(SIZE)]
    assert len(alone) > 40
    assert 0 < alone["/diagnostics/drift"] < 1
    assert parts[0] == parts[1]  # no process may find itself due, or warned, where the others are not
    return alone, parts


@pytest.mark.parametrize("kind", EXACT)
def test_shards_measure_what_the_whole_does(kind: str, folder: Path) -> None:
    alone, parts = measured(kind, folder)
    for part in parts:
        assert part == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("kind", SAMPLED)
def test_shards_sample_nearly_what_the_whole_does(kind: str, folder: Path) -> None:
    alone, parts = measured(kind, folder)
    for name in ("update", "delta", "drift", "kept_update"):
        assert parts[0][f"/diagnostics/{name}"] == pytest.approx(alone[f"/diagnostics/{name}"], rel=0.1)
