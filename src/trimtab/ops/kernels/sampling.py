"""A measuring step on an engine that does not measure: a sample is measured before it steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.ops import moments
from trimtab.ops.combine import Operator
from trimtab.ops.consensus import agreeing_terms
from trimtab.ops.kernels.engine import Engine
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.sums import SUMS, measure_each
from trimtab.ops.kernels.torch_engine import _Parts, update_dtype
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place
from trimtab.ops.sparsify import Thinning, l1_factor, thin, top_cut

BATCH = {"cpu": 1 << 16}
_ELSEWHERE = 1 << 22
"""Entries of several parameters that are measured together: a call of torch costs as much as a thousand."""
_LEAST, _SHARE, _RANGE, _BLOCK = 1 << 10, 256, 1 << 11, 256


def step_and_sample(engine: Engine, jobs: Sequence[Job], operator: Operator) -> Tensor:
    """Take the jobs' step, and measure a sample of what it merges (:func:`sampled`).

    Args:
        engine: what takes the step.
        jobs: what to step; those that do not merge are only stepped.
        operator: F and ⊕.

    Returns:
        float64 (jobs, SUMS) on the CPU.
    """
    sums = torch.zeros(len(jobs), len(SUMS), dtype=torch.float64, device="cpu")
    merging = [row for row, job in enumerate(jobs) if job.settings.merge]
    sums[merging] = sampled([jobs[row] for row in merging], operator)
    engine.step(jobs, operator)
    return sums


def sampled(jobs: Sequence[Job], operator: Operator) -> Tensor:
    """Estimate :func:`~trimtab.ops.kernels.sums.measure`'s sums of whole local parts from ranges of them.

    Of each one entry in 256 is measured, and 2¹⁰ at least, in ranges (:func:`ranges`). What a sample need not
    know is not asked for: which entries a random mask keeps (here others, as many, the same in each run;
    ``l1`` then restores by 1/p), and where ``top`` cuts Δ, unless that is settled already: the sample has its
    own cut. Of a τ that is held as F(τ), Σ F(τ)² is exact: the drift follows from it.

    Args:
        jobs: jobs that merge, before their step is taken; nothing of them is changed.
        operator: F and ⊕.

    Returns:
        float64 (jobs, SUMS) on the CPU.
    """
    sums = torch.zeros(len(jobs), len(SUMS), dtype=torch.float64, device="cpu")
    samples = [
        _Sample(row, job, list(ranges(job.layout.numel, job.settings.step))) for row, job in enumerate(jobs)
    ]
    for batch in _batches([sample for sample in samples if sample.job.layout.numel]):
        part = _measured(batch, operator)
        for sample, row in zip(batch, part, strict=True):
            sums[sample.row] = _whole(sample, row)
    return sums


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """The ranges ``low … high−1`` of ``count`` entries that are measured in a step.

    They begin at multiples of 256 (from where 8-bit moments can be read) and move from step to step.

    Examples:
        >>> list(ranges(1000, 1))
        [(0, 1000)]
        >>> [high - low for low, high in ranges(1_000_000, 1)]
        [1792, 1792]
    """
    wanted = max(_LEAST, count // _SHARE)
    if count <= wanted + _BLOCK:
        yield 0, count
        return
    windows, blocks = -(-wanted // _RANGE), count // _BLOCK
    length = wanted // windows // _BLOCK
    for i in range(windows):
        first, last = i * blocks // windows, (i + 1) * blocks // windows - length
        shift = (step * 0x9E3779B1 + i * 0x85EBCA77) % (1 << 32)
        low = first + (shift * (last - first + 1) >> 32)
        yield low * _BLOCK, (low + length) * _BLOCK


@dataclass(frozen=True)
class _Sample:
    """A job, its row, and which of its entries are measured."""

    row: int
    job: Job
    at: list[tuple[int, int]]

    @property
    def count(self) -> int:
        return sum(high - low for low, high in self.at)

    @property
    def masked(self) -> bool:
        assert self.job.tau is not None
        return self.job.tau.masked

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal for two of them to be measured together."""
        job = self.job
        tensors = (job.param, job.residual, job.exp_avg, job.max_exp_avg_sq, job.grad, job.anchor, job.update)
        return (
            job.settings,
            self.masked,
            job.param.device,
            job.stored,
            job.update_dtype,
            job.kept_dtype,
            job.anchor_decay,
            *(None if x is None else x.dtype for x in tensors),
        )


def _batches(samples: Sequence[_Sample]) -> Iterator[list[_Sample]]:
    kinds: dict[tuple[Any, ...], list[_Sample]] = {}
    for sample in samples:
        own, most = kinds.setdefault(sample.kind, []), BATCH.get(sample.job.param.device.type, _ELSEWHERE)
        if own and sum(one.count for one in own) + sample.count > most:
            yield own[:]
            own.clear()
        own.append(sample)
    yield from (own for own in kinds.values() if own)


def _measured(batch: Sequence[_Sample], operator: Operator) -> Tensor:
    """The sums over the entries that are measured, (samples, SUMS)."""
    counts = [sample.count for sample in batch]
    parts = _side_by_side(batch, sum(counts))
    base, update = parts.base_and_update(0, sum(counts))
    tau = torch.cat([_tau(sample) for sample in batch]).to(update)
    kept = _kept(batch, 0, update, operator)
    kept_tau = tau if batch[0].masked else _kept(batch, 1, tau, operator)
    terms = agreeing_terms([kept, kept_tau], batch[0].job.settings.weights, operator.consensus)
    return measure_each([base, update, kept, kept_tau, *terms], parts.kept_dtype, counts).cpu()


def _side_by_side(batch: Sequence[_Sample], count: int) -> _Parts:
    """The entries as one job's: copies, so that its moments may be advanced."""
    first = batch[0].job

    def cut(name: str) -> Any:
        if getattr(first, name) is None or (first.update is not None and name in _OF_ADAM):
            return None
        dtype, pieces = first.update_dtype or update_dtype(first.param.dtype), []
        for sample in batch:
            whole = getattr(sample.job, name)
            moment = name in ("exp_avg", "exp_avg_sq")
            flat = moments.flat(whole) if moment else whole.detach().reshape(-1)
            for low, high in sample.at:
                pieces.append(moments.read(flat, low, high, dtype) if moment else flat[low:high])
        return torch.cat(pieces)

    held = {name: cut(name) for name in (*_OF_ADAM, "param", "residual", "anchor", "update")}
    return _Parts(replace(first, layout=Layout.whole((count,)), cache=None, **held))


_OF_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad")


def _tau(sample: _Sample) -> Tensor:
    tau = sample.job.tau
    assert tau is not None
    return torch.cat([tau.dense(low, high) for low, high in sample.at])


def _kept(batch: Sequence[_Sample], which: int, x: Tensor, operator: Operator) -> Tensor:
    """F of what is measured of Δ (0) or τ (1)."""
    settings = batch[0].job.settings
    if operator.sparsify == "none" or settings.rate == 1:
        return x
    if operator.sparsify == "bernoulli":
        generator = torch.Generator(x.device).manual_seed(2 * settings.step + which)
        kept = torch.where(torch.rand(x.shape, generator=generator, device=x.device) < settings.rate, x, 0.0)
        return kept if operator.rescale == "none" else kept * (1 / settings.rate)
    parts = torch.split(x, [sample.count for sample in batch])
    kept_parts = [_largest(sample, which, part) for sample, part in zip(batch, parts, strict=True)]
    if operator.rescale == "l1":
        kept_parts = [kept * l1_factor(part, kept) for kept, part in zip(kept_parts, parts, strict=True)]
    return torch.cat(kept_parts)


def _largest(sample: _Sample, which: int, x: Tensor) -> Tensor:
    job, cut = sample.job, sample.job.cuts[which]
    if cut is None:
        count = max(1, round(job.count * x.numel() / job.layout.total))
        return thin([x], [Thinning(job.settings.rate, cut=top_cut(x, min(count, x.numel())))])[0]
    how, pieces = Thinning(job.settings.rate, cut=cut), []
    for (low, _), own in zip(sample.at, torch.split(x, [b - a for a, b in sample.at]), strict=True):
        pieces += thin([own], [how], Place(job.layout, low))
    return torch.cat(pieces)


def _whole(sample: _Sample, sums: Tensor) -> Tensor:
    """Sums of the whole local part; Σ F(τ)², and what survived of it, by what is known of τ."""
    job, count = sample.job, sample.count
    sums = sums * (job.layout.numel / count)
    if not sample.masked or count == job.layout.numel:
        return sums
    exact = sum(float(torch.dot(part, part)) for part in _values(job))
    kept, surviving = SUMS.index("kept_tau"), SUMS.index("surviving_tau")
    if float(sums[kept]) > 0:
        sums[surviving] *= exact / float(sums[kept])
    sums[kept] = exact
    return sums


def _values(job: Job) -> Iterator[Tensor]:
    """All values of τ that are not 0, in float64, some at a time."""
    assert job.tau is not None
    held = getattr(job.tau, "values", None)
    count = job.layout.numel if held is None else held.numel()
    size = 1 << 18 if job.param.device.type == "cpu" else max(count, 1)
    for low in range(0, count, size):
        part = job.tau.dense(low, min(low + size, count)) if held is None else held[low : low + size]
        yield part.to(torch.float64)
