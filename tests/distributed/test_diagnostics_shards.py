"""Two processes with a half of each parameter measure what one with all of it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.diagnostics_worker import EXACT, SAMPLED, SIZE
from tests.distributed.processes import run_module

pytestmark = pytest.mark.xdist_group("sharding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnostics")
    run_module("tests.distributed.diagnostics_worker", folder)
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
