"""Several processes measure a delta, each a share of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.delta import checkpoints as made
from tests.unit.ops.fake_processes import Ring, processes
from trimtab.delta import ReferenceDelta
from trimtab.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return made.written(made.llama(1), folder / "r"), made.written(made.llama(0), folder / "b")


def opened(folders: tuple[Path, Path]) -> ReferenceDelta:
    return ReferenceDelta.between(reference=folders[0], base=folders[1])


def together(delta: ReferenceDelta, rank: int, ring: Ring) -> tuple[Any, list[str]]:
    """The record that one process finds, and what it has read for it."""
    read, terms = [], delta._tensors.terms

    def noted(name: str) -> Any:
        read.append(name)
        return terms(name)

    delta._tensors.terms = noted  # type: ignore[method-assign]
    return delta.measure_together(rank, lambda value: ring.gather(rank, value)), read


def test_all_find_what_one_finds_and_read_a_third_each(folders: tuple[Path, Path]) -> None:
    alone = opened(folders)
    results, _ = processes(3, lambda rank, ring: together(opened(folders), rank, ring))
    assert all(record == alone.measure() for record, _ in results)
    assert sorted(name for _, read in results for name in read) == sorted(alone.names()), "each once"
    sizes = [sum(math.prod(alone.shape(name)) for name in read) for _, read in results]
    assert max(sizes) - min(sizes) <= max(math.prod(alone.shape(name)) for name in alone.names())


def test_a_record_that_one_has_serves_all(folders: tuple[Path, Path]) -> None:
    deltas = [opened(folders) for _ in range(2)]
    known = deltas[1].measure()
    results, _ = processes(2, lambda rank, ring: together(deltas[rank], rank, ring))
    assert results == [(known, []), (known, [])]
    assert deltas[0].fingerprint == known.fingerprint


def test_what_one_refuses_all_refuse(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = made.llama(1)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = math.nan
    pair = made.written(broken, tmp_path / "broken"), folders[1]
    said = []

    def work(rank: int, ring: Ring) -> None:
        with pytest.raises(UserError) as error:
            together(opened(pair), rank, ring)
        said.append(str(error.value))

    processes(3, work)
    assert len(said) == 3
    assert len(set(said)) == 1
    assert "lm_head.weight" in said[0]
