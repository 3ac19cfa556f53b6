"""What processes that share parameters settle together: where F cuts and how it rescales, and the start."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.ops import DELTA, UPDATE, MaskKey, Operator, content_hash
from trimtab.ops.kernels.engine import Engine
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.sampling import sampled
from trimtab.ops.masks import Place
from trimtab.ops.select import Part, thinnings
from trimtab.optim.sharding import ShardGroup, local_part, shard_group

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta

BUCKET = 1 << 26
"""Entries, of this process, whose Δ exist at the same time while cuts and factors are settled."""


def measure_together(delta: ReferenceDelta, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Let processes that share parameters go through the delta's models together, a share of them each.

    What the optimizer must know of a delta (its fingerprint, the reference's hashes) takes a pass over both
    models, unless it was saved. Where nothing is sharded nothing is done: each process measures for itself.

    Args:
        delta: the reference delta, the same in every process.
        parameters: (name, parameter) pairs of the optimizer.

    Raises:
        UserError: as :meth:`trimtab.ReferenceDelta.measure`, in all processes.
    """
    groups = [group for group in (shard_group(p) for _, p in parameters) if group is not None]
    if groups:
        group = max(groups, key=lambda group: group.size)  # the first of the largest
        delta.measure_together(*group.gathering())


def check_policy(delta: ReferenceDelta, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a policy that is not the delta's reference, without gathering it.

    Content hashes of disjoint parts add up to that of the whole, so one sum for each group of processes does.

    Args:
        delta: the reference delta.
        parameters: (name, parameter) pairs, the same in every process; those the delta lacks are passed over.

    Raises:
        UserError: as :meth:`trimtab.ReferenceDelta.check_policy`.
    """
    known = [(name, p) for name, p in parameters if name in delta and tuple(p.shape) == delta.shape(name)]
    hashes: dict[str, int] = {}
    shared: dict[ShardGroup, list[str]] = {}
    for name, p in known:
        local, layout, group = local_part(p)
        dtype, _ = delta.reference_hash(name, local.dtype)
        hashes[name] = content_hash(local.to(dtype), place=Place(layout))
        if group is not None:
            shared.setdefault(group, []).append(name)
    for group, names in shared.items():
        words = torch.tensor([_signed(hashes[name]) for name in names], dtype=torch.int64, device="cpu")
        hashes.update(zip(names, (int(word) % (1 << 64) for word in group(words)), strict=True))
    queue = iter(known)
    delta.check_policy(known, hash_of=lambda _: hashes[next(queue)[0]])


def check_gradients(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a step to which the processes that share parameters come with gradients of different ones.

    Their histograms would not belong together, or never come. With x a 24-bit hash of the names, n·Σx² =
    (Σx)² only where all x are equal (Cauchy and Schwarz); every process finds the same, so that all raise and
    none waits.

    Args:
        parameters: (name, parameter) pairs of an optimizer.

    Raises:
        UserError: in one sentence.
    """
    shared: dict[ShardGroup, list[str]] = {}
    for name, p in parameters:
        group = shard_group(p)
        if group is not None:
            names = shared.setdefault(group, [])
            if p.grad is not None:
                names.append(name)
    for group, names in shared.items():
        x = zlib.crc32("\n".join(names).encode()) & 0xFFFFFF
        total, squares = group(torch.tensor([x, x * x], dtype=torch.int64, device="cpu")).tolist()
        if group.size * squares != total * total:
            raise UserError(
                f"the processes that share parameters have gradients of different ones (here of {len(names)} "
                f"parameters: {', '.join(names[:3])}, …); a parameter must have one in all of them or in none"
            )


def needs_others(job: Job, operator: Operator) -> bool:
    """Whether what F does in this step depends on entries that other processes have."""
    if job.group is None or not job.settings.merge or job.settings.rate == 1 or job.layout.total == 0:
        return False
    if operator.sparsify == "top":
        return job.count < job.layout.total
    return operator.sparsify != "none" and operator.rescale == "l1"


def step_shards(jobs: Sequence[tuple[Job, Engine]], operator: Operator, sums: Tensor | None = None) -> None:
    """Take the step of jobs of which each process has a part and whose F depends on the whole.

    Bucket by bucket, engines form Δ, the processes settle cuts and factors, and the engines go on from there.

    Args:
        jobs: jobs for which :func:`needs_others` holds, with their engines: those of the same parameters, in
            the same order, in every process; engines may differ.
        operator: F and ⊕.
        sums: float64 (jobs, SUMS), to which what is measured of the local parts is added.
    """
    groups: dict[ShardGroup, list[int]] = {}
    for i, (job, _) in enumerate(jobs):
        groups.setdefault(job.group, []).append(i)
    for group, members in groups.items():
        for bucket in _buckets(members, [jobs[i][0].layout.total for i in members], group.size):
            part = None if sums is None else sums[bucket]
            _step_bucket([jobs[i] for i in bucket], operator, group, part)
            if sums is not None and part is not None:
                sums[bucket] = part


def _step_bucket(
    jobs: Sequence[tuple[Job, Engine]], operator: Operator, group: ShardGroup, sums: Tensor | None
) -> None:
    for engine, at in _by_engine(jobs):
        engine.update([jobs[i][0] for i in at])
    _settle([job for job, _ in jobs], operator, group)
    for engine, at in _by_engine(jobs):
        own, part = [jobs[i][0] for i in at], None
        if sums is not None and engine.measures:
            part = sums[at]
        elif sums is not None:
            sums[at] = sampled(own, operator)
        engine.step(own, operator, part)
        if sums is not None and part is not None:
            sums[at] = part
    for job, _ in jobs:
        job.update, job.cuts, job.factors = None, (None, None), None


def _settle(jobs: Sequence[Job], operator: Operator, group: ShardGroup) -> None:
    """Set the cuts and factors of jobs whose Δ is formed."""
    deltas = [(job, which, x) for job in jobs for which, x in enumerate(_local_deltas(job))]
    parts = [Part(x, job.layout, job.settings.rate, job.count, _key(job, which)) for job, which, x in deltas]
    found = thinnings(parts, operator.sparsify, operator.rescale, group)
    for (job, which, _), how in zip(deltas, found, strict=True):
        if which == 0:
            job.cuts, job.factors = (how.cut, None), (how.factor, 1.0)
        else:
            job.cuts, job.factors = (job.cuts[0], how.cut), (job.factors[0], how.factor)  # type: ignore[index]


def _local_deltas(job: Job) -> list[Tensor]:
    """Δ, and τ where F is still to act on it."""
    assert job.update is not None
    assert job.tau is not None
    return [job.update] if job.tau.masked else [job.update, job.tau.dense(0, job.layout.numel)]


def _key(job: Job, which: int) -> MaskKey:
    return MaskKey(job.seed, (UPDATE, DELTA)[which], job.settings.step, job.name)


def _by_engine(jobs: Sequence[tuple[Job, Engine]]) -> list[tuple[Engine, list[int]]]:
    engines: dict[int, tuple[Engine, list[int]]] = {}
    for i, (_, engine) in enumerate(jobs):
        engines.setdefault(id(engine), (engine, []))[1].append(i)
    return list(engines.values())


def _buckets(members: Sequence[int], totals: Sequence[int], ways: int) -> Iterator[list[int]]:
    """Cut a list of jobs into buckets: by what all processes know, so that all cut alike."""
    bucket: list[int] = []
    entries = 0
    for member, total in zip(members, totals, strict=True):
        size = -(-total // ways)
        if bucket and entries + size > BUCKET:
            yield bucket
            bucket, entries = [], 0
        bucket.append(member)
        entries += size
    if bucket:
        yield bucket


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
