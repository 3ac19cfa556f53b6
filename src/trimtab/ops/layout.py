"""Where a local tensor lies in the unsharded one: what sharding needs to know, without torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """An affine piece: local entry ``first + j`` has the global index ``base + (j // run)·stride + j % run``.

    Args:
        first: local row-major index of the first entry.
        count: number of entries, a multiple of ``run``.
        base: global row-major index of the first entry.
        run: entries that lie side by side in both.
        stride: distance between the starts of neighbouring runs in the unsharded tensor.
    """

    first: int
    count: int
    base: int
    run: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """The rectangle that a local tensor covers in the unsharded tensor.

    Args:
        shape: shape of the unsharded tensor.
        start: index of the rectangle's first entry, one per dimension.
        local: shape of the rectangle, that is, of the local tensor; a size may be 0.

    Examples:
        >>> half = Layout((4, 6), start=(0, 3), local=(4, 3))
        >>> half.spans()
        (Span(first=0, count=12, base=3, run=3, stride=6),)
        >>> half.indices(2, 5).tolist()
        [5, 9, 10]
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    local: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Layout:
        """The layout of a tensor that is not sharded."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of local entries."""
        return prod(self.local)

    @property
    def total(self) -> int:
        """Number of entries of the unsharded tensor."""
        return prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is the unsharded one."""
        return self.local == self.shape

    def slices(self) -> tuple[slice, ...]:
        """The rectangle as slices of the unsharded tensor, one per dimension."""
        return tuple(slice(at, at + size) for at, size in zip(self.start, self.local, strict=True))

    def spans(self) -> tuple[Span, ...]:
        """The rectangle as affine pieces in local order: one, unless two inner dimensions are cut."""
        if self.numel == 0:
            return ()
        if self.is_whole:
            return (Span(0, self.numel, 0, self.numel, self.numel),)
        cut = [d for d in range(len(self.shape)) if self.local[d] != self.shape[d]]
        strides = [prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        inner, base = cut[-1], sum(at * stride for at, stride in zip(self.start, strides, strict=True))
        run, jump = self.local[inner] * strides[inner], self.shape[inner] * strides[inner]
        # Dimensions outside the inner cut are walked run by run; those from `outer` on without a gap.
        outer = cut[-2] if len(cut) > 1 else 0
        rows = prod(self.local[outer:inner])
        spans, first = [], 0
        for at in product(*(range(size) for size in self.local[:outer])):
            offset = sum(i * stride for i, stride in zip(at, strides[:outer], strict=True))
            spans.append(Span(first, rows * run, base + offset, run, jump))
            first += rows * run
        return tuple(spans)

    def runs(self, low: int = 0, high: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (local index, global index, length) of the unbroken runs in ``low … high−1``."""
        high = self.numel if high is None else high
        for span in self.spans():
            at = max(low, span.first)
            while at < min(high, span.first + span.count):
                row, column = divmod(at - span.first, span.run)
                length = min(span.run - column, high - at)
                yield at, span.base + row * span.stride + column, length
                at += length

    def indices(
        self, low: int = 0, high: int | None = None, *, device: torch.device | str | None = None
    ) -> Tensor:
        """Global row-major indices of the local range ``low … high−1``, as int64."""
        high = self.numel if high is None else high
        if self.is_whole:
            return torch.arange(low, high, dtype=torch.int64, device=device)
        result = torch.empty(max(high - low, 0), dtype=torch.int64, device=device)
        for span in self.spans():
            lo, hi = max(low, span.first), min(high, span.first + span.count)
            if lo < hi:
                result[lo - low : hi - low] = _span_indices(span, lo - span.first, hi - span.first, device)
        return result


def _span_indices(span: Span, low: int, high: int, device: torch.device | str | None) -> Tensor:
    """Global indices of the entries ``low … high−1`` of a span."""

    def counted(start: int, end: int) -> Tensor:
        return torch.arange(start, end, dtype=torch.int64, device=device)

    if high - low < span.run:  # at most two runs
        j = counted(low, high)
        return span.base + j // span.run * span.stride + j % span.run
    # Whole runs as the rows of a table, since an addition costs a tenth of a division.
    first, last = low // span.run, -(-high // span.run)
    table = (span.base + span.stride * counted(first, last)).unsqueeze(1) + counted(0, span.run)
    return table.view(-1)[low - first * span.run : high - first * span.run]
