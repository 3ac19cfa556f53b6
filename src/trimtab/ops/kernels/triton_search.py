"""The host's side of top's search on the GPU: buffers and launches (see
:mod:`~trimtab.ops.kernels.triton_select`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.ops.kernels import triton_kernels as kernels
from trimtab.ops.kernels import triton_select as select
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.triton_columns import STATE

_MOST_BINS = 1 << 15


@dataclass(frozen=True, slots=True)
class Shape:
    """How the kernels cut their work. The defaults are by reasoning: unmeasured on a GPU so far.

    Args:
        block: entries of one program.
        warps: warps of one program.
        samples: entries of a tensor that top looks at to bracket its threshold.
        bins: bins in which candidates are counted, at least; more where a tensor is large.
        short: candidates that may share the threshold's bin without a search through the tensor.
        spread: half the bracket's width in standard deviations.
    """

    block: int = 2048
    warps: int = 8
    samples: int = 8192
    bins: int = 2048
    short: int = 2048
    spread: float = 5.0


def options(warps: int) -> dict[str, Any]:
    """How kernels are launched: products and sums are not contracted, so each is rounded as on the CPU."""
    return {"num_warps": warps, "enable_fp_fusion": False}


def bracket_of(total: int, count: int, shape: Shape) -> tuple[int, int, int, int]:
    """(capacity, upper, lower, samples): see :data:`~trimtab.ops.kernels.triton_columns.SEARCH`.

    The number of sampled entries among the k largest is binomial; it deviates from the mean by more than
    ``spread`` standard deviations hardly ever. The list has room for six more of the bracket's own share.
    """
    if total <= shape.samples:
        return total, count, count, total
    share = count / total
    mean, deviation = share * shape.samples, math.sqrt(share * (1 - share) * shape.samples)
    upper = max(math.floor(mean - shape.spread * deviation), 0)
    lower = math.ceil(mean + shape.spread * deviation) + 1
    width = (lower - upper) / shape.samples
    room = width + 6 * math.sqrt(width / shape.samples)
    return min(total, math.ceil(total * room)), upper, lower, shape.samples


class Search:
    """The searches of one list of jobs; their order is that of their states.

    Args:
        jobs: the jobs in which top searches.
        rows: their rows in the jobs' table.
        shape: how the kernels cut their work.
        device: where they lie.
    """

    states: Tensor
    """What the last search found (:data:`~trimtab.ops.kernels.triton_columns.STATE`)."""

    def __init__(self, jobs: Sequence[Job], rows: Sequence[int], shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.counts = shape, device, [job.count for job in jobs]
        words, owners, offset = [], [], 0
        for number, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            total = job.layout.numel
            capacity, *ranks = bracket_of(total, job.count, shape)
            words.append([row, total, job.count, capacity, offset, *ranks])
            owners += [(number, block) for block in range(-(-capacity // shape.block))]
            offset += capacity
        self.room = offset
        largest = max(job.layout.numel for job in jobs)
        self.bins = min(max(shape.bins, 1 << (largest >> 14).bit_length()), _MOST_BINS)
        self.searches = torch.tensor(words, dtype=torch.int64).to(device)
        self.owners = torch.tensor(owners, dtype=torch.int32).reshape(-1, 2).to(device)

    def run(self, launches: Sequence[Any], pieces: Tensor, rows: Tensor) -> None:
        """Advance the moments, find the cuts, and write them into the rows.

        Args:
            launches: the jobs by kind; those of kinds that do not search are passed over.
            pieces: the pieces of all layouts.
            rows: the jobs' rows.
        """
        shape, number = self.shape, len(self.counts)
        self.states = states = self._zeros(number, len(STATE))
        bins = self._zeros(number, self.bins)
        listed_bits, listed_index = self._empty(self.room), self._empty(self.room)
        short = torch.empty(number, shape.short, dtype=torch.int64, device=self.device)
        searching = [launch for launch in launches if launch.kind.searches]
        for launch in searching:
            select.sample[(len(launch.which),)](
                launch.which,
                self.searches,
                states,
                rows,
                SAMPLES=shape.samples,
                BINS=self.bins,
                **_constants(launch.kind),
                **options(16),
            )
            select.scan[(len(launch.scans),)](
                launch.scans,
                pieces,
                rows,
                self.searches,
                states,
                bins,
                listed_bits,
                listed_index,
                BLOCK=shape.block,
                BINS=self.bins,
                ALIGNED=launch.kind.ALIGNED,
                KEEP=_keeps(launch.kind),
                **_constants(launch.kind),
                **options(shape.warps),
            )
        one = (number,)
        select.narrow[one](self.searches, states, bins, rows, BINS=self.bins, SHORT=shape.short, num_warps=8)
        if len(self.owners):
            select.gather[(len(self.owners),)](
                self.owners,
                self.searches,
                states,
                listed_bits,
                listed_index,
                short,
                BLOCK=shape.block,
                SHORT=shape.short,
                num_warps=shape.warps,
            )
        select.choose[one](self.searches, states, short, rows, SHORT=shape.short, num_warps=8)
        for launch in searching:
            constants = _constants(launch.kind) | {"SOURCE": launch.kind.SOURCE}
            select.exhaust[(len(launch.which),)](
                launch.which,
                self.searches,
                states,
                rows,
                BLOCK=min(shape.block, 1024),
                **constants,
                **options(16),
            )

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self.device)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=self.device)


def _keeps(kind: Any) -> bool:
    """Whether the scan advances the moments for good; bf16 moments are advanced again by the step itself,
    since what it has to use are not the rounded ones.
    """
    source: int = kind.SOURCE
    return source == int(kernels.REPEAT.value)


def _constants(kind: Any) -> dict[str, Any]:
    """Arguments of the kernels that form Δ before the moments are advanced."""
    names = ("ANCHOR", "PARAM", "STORED", "WIDE", "GRAD", "MOMENT", "GREATEST")
    source = kernels.ADVANCE.value if _keeps(kind) else kind.SOURCE
    return {name: getattr(kind, name) for name in names} | {
        "SOURCE": source,
        "INTERPRET": kernels.INTERPRETED,
    }
