"""Two processes with shards or replicas of a model are regularised as one with all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.processes import run_module
from tests.distributed.regulariser_worker import ELEMENTWISE, KINDS, OF_WHOLE_TENSORS, SIZE

pytestmark = pytest.mark.xdist_group("sharding")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process has found, and each of two."""
    folder = tmp_path_factory.mktemp("regularisers")
    run_module("tests.distributed.regulariser_worker", folder)
    alone = torch.load(folder / "alone.pt", weights_only=True)
    return alone, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for what, tensors in ours.items():
        for one, other in zip(tensors, theirs[what], strict=True):
            assert torch.allclose(one, other, rtol=0, atol=tolerance), what


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_shards_are_regularised_as_the_whole(kind: str, found: Any) -> None:
    alone, parts = found
    for part in parts:
        same(part["shards"][kind], alone[kind], 1e-6)
    same(parts[0]["shards"][kind], parts[1]["shards"][kind], 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_are_the_same_in_all_processes_and_those_of_one(kind: str, found: Any) -> None:
    alone, parts = found
    for part in parts:
        same(part["replicas"][kind], alone[kind], 1e-6)
    same(parts[0]["replicas"][kind], parts[1]["replicas"][kind], 0.0)


def test_the_average_of_shards_is_swapped_in_and_out(found: Any) -> None:
    _, parts = found
    ema = parts[0]["shards"]["ema"]
    same({"x": ema["swapped in"]}, {"x": ema["averages"]}, 0.0)
    same({"x": ema["swapped out"]}, {"x": ema["parameters"]}, 0.0)


@pytest.mark.parametrize("kind", OF_WHOLE_TENSORS)
def test_what_needs_whole_tensors_refuses_shards(kind: str, found: Any) -> None:
    _, parts = found
    for part in parts:
        assert "needs whole parameters, and these are sharded" in part["refused"][kind]
