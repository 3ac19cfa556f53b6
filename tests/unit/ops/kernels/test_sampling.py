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
from trimtab.ops.sparsify import top_cut

OPERATORS = [
    Operator("bernoulli"),
    Operator("bernoulli", "l1"),
    Operator("top", "l1"),
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
@pytest.mark.parametrize(("n", "masked"), [(1_200, False), (1_200, True), (70_001, False), (70_001, True)])
def test_stepping_is_the_same_and_small_tensors_are_measured_whole(
    operator: Operator, n: int, masked: bool
) -> None:
    ours, theirs = job_of(n, masked=masked), job_of(n, masked=masked)
    plain = job_of(40, merge=False)
    expected = measured(theirs, operator)
    (nothing, row) = step_and_sample(Silent(), [plain, ours], operator).tolist()
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert set(nothing) == {0.0}
    assert not torch.equal(plain.param, job_of(40).param)
    found = dict(zip(SUMS, row, strict=True))
    if n == 1_200 and operator.sparsify != "bernoulli":
        assert found == pytest.approx(expected, rel=1e-12)
    if n == 1_200:
        assert found["update"] == pytest.approx(expected["update"], rel=1e-12)
    if masked:
        assert found["kept_tau"] == pytest.approx(expected["kept_tau"], rel=1e-12)


def unchanged(jobs: list[Job], operator: Operator) -> torch.Tensor:
    """The sample's sums; the jobs are as they were."""
    names = ("param", "residual", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor", "update")
    tensors = [x for job in jobs for x in (getattr(job, name) for name in names) if x is not None]
    before = [x.clone() for x in tensors]
    sums = sampled(jobs, operator)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    return sums


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_comes_close(operator: Operator, masked: bool, formed: bool) -> None:
    """About 8,000 of 2 million entries: their noise, and that of where the ranges fall."""
    job = job_of(2_000_000, masked=masked)
    expected = measured(job_of(2_000_000, masked=masked), operator)
    if formed:
        TorchEngine().update([job])
    found = dict(zip(SUMS, unchanged([job], operator)[0].tolist(), strict=True))
    for name in SUMS:
        if name == "product":  # a sum of both signs: its size is what matters
            scale = (expected["kept_update"] * expected["kept_tau"]) ** 0.5
            assert abs(found[name] - expected[name]) < 0.1 * scale
        else:
            assert found[name] == pytest.approx(expected[name], rel=0.3), name
    survived = [sums["surviving_tau"] / (1e-6 * sums["kept_tau"]) for sums in (found, expected)]
    assert survived[0] == pytest.approx(survived[1], rel=0.05)


def test_a_settled_cut_is_kept_to() -> None:
    """In a shard the largest of the whole may be few: F is not the shard's own."""
    operator, n = Operator("top"), 1_200
    job, other = job_of(n), job_of(n)
    TorchEngine().update([job])
    cut = top_cut(job.update, 5)  # as if the other shards had nearly all of the k largest
    job.cuts = (cut, top_cut(job.tau.dense(0, n), 7))
    found = dict(zip(SUMS, unchanged([job], operator)[0].tolist(), strict=True))
    largest = job.update.double().square().sort(descending=True).values[:5].sum()
    assert found["kept_update"] == pytest.approx(float(largest))
    tau = other.tau.dense(0, n).double().square().sort(descending=True).values[:7].sum()
    assert found["kept_tau"] == pytest.approx(float(tau))


def test_jobs_are_measured_together_and_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever batches they come in, and in whatever company: top has no randomness of its own."""
    operator = Operator("top", consensus="sign")
    sizes = (700, 1, 1_200, 50_000, 0, 900)

    def jobs() -> list[Job]:
        made = [job_of(n, masked=n == 700, step=3 + (n == 900)) for n in sizes]
        made[2].exp_avg = made[2].exp_avg.bfloat16()
        return made

    alone = torch.cat([sampled([job], operator) for job in jobs()])
    together = unchanged(jobs(), operator)
    monkeypatch.setitem(sampling.BATCH, "cpu", 1)
    apart = sampled(jobs(), operator)
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)
    assert torch.allclose(apart, alone, rtol=1e-12, atol=0)
    assert together[4].tolist() == [0.0] * len(SUMS)


def test_ranges_lie_apart_within_the_tensor_and_move_from_step_to_step() -> None:
    for count in (3_000, (1 << 19) + 1, 1_234_567):
        seen, wanted = set(), max(1024, count // 256)
        for step in range(20):
            found = list(ranges(count, step))
            assert len(found) == -(-wanted // 2048)
            assert all(low % 256 == 0 and high - low <= 2048 for low, high in found)
            assert 0.75 * wanted < sum(high - low for low, high in found) <= wanted
            assert all(0 <= low < high <= count for low, high in found)
            assert all(a[1] <= b[0] for a, b in pairwise(found))
            seen.update(found)
        assert min(low for low, _ in seen) < 0.3 * count
        assert max(high for _, high in seen) > 0.7 * count
        assert len(seen) > 3
    assert list(ranges(1280, 1)) == [(0, 1280)]
    assert list(ranges(0, 1)) == [(0, 0)]


@pytest.mark.parametrize("kind", ["bf16 moments", "step-K", "around an optimizer", "residual", "amsgrad"])
def test_every_kind_of_job_can_be_sampled(kind: str) -> None:
    """A sample of everything is what the torch engine measures; nothing of the job has changed by it."""
    jobs = [job_of(1_250), job_of(1_250)]
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
    operator = Operator("top")
    found = unchanged(jobs[:1], operator)[0]
    expected = measured(jobs[1], operator)
    assert dict(zip(SUMS, found.tolist(), strict=True)) == pytest.approx(expected, rel=1e-12)
