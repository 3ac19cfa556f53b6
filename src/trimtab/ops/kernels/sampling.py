"""A measuring step on an engine that does not measure: a sample is measured before it steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.ops import moments
from trimtab.ops.combine import Operator
from trimtab.ops.consensus import agreeing_terms
from trimtab.ops.kernels.engine import Engine
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.sums import SUMS, measure
from trimtab.ops.kernels.torch_engine import _Parts, thinnings
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place
from trimtab.ops.sparsify import Thinning, l1_factor, thin, top_cut

_SIZES = {"cpu": (1 << 13, 1 << 19, 1 << 15)}
_ELSEWHERE = (1 << 18, 1 << 24, 1 << 21)
"""(Entries of a range, entries that it stands for, entries up to which a tensor is measured whole)."""
_BLOCK = 256
"""Ranges begin at multiples of this: 8-bit moments can be read from there."""


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
    for row, job in enumerate(jobs):
        if job.settings.merge:
            sums[row] = sampled(job, operator)
    engine.step(jobs, operator)
    return sums


def sampled(job: Job, operator: Operator) -> Tensor:
    """Estimate :func:`~trimtab.ops.kernels.sums.measure`'s sums of a whole local part from ranges of it.

    Tensors up to 2¹⁵ entries are measured whole, others in ranges of 2¹³ of every 2¹⁹ neighbours (on an
    accelerator 2²¹, 2¹⁸, 2²⁴), at places that change with the step. Where Δ has not been formed, the cut of
    ``top`` and the factor of ``l1`` are the sample's own. Of a τ that is held as F(τ), Σ F(τ)² is exact: the
    drift follows from it.

    Args:
        job: a job that merges, before its step is taken; nothing of it is changed.
        operator: F and ⊕.

    Returns:
        float64 tensor of ``len(SUMS)`` on the CPU.
    """
    assert job.tau is not None
    if job.layout.numel == 0:
        return torch.zeros(len(SUMS), dtype=torch.float64, device="cpu")
    at = list(ranges(job.layout.numel, job.settings.step, job.param.device.type))
    part = _part(job, at)
    base, update = part.base_and_update(0, part.job.layout.numel)
    tau = torch.cat([job.tau.dense(low, high).to(update) for low, high in at])
    kept, kept_tau = _thinned(job, operator, [update, tau], at)
    terms = agreeing_terms([kept, kept_tau], job.settings.weights, operator.consensus)
    sums = measure(base, update, kept, kept_tau, terms, part.kept_dtype).cpu()
    sums *= job.layout.numel / base.numel()
    return _with_known_tau(sums, job) if job.tau.masked and base.numel() < job.layout.numel else sums


def ranges(count: int, step: int, device: str = "cpu") -> Iterator[tuple[int, int]]:
    """The ranges ``low … high−1`` of ``count`` entries that are measured in a step.

    Examples:
        >>> list(ranges(1000, 1))
        [(0, 1000)]
        >>> [high - low for low, high in ranges(1_000_000, 1)]
        [8192, 8192]
    """
    size, window, whole = _SIZES.get(device, _ELSEWHERE)
    if count <= whole:
        yield 0, count
        return
    windows, blocks = -(-count // window), count // _BLOCK
    for i in range(windows):
        first, last = i * blocks // windows, (i + 1) * blocks // windows - size // _BLOCK
        shift = (step * 0x9E3779B1 + i * 0x85EBCA77) % (1 << 32)
        low = (first + (shift * (last - first + 1) >> 32)) * _BLOCK
        yield low, low + size


def _part(job: Job, at: Sequence[tuple[int, int]]) -> _Parts:
    """The entries of some ranges as a job of their own: copies, so that its moments may be advanced."""
    count = sum(high - low for low, high in at)
    if job.update is not None:
        job = replace(job, exp_avg=None, exp_avg_sq=None, max_exp_avg_sq=None, grad=None)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x.detach().reshape(-1)[low:high] for low, high in at])

    def read(moment: Tensor | None) -> Tensor | None:
        if moment is None:
            return None
        flat, dtype = moments.flat(moment), _Parts(job).update_dtype
        return torch.cat([moments.read(flat, low, high, dtype) for low, high in at])

    param = cut(job.param)
    assert param is not None
    return _Parts(
        replace(
            job,
            layout=Layout.whole((count,)),
            param=param,
            residual=cut(job.residual),
            exp_avg=read(job.exp_avg),
            exp_avg_sq=read(job.exp_avg_sq),
            max_exp_avg_sq=cut(job.max_exp_avg_sq),
            grad=cut(job.grad),
            anchor=cut(job.anchor),
            update=cut(job.update),
            cache=None,
        )
    )


def _thinned(
    job: Job, operator: Operator, whole: Sequence[Tensor], at: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """F(Δ) and F(τ) of the ranges."""
    assert job.tau is not None
    depends = operator.sparsify == "top" or (operator.rescale == "l1" and operator.sparsify != "none")
    if job.update is not None or not depends or job.settings.rate == 1:
        return _by_range(whole, thinnings(job, operator), job, at)
    update = _estimated(job, operator, 0, whole[0], at)
    return [update, whole[1] if job.tau.masked else _estimated(job, operator, 1, whole[1], at)]


def _estimated(job: Job, operator: Operator, which: int, x: Tensor, at: Sequence[tuple[int, int]]) -> Tensor:
    """F of one of the terms, with what depends on the whole tensor found in the sample."""
    if operator.sparsify == "top":
        count = min(x.numel(), max(1, round(job.count * x.numel() / job.layout.total)))
        (kept,) = thin([x], [Thinning(job.settings.rate, cut=top_cut(x, count))])
    else:
        how = thinnings(job, replace(operator, rescale="none"))[which]
        (kept,) = _by_range([x], [how], job, at)
    return kept * l1_factor(x, kept) if operator.rescale == "l1" else kept


def _by_range(
    whole: Sequence[Tensor], how: Sequence[Thinning], job: Job, at: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Thin ranges that lie side by side in tensors, each by its place in the parameter."""
    pieces, start = [], 0
    for low, high in at:
        own = [x[start : start + high - low] for x in whole]
        pieces.append(thin(own, how, Place(job.layout, low)))
        start += high - low
    return [torch.cat(kept) for kept in zip(*pieces, strict=True)]


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
