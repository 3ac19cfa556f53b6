"""Ranges, blocks and threads are no part of a merge's result, nor is who computes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracle import merging as oracle
from tests.property.strategies import as_float64
from tests.property.test_merging import FIDELITIES, LAYERS, random_model
from tests.unit.merge import made
from trimtab.merge import arithmetic, merge, run
from trimtab.merge.config import read_config


def everything() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    top = {"lambda": 1.3}
    sparse = {"weight": 0.7, "density": 0.37}
    found = []
    for fidelity in ("paper", "mergekit"):
        found += [
            ("linear", fidelity, {"weight": 0.3}, {}),
            ("task_arithmetic", fidelity, {"weight": 0.3}, top),
            ("ties", fidelity, sparse, top),
            ("ties", fidelity, sparse, {**top, "rescale": True}),
            ("dare_linear", fidelity, sparse, top),
            ("dare_ties", fidelity, sparse, {**top, "normalize": True}),
            ("slerp", fidelity, {}, {"t": 0.3}),
            ("hma", fidelity, {}, {"ratio": [0.1, 0.9]}),
        ]
    return found


KINDS = {
    "fp32": [torch.float32] * 3,
    "bf16": [torch.bfloat16] * 3,
    "fp64": [torch.float64] * 3,
    "mixed": [torch.bfloat16, torch.float32, torch.float16],
}


@pytest.fixture(scope="module", params=KINDS)
def folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[Path]:
    """A base and two models, with ties, and an empty and a scalar tensor."""
    place = tmp_path_factory.mktemp("models")
    shapes = [(37, 11), (5,), (), (0, 2), (129,)]
    found = []
    for seed, kind in enumerate(KINDS[request.param]):
        values = random_model(seed, shapes, True)
        tensors = {name: torch.tensor(value).to(kind) for name, value in values.items()}
        found.append(made.folder(place / str(seed), tensors, num_hidden_layers=LAYERS))
    return found


@pytest.fixture
def as_many_threads_as_before() -> Iterator[None]:
    """A merge leaves as many threads as it found, which below is what the test says it finds."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_many_threads_as_before")
@pytest.mark.parametrize(("method", "fidelity", "each", "shared"), everything())
def test_how_the_work_is_cut_and_who_does_it_is_no_part_of_the_result(
    method: str, fidelity: str, each: dict[str, Any], shared: dict[str, Any],
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ranges, blocks, threads; kernels or torch's operations."""
    base = None if method == "linear" else folders[0]
    models = folders[1:2] if method in ("slerp", "hma") else folders[1:]
    values = made.values_of(method, base, models, [each] * len(models), fidelity=fidelity, parameters=shared)
    first = merge(read_config(values), tmp_path / "first")
    before = (first / "model.safetensors").read_bytes()
    cuts = ((64, 16, 5, 3, True), (1 << 20, 7, 1 << 17, 1, True), (100, 100, 33, 2, False))
    for chunk, piece, block, threads, kernels in cuts:
        monkeypatch.setattr(run, "CHUNK", chunk)
        monkeypatch.setattr(run, "PIECE", piece)
        monkeypatch.setattr(arithmetic, "BLOCK", block)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        if not kernels:
            monkeypatch.setattr(arithmetic.Task, "native", False)
        out = merge(read_config(values), tmp_path / f"{chunk}-{piece}")
        assert (out / "model.safetensors").read_bytes() == before


@FIDELITIES
def test_a_tensor_of_many_blocks(fidelity: str, tmp_path: Path) -> None:
    """Larger than a block, than a piece, and than what a histogram counts at a time; ties at the cut."""
    count = 2 * arithmetic.BLOCK + 12_345
    chance = np.random.default_rng(5)
    base, *models = [np.round(chance.standard_normal(count) * 64) / 64 for _ in range(3)]
    paths = [
        made.folder(tmp_path / str(number), {"w": torch.tensor(values, dtype=torch.float32)})
        for number, values in enumerate([base, *models])
    ]
    each = [{"weight": 0.5, "density": 0.3}, {"weight": 1.5, "density": 0.01}]
    values = made.values_of("ties", paths[0], paths[1:], each, fidelity=fidelity)
    got = made.merged(tmp_path / "out", values)["w"]
    delta = [model - base for model in models]
    counting = oracle.paper_count if fidelity == "paper" else oracle.mergekit_count
    kept = [oracle.largest(d, counting(count, one["density"])) for d, one in zip(delta, each, strict=True)]
    a, b = (np.where(k, d, 0) * one["weight"] for k, d, one in zip(kept, delta, each, strict=True))
    sign = np.sign(a + b)
    if fidelity == "mergekit":
        sign = np.where(sign == 0, 1, sign)
    agreed = [np.where(term * sign > 0, term, 0) for term in (a, b)]
    votes = sum(np.where(term != 0, one["weight"], 0) for term, one in zip(agreed, each, strict=True))
    truth = base + sum(agreed) / np.where(votes == 0, 1, votes)
    assert np.abs(as_float64(got) - truth).max() <= 4 * 2**-23 * 8
