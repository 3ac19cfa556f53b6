"""A measuring step on an engine that does not measure: it steps, and a sample of the entries is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trimtab.ops.combine import Operator
from trimtab.ops.consensus import agreeing_terms
from trimtab.ops.kernels.engine import Engine
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.sums import SUMS, measure
from trimtab.ops.kernels.torch_engine import _Parts, thinnings
from trimtab.ops.masks import Place
from trimtab.ops.sparsify import thin

_SIZES = {"cpu": (1 << 12, 1 << 18, 1 << 15)}
_ELSEWHERE = (1 << 18, 1 << 24, 1 << 21)
"""(Entries of a range, entries that it stands for, entries up to which a tensor is measured whole)."""


def step_and_sample(engine: Engine, jobs: Sequence[Job], operator: Operator) -> Tensor:
    """Take the jobs' step, and measure a sample of the merges.

    The engine forms Δ in full, one job at a time; torch measures ranges of it (:func:`sampled`); the engine
    goes on from there. What is stepped is the same, bit for bit, as without measuring.

    Args:
        engine: what takes the step.
        jobs: what to step; those that do not merge are only stepped.
        operator: F and ⊕.

    Returns:
        float64 (jobs, SUMS) on the CPU.
    """
    sums = torch.zeros(len(jobs), len(SUMS), dtype=torch.float64)
    for row, job in enumerate(jobs):
        if job.settings.merge:
            engine.update([job])
            _settle(job, operator)  # once, for the sample and for the engine
            sums[row] = sampled(job, operator)
            engine.step([job], operator)
            job.update, job.cuts, job.factors = None, (None, None), None
    plain = [job for job in jobs if not job.settings.merge]
    if plain:
        engine.step(plain, operator)
    return sums


def _settle(job: Job, operator: Operator) -> None:
    """Find what depends on the whole tensor: where top cuts, how l1 rescales."""
    update, tau = thinnings(job, operator)
    job.cuts = update.cut, tau.cut
    if operator.rescale == "l1":
        job.factors = update.factor, tau.factor


def sampled(job: Job, operator: Operator) -> Tensor:
    """Estimate :func:`~trimtab.ops.kernels.sums.measure`'s sums of a whole local part from ranges of it.

    Tensors up to 2¹⁵ entries are measured whole, others in ranges of 2¹² of every 2¹⁸ neighbours (on an
    accelerator 2²¹, 2¹⁸, 2²⁴), at places that change with the step. Of a τ that is held as F(τ), Σ F(τ)² is
    exact: the drift follows from it.

    Args:
        job: a job that merges and whose Δ is formed; nothing of it is changed.
        operator: F and ⊕.

    Returns:
        float64 tensor of ``len(SUMS)``.
    """
    assert job.tau is not None
    if job.layout.numel == 0:
        return torch.zeros(len(SUMS), dtype=torch.float64)
    parts, how = _Parts(job), thinnings(job, operator)
    pieces = []
    for low, high in ranges(job.layout.numel, job.settings.step, job.param.device.type):
        base, update = parts.base_and_update(low, high)
        tau = job.tau.dense(low, high).to(update)
        pieces.append((base, update, *thin([update, tau], how, Place(job.layout, low))))
    base, update, kept, tau = (torch.cat(part) for part in zip(*pieces, strict=True))
    terms = agreeing_terms([kept, tau], job.settings.weights, operator.consensus)
    sums = measure(base, update, kept, tau, terms, parts.kept_dtype).cpu() * (job.layout.numel / base.numel())
    return _with_known_tau(sums, job) if job.tau.masked and base.numel() < job.layout.numel else sums


def ranges(count: int, step: int, device: str = "cpu") -> Iterator[tuple[int, int]]:
    """The ranges ``low … high−1`` of ``count`` entries that are measured in a step.

    Examples:
        >>> list(ranges(1000, 1))
        [(0, 1000)]
        >>> [high - low for low, high in ranges(1_000_000, 1)]
        [4096, 4096, 4096, 4096]
    """
    size, window, whole = _SIZES.get(device, _ELSEWHERE)
    if count <= whole:
        yield 0, count
        return
    windows = -(-count // window)
    for i in range(windows):
        first, last = i * count // windows, (i + 1) * count // windows
        shift = (step * 0x9E3779B1 + i * 0x85EBCA77) % (1 << 32)
        low = first + (shift * (last - first - size + 1) >> 32)
        yield low, low + size


def _with_known_tau(sums: Tensor, job: Job) -> Tensor:
    """Put Σ F(τ)² in the place of its estimate, and correct by as much what has survived of it."""
    exact = sum(float(torch.dot(part, part)) for part in _values(job))
    kept, surviving = SUMS.index("kept_tau"), SUMS.index("surviving_tau")
    if float(sums[kept]) > 0:
        sums[surviving] *= exact / float(sums[kept])
    sums[kept] = exact
    return sums


def _values(job: Job) -> Iterator[Tensor]:
    """All values of τ that are not 0, in float64, a window at a time."""
    assert job.tau is not None
    size, held = _SIZES.get(job.param.device.type, _ELSEWHERE)[1], getattr(job.tau, "values", None)
    count = job.layout.numel if held is None else held.numel()
    for low in range(0, count, size):
        part = job.tau.dense(low, min(low + size, count)) if held is None else held[low : low + size]
        yield part.to(torch.float64)
