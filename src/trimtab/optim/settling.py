"""What the processes that share a parameter settle together: where F cuts, how it rescales, where a run starts."""

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
from trimtab.ops.masks import Place
from trimtab.ops.select import Part, thinnings
from trimtab.optim.sharding import ShardGroup, local_part

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta

BUCKET = 1 << 26
"""Entries, of this process, whose Δ exist at the same time while cuts and factors are settled."""


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
        words = torch.tensor([_signed(hashes[name]) for name in names], dtype=torch.int64)
        hashes.update(zip(names, (int(word) % (1 << 64) for word in group(words)), strict=True))
    queue = iter(known)
    delta.check_policy(known, hash_of=lambda _: hashes[next(queue)[0]])


def needs_others(job: Job, operator: Operator) -> bool:
    """Whether what F does in this step depends on entries that other processes have."""
    if job.group is None or not job.settings.merge or job.settings.rate == 1 or job.layout.total == 0:
        return False
    if operator.sparsify == "top":
        return job.count < job.layout.total
    return operator.sparsify != "none" and operator.rescale == "l1"


def step_shards(
    jobs: Sequence[tuple[Job, Engine]], operator: Operator, rows: Sequence[Tensor] | None = None
) -> None:
    """Take the step of jobs of which each process has a part and whose F depends on the whole.

    Each bucket of them forms its Δ, the processes settle cuts and factors, and the engines go on from there.

    Args:
        jobs: jobs for which :func:`needs_others` holds, with their engines: those of the same parameters, in
            the same order, in every process. Engines may differ.
        operator: F and ⊕.
        rows: for each job the row of its sums, to which what is measured of the local part is added.

    Raises:
        UserError: processes that share parameters came with different ones.
    """
    by_group: dict[ShardGroup, list[int]] = {}
    for i, (job, _) in enumerate(jobs):
        by_group.setdefault(job.group, []).append(i)
    for group, members in by_group.items():
        _check_same(group, [jobs[i][0].name for i in members])
    for group, members in by_group.items():
        for bucket in _buckets([jobs[i][0] for i in members], group.size):
            at = [members[i] for i in bucket]
            _step_bucket(
                [jobs[i] for i in at], operator, group, None if rows is None else [rows[i] for i in at]
            )


def _step_bucket(
    jobs: Sequence[tuple[Job, Engine]],
    operator: Operator,
    group: ShardGroup,
    rows: Sequence[Tensor] | None,
) -> None:
    for engine, at in _by_engine(jobs):
        engine.update([jobs[i][0] for i in at])
    _settle([job for job, _ in jobs], operator, group)
    for engine, at in _by_engine(jobs):
        sums = None if rows is None else torch.stack([torch.zeros_like(rows[i]) for i in at])
        engine.step([jobs[i][0] for i in at], operator, sums)
        for i, row in enumerate([] if sums is None else sums):
            rows[at[i]].add_(row)  # type: ignore[index]
    for job, _ in jobs:
        job.update, job.cuts, job.factors = None, (None, None), None


def _settle(jobs: Sequence[Job], operator: Operator, group: ShardGroup) -> None:
    """Set the cuts and factors of jobs whose Δ is formed."""
    parts, owners = [], []
    for job in jobs:
        for which, x in enumerate(_local_deltas(job)):
            key = MaskKey(job.seed, (UPDATE, DELTA)[which], job.settings.step, job.name)
            parts.append(Part(x, job.layout, job.settings.rate, job.count, key))
            owners.append((job, which))
    found = {id(job): [None, None] for job in jobs}  # type: dict[int, list[Any]]
    for (job, which), how in zip(
        owners, thinnings(parts, operator.sparsify, operator.rescale, group), strict=True
    ):
        found[id(job)][which] = how
    for job in jobs:
        update, tau = found[id(job)]
        job.cuts = (update.cut, None if tau is None else tau.cut)
        job.factors = (update.factor, 1.0 if tau is None else tau.factor)


def _local_deltas(job: Job) -> list[Tensor]:
    """Δ, and τ where F is still to act on it."""
    assert job.update is not None
    assert job.tau is not None
    return [job.update] if job.tau.masked else [job.update, job.tau.dense(0, job.layout.numel)]


def _by_engine(jobs: Sequence[tuple[Job, Engine]]) -> list[tuple[Engine, list[int]]]:
    engines: dict[int, tuple[Engine, list[int]]] = {}
    for i, (_, engine) in enumerate(jobs):
        engines.setdefault(id(engine), (engine, []))[1].append(i)
    return list(engines.values())


def _buckets(jobs: Sequence[Job], ways: int) -> Iterator[list[int]]:
    """Cut a list of jobs into buckets: by what all processes know, so that all cut alike."""
    bucket: list[int] = []
    entries = 0
    for i, job in enumerate(jobs):
        size = -(-job.layout.total // ways)
        if bucket and entries + size > BUCKET:
            yield bucket
            bucket, entries = [], 0
        bucket.append(i)
        entries += size
    if bucket:
        yield bucket


def _check_same(group: ShardGroup, names: Sequence[str]) -> None:
    """Refuse processes that came with different parameters: their histograms would not belong together.

    With x a 24-bit hash of the names, n·Σx² = (Σx)² only where all x are equal (Cauchy and Schwarz); every
    process finds the same, so all raise and none is left waiting.
    """
    x = zlib.crc32("\n".join(names).encode()) & 0xFFFFFF
    total, squares = group(torch.tensor([x, x * x], dtype=torch.int64)).tolist()
    if group.size * squares != total * total:
        raise UserError(
            f"the processes that share parameters step different ones (here {len(names)}: {names[0]}, …); a "
            " parameter must have a gradient in all of them or in none"
        )


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
