"""Measuring a sample: whole where tensors are small, close where they are large; and steps do not change."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from trimtab.ops import Operator, split_master
from trimtab.ops.formats import hold_dense, hold_sparse
from trimtab.ops.kernels import sampling
from trimtab.ops.kernels.job import Job, Settings
from trimtab.ops.kernels.sampling import ranges, sampled, step_and_sample
from trimtab.ops.kernels.sums import SUMS
from trimtab.ops.kernels.torch_engine import TorchEngine
from trimtab.ops.layout import Layout

OPERATORS = [
    Operator("bernoulli"),
    Operator("bernoulli", "l1"),
    Operator("top", consensus="sign"),
    Operator("none"),
]


def job_of(n: int, *, masked: bool = False, merge: bool = True, step: int = 3) -> Job:
    generator = torch.Generator().manual_seed(n)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(n, generator=generator) * scale

    tau = draw(1e-3) * torch.linspace(0.5, 1.5, n)
    kept = torch.where(torch.rand(n, generator=generator) < 0.3, tau, 0.0)
    settings = Settings(merge, (0.999, 1e-3), 0.3, step=step, lr=1e-6)
    moments: dict[str, Any] = {"exp_avg": draw(1e-3), "exp_avg_sq": draw(1e-3).square_() + 1e-6}
    job = Job("w", 7, Layout.whole((n,)), draw(0.02), "nearest", **moments)
    job.grad, job.settings, job.count = draw(1e-3), settings, n * 3 // 10
    job.tau = hold_sparse(kept) if masked else hold_dense(tau)
    return job


def measured(job: Job, operator: Operator) -> dict[str, float]:
    sums = torch.zeros(1, len(SUMS), dtype=torch.float64)
    TorchEngine().step([job], operator, sums)
    return dict(zip(SUMS, sums[0].tolist(), strict=True))


class Silent(TorchEngine):
    """The torch engine as one that does not measure."""

    measures = False

    def step(self, jobs: Any, operator: Operator, sums: Any = None) -> None:
        assert sums is None
        super().step(jobs, operator)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("n", "masked"), [(5_000, False), (5_000, True), (70_001, False), (70_001, True)])
def test_stepping_is_the_same_and_small_tensors_are_measured_whole(
    operator: Operator, n: int, masked: bool
) -> None:
    ours, theirs = job_of(n, masked=masked), job_of(n, masked=masked)
    plain = job_of(40, merge=False)
    expected = measured(theirs, operator)
    (row, nothing) = step_and_sample(Silent(), [ours, plain], operator).tolist()
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.update is None
    assert set(nothing) == {0.0}
    assert not torch.equal(plain.param, job_of(40).param)
    found = dict(zip(SUMS, row, strict=True))
    if n == 5_000:
        assert found == pytest.approx(expected, rel=1e-12)
    if masked:
        assert found["kept_tau"] == pytest.approx(expected["kept_tau"], rel=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_comes_close(
    operator: Operator, masked: bool, formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 ranges, 8,192 of 300,000 entries: the noise of few, and of where the ranges fall."""
    monkeypatch.setitem(sampling._SIZES, "cpu", (512, 300_000 // 16, 1 << 12))
    job = job_of(300_000, masked=masked)
    expected = measured(job_of(300_000, masked=masked), operator)
    before = [job.param.clone(), job.exp_avg.clone(), job.exp_avg_sq.clone()]
    if formed:
        TorchEngine().update([job])
        before[1:] = job.exp_avg.clone(), job.exp_avg_sq.clone()
    found = dict(zip(SUMS, sampled(job, operator).tolist(), strict=True))
    after = [job.param, job.exp_avg, job.exp_avg_sq]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for name in SUMS:
        if name == "product":  # a sum of both signs: its size is what matters
            scale = (expected["kept_update"] * expected["kept_tau"]) ** 0.5
            assert abs(found[name] - expected[name]) < 0.1 * scale
        else:
            assert found[name] == pytest.approx(expected[name], rel=0.15), name
    survived = [sums["surviving_tau"] / (1e-6 * sums["kept_tau"]) for sums in (found, expected)]
    assert survived[0] == pytest.approx(survived[1], rel=0.05)


def test_ranges_lie_apart_within_the_tensor_and_move_from_step_to_step() -> None:
    for count in ((1 << 15) + 300, (1 << 19) + 1, 1_234_567):
        seen = set()
        for step in range(20):
            found = list(ranges(count, step))
            assert len(found) == -(-count // (1 << 19))
            assert all(low % 256 == 0 and high - low == 1 << 13 for low, high in found)
            assert all(0 <= low < high <= count for low, high in found)
            assert all(a[1] <= b[0] for a, b in pairwise(found))
            seen.update(found)
        assert len(seen) > 15 * len(found)
        assert min(low for low, _ in seen) < 0.3 * count
        assert max(high for _, high in seen) > 0.7 * count
    assert list(ranges(1 << 15, 1)) == [(0, 1 << 15)]
    assert [high - low for low, high in ranges(1 << 24, 1, "cuda")] == [1 << 18]


def test_an_empty_part_measures_nothing() -> None:
    job = job_of(0)
    TorchEngine().update([job])
    assert sampled(job, Operator("bernoulli")).tolist() == [0.0] * len(SUMS)


@pytest.mark.parametrize("kind", ["bf16 moments", "step-K", "around an optimizer", "residual", "amsgrad"])
def test_every_kind_of_job_can_be_sampled(kind: str) -> None:
    """A sample of everything is what the torch engine measures; nothing of the job has changed by it."""
    jobs = [job_of(4_000), job_of(4_000)]
    for job in jobs:
        if kind == "bf16 moments":
            job.exp_avg, job.exp_avg_sq = job.exp_avg.bfloat16(), job.exp_avg_sq.bfloat16()
        elif kind == "step-K":
            job.anchor, job.anchor_decay = job.param * 1.01, 0.999
        elif kind == "around an optimizer":
            job.anchor, job.grad, job.exp_avg, job.exp_avg_sq = job.param * 1.01, None, None, None
        elif kind == "residual":
            job.param, job.residual = split_master(job.param, torch.bfloat16)
            job.stored = "residual"
        else:
            job.max_exp_avg_sq = job.exp_avg_sq * 2
    found = sampled(jobs[0], OPERATORS[0])
    expected = measured(jobs[1], OPERATORS[0])
    assert dict(zip(SUMS, found.tolist(), strict=True)) == pytest.approx(expected, rel=1e-12)
    TorchEngine().step([jobs[0]], OPERATORS[0])
    for name in ("param", "residual", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor"):
        one, other = (getattr(job, name) for job in jobs)
        assert one is None if other is None else torch.equal(one, other), name
