"""2 and 4 gloo processes with parts of the parameters against one with all of them, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.distributed.processes import run_module
from tests.distributed.shard_cases import (
    CASES,
    RESUMED,
    RESUMED_IN_FULL,
    SAVED_AFTER,
    STEPS,
    TRANSFORMERS,
    WAYS,
    Net,
    reference_model,
    run_alone,
    write_delta,
)
from trimtab import OnTIES, ReferenceDelta

# One worker: all look at one session's results.
pytestmark = [pytest.mark.xdist_group("sharding"), pytest.mark.timeout(600)]

RUNS = [(size, way, case) for size, ways in WAYS.items() for way, cases in ways.items() for case in cases]
SHAPES = {name: p.shape for name, p in Net().named_parameters()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 and then 4 processes have written."""
    folder = tmp_path_factory.mktemp("shards")
    write_delta(folder)
    tiny.write_models(folder)
    run_module("tests.distributed.shard_worker", folder, timeout=580)
    return folder


@pytest.fixture(scope="session")
def results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """For each number of processes, what each of them has found."""
    return {
        size: [torch.load(folder / f"{size}.{rank}.pt", weights_only=True) for rank in range(size)]
        for size in WAYS
    }


@pytest.fixture(scope="session")
def alone(folder: Path) -> Any:
    """One process's parameters, by case."""
    return cache(lambda case: run_alone(folder, CASES[case], range(1, STEPS + 1)))


def assembled(parts: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """The unsharded parameters; entries that several processes have must agree."""
    whole = {}
    for name, shape in SHAPES.items():
        values = torch.full((shape.numel(),), float("nan"), dtype=parts[0][name][1].dtype)
        for part in parts:
            index, local = (t.reshape(-1) for t in part[name])
            known = values[index]
            assert ((known == local) | known.isnan()).all(), f"replicas of {name} differ"
            values[index] = local
        whole[name] = values.view(shape)
    return whole


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("size", "way", "case"), RUNS)
def test_processes_with_parts_end_where_one_with_all_does(
    size: int, way: str, case: str, results: Any, alone: Any
) -> None:
    assert_equal(assembled([found["runs"][way, case] for found in results[size]]), alone(case))


def test_the_runs_are_of_different_things(folder: Path, alone: Any) -> None:
    """No two cases end alike, all have moved what has a gradient, and nothing else."""
    ends = [alone(case) for case in CASES]
    for case, end in zip(CASES, ends, strict=True):
        start = dict(reference_model(folder, CASES[case].dtype).named_parameters())
        still = {name for name in start if torch.equal(start[name], end[name])}
        assert still == {"frozen"}, case
    pairs = [
        (a, b) for i, a in enumerate(ends) for b in ends[:i] if a["up.weight"].dtype == b["up.weight"].dtype
    ]
    assert not any(torch.equal(a["embed.weight"], b["embed.weight"]) for a, b in pairs)


@pytest.mark.parametrize("size", WAYS)
def test_layouts_say_where_torch_has_put_the_entries(size: int, results: Any) -> None:
    uneven, empty = set(), set()
    for way in WAYS[size]:
        for found in results[size]:
            where = found["runs"][way, "onties"]
            for name, indices in found["layouts"][way].items():
                assert torch.equal(indices, where[name][0].view(indices.shape)), (way, name)
                if indices.numel() == 0:
                    empty.add(name)
        sizes = {found["layouts"][way]["embed.weight"].shape[0] for found in results[size]}
        uneven |= sizes if len(sizes) > 1 else set()
    assert empty == {2: {"row"}, 4: {"row", "frozen", "head.weight", "head.bias"}}[size]
    assert uneven, "97 rows are shared unevenly"


@pytest.mark.parametrize(("size", "way", "case"), RUNS)
def test_only_this_process_s_part_of_tau_is_read(size: int, way: str, case: str, results: Any) -> None:
    if "int8" in case or "state" in case:
        pytest.skip("reads what its blocks need beside")
    for found in results[size]:
        read, where = found["read"][way, case], found["runs"][way, case]
        part = {
            name: index
            for name, (index, _) in where.items()
            if name not in ("frozen", "head.weight", "head.bias")
        }
        whole = {name for name, index in part.items() if index.numel() == SHAPES[name].numel()}
        assert set(read["whole"]) == whole
        entries = dict.fromkeys(part, 0)
        for name, _, count in read["parts"]:
            entries[name] += count
        assert entries == {n: 0 if n in whole else i.numel() for n, i in part.items()}, "each once"


@pytest.mark.parametrize("case", RESUMED)
def test_two_processes_checkpoint_is_continued_by_four(case: str, results: Any, alone: Any) -> None:
    assert_equal(assembled([found["resumed"][case] for found in results[4]]), alone(case))


@pytest.mark.parametrize("case", RESUMED_IN_FULL)
def test_a_checkpoint_gathered_into_one_file_is_continued_by_four(
    case: str, results: Any, alone: Any
) -> None:
    assert_equal(assembled([found["resumed in full"][case] for found in results[4]]), alone(case))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("size", WAYS)
@pytest.mark.parametrize("case", RESUMED)
def test_a_sharded_checkpoint_is_continued_by_one_process(
    case: str, size: int, folder: Path, results: Any, alone: Any
) -> None:
    saved = folder / "saved" / f"{size} {case}"
    steps = range(SAVED_AFTER + 1, STEPS + 1)
    assert_equal(run_alone(folder, CASES[case], steps, resume=saved), alone(case))


def test_accelerate_swaps_the_parameters_of_a_built_optimizer(results: Any, alone: Any) -> None:
    parts = [found["runs"]["accelerate's order", "onties"] for found in results[2]]
    assert_equal(assembled(parts), alone("onties"))


def test_transformers_shards_at_loading(folder: Path, results: Any) -> None:
    """Given the gradients of two processes, one process ends where they do."""
    from transformers import AutoModelForCausalLM

    found = [result["transformers"] for result in results[2]]
    assert_equal(found[0]["end"], found[1]["end"])
    model = AutoModelForCausalLM.from_pretrained(folder / "reference")
    delta = ReferenceDelta.between(reference=folder / "reference", base=folder / "base")
    optimizer = OnTIES(model.named_parameters(), delta, **TRANSFORMERS)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for gradients in found[0]["gradients"]:
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        optimizer.step()
    end = {name: p.detach() for name, p in model.named_parameters()}
    assert_equal(end, found[0]["end"])
    assert all(not torch.equal(end[name], start[name]) for name in end)
    for one in found:
        assert one["read"]["whole"] == []
        assert {name: count for name, _, count in one["read"]["parts"]} == one["local"]


def test_what_processes_disagree_on_is_said_by_all_of_them(results: Any) -> None:
    for found in results[2]:
        assert "have gradients of different ones" in found["refused"]["gradients differ"]
        assert "policy differs" in found["refused"]["policy differs"]
        assert "1 of 7 parameters (embed.weight)" in found["refused"]["policy differs"]
