"""How a reference delta is held while training: dense, in int8 with a scale per block, or sparse.

Each format is one parameter's *local* part. What a kernel has to know of it stands in its class: which entry
of which tensor belongs to local flat index j. All three satisfy :class:`trimtab.ops.kernels.job.Tau`.

| format | bytes per entry | error |
|---|---|---|
| dense fp32 (fp64) | 4 (8) | none |
| dense bf16 | 2 | relative, ≤ 2⁻⁸ |
| int8, blocks of 128 | 1.03 | ≤ (block's largest magnitude)/254 |
| sparse, fp32 values | 6 per kept entry | none |
| sparse, bf16 values | 4 per kept entry | relative, ≤ 2⁻⁸ |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Self

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.layout import Layout

INT8_BLOCK = 128
"""Entries that share a scale in :class:`Int8Tau`, neighbours by *global* row-major index."""
SPARSE_BLOCK = 1 << 16
"""Local entries whose offsets :class:`SparseTau` counts from one start."""

_CHUNK = 1 << 20  # entries worked on at a time: temporaries stay small beside the tensor
_CODES = 127
_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class TauFormat:
    """What the formats have in common: they are a few tensors, and can be counted and moved."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the values are held in."""
        return tuple(v for v in (getattr(self, f.name) for f in fields(self)) if isinstance(v, Tensor))

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.tensors()[0].device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same format on ``device``; itself where it lies there. Values do not change."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in pinned host memory, from which a GPU copies without the CPU. Needs an accelerator."""
        return self.map(lambda t: t.pin_memory())

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same format with ``change(t)`` for each of its tensors t."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(v) for name, v in held.items() if isinstance(v, Tensor)})


@dataclass(frozen=True, eq=False)
class DenseTau(TauFormat):
    """Every value as it is: value(j) = ``values[j]``, bf16 widened to fp32.

    Args:
        values: flat (n,) in fp32, bf16 or fp64.
        masked: whether these are F(τ) already.
    """

    values: Tensor
    masked: bool = False

    @property
    def numel(self) -> int:
        """Number of local entries."""
        return self.values.numel()

    def dense(self, low: int, high: int) -> Tensor:
        """Values ``low … high−1`` in fp32 (fp64 where held so); maybe a view, so not to be written to."""
        return _working(self.values[low:high])


@dataclass(frozen=True, eq=False)
class Int8Tau(TauFormat):
    """Codes of 8 bits and a scale for each block of ``block`` neighbours in the unsharded tensor.

    value(j) = ``float(codes[j]) · scales[g(j) // block − first_block]``, one fp32 product, with g(j) the
    global row-major index of local entry j (:class:`~trimtab.ops.layout.Layout`). Blocks are cut by the
    global index and not by the shard's, so a shard holds the values that the unsharded tensor has. A shard of
    rows holds the scales of its own blocks; a shard of columns holds those of all blocks from its first entry
    to its last, gaps included (4/128 bytes per entry, times the number of shards).

    Args:
        codes: int8, flat (n,), each in −127 … 127.
        scales: fp32, flat, one for each block from the one of the first local entry to that of the last.
        layout: where the local part lies.
        masked: whether these are F(τ) already.
        block: entries per scale.
    """

    codes: Tensor
    scales: Tensor
    layout: Layout
    masked: bool = False
    block: int = INT8_BLOCK

    @property
    def numel(self) -> int:
        """Number of local entries."""
        return self.codes.numel()

    @property
    def first_block(self) -> int:
        """Global number (global index // block) of the block whose scale is ``scales[0]``."""
        return _ends(self.layout)[0] // self.block

    def dense(self, low: int, high: int) -> Tensor:
        """Values ``low … high−1`` in fp32."""
        high = min(high, self.numel)
        scales = _scale_of_each(self.scales, self.layout, low, high, self.first_block, self.block)
        return self.codes[low:high].to(torch.float32) * scales


@dataclass(frozen=True, eq=False)
class SparseTau(TauFormat):
    """The entries that are not 0 and where they are, ascending by local flat index.

    Block b covers the local entries b·65,536 … and owns the kept entries i = ``starts[b]`` …
    ``starts[b+1]``−1; kept entry i is local entry b·65,536 + ``offsets[i]`` with the value ``values[i]``. All
    others are +0.

    Args:
        starts: int64 (⌈n/65,536⌉ + 1,): first kept entry of each block, and their number.
        offsets: uint16, one for each kept entry, ascending within a block.
        values: fp32, bf16 or fp64, one for each kept entry.
        numel: n, the number of local entries.
        masked: True: what is 0 here was dropped by F.
    """

    starts: Tensor
    offsets: Tensor
    values: Tensor
    numel: int
    masked: bool = True

    def dense(self, low: int, high: int) -> Tensor:
        """Values ``low … high−1`` in fp32 (fp64 where held so), zeros included."""
        high = min(high, self.numel)
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        if low >= high:
            return torch.zeros(0, dtype=dtype, device=self.values.device)
        first, last = low // SPARSE_BLOCK, -(-high // SPARSE_BLOCK)
        starts = self.starts[first : last + 1]
        begin, *_, end = starts.tolist()
        whole = torch.zeros((last - first) * SPARSE_BLOCK, dtype=dtype, device=self.values.device)
        whole[_places(starts, self.offsets[begin:end])] = _working(self.values[begin:end])
        return whole[low - first * SPARSE_BLOCK : high - first * SPARSE_BLOCK]


def _places(starts: Tensor, offsets: Tensor) -> Tensor:
    """Where the kept entries of neighbouring blocks lie, counted from the first block's first entry."""
    if starts.device.type == "cpu":  # for a chunk of a step, NumPy's calls take a third of torch's time
        kept = np.diff(starts.numpy())
        return torch.from_numpy(np.repeat(np.arange(kept.size) * SPARSE_BLOCK, kept) + offsets.numpy())
    counts = starts.diff()
    block = torch.arange(counts.numel(), device=counts.device)
    block = block.repeat_interleave(counts, output_size=offsets.numel())
    return block * SPARSE_BLOCK + offsets.to(torch.int64)


def hold_dense(x: Tensor, dtype: torch.dtype = torch.float32, *, masked: bool = False) -> DenseTau:
    """Hold every value in ``dtype``, rounded to nearest even.

    Error: none where ``dtype`` is x's own or wider; bf16 keeps 8 significant bits, so a relative error of at
    most 2⁻⁸ (for magnitudes from 2⁻¹²⁶ on).

    Args:
        x: floating tensor of any shape; where its dtype is ``dtype`` it is held itself, not a copy.
        dtype: fp32, bf16 or fp64.
        masked: whether x is F(τ) already.

    Raises:
        ValueError: another dtype.

    Examples:
        >>> hold_dense(torch.tensor([[1.0, 1.001]]), torch.bfloat16).dense(0, 2).tolist()
        [1.0, 1.0]
    """
    if dtype not in _FLOATS:
        raise ValueError(f"τ is held in fp32, bf16 or fp64, not in {dtype}")
    return DenseTau(x.detach().reshape(-1).to(dtype), masked)


def block_cover(layout: Layout, block: int = INT8_BLOCK) -> Layout:
    """The rectangle that :func:`hold_int8` has to see: ``layout``, and what else its blocks hold.

    A shard of rows takes a few entries (in whole rows) more at either end. A shard of columns takes a few
    columns more where ``block`` divides the row's length, and else whole rows, since its blocks then run over
    row ends.

    Args:
        layout: the local part.
        block: entries per scale.

    Examples:
        >>> block_cover(Layout((4, 256), start=(0, 100), local=(4, 20))).slices()
        (slice(0, 4, None), slice(0, 128, None))
        >>> block_cover(Layout((1000,), start=(300,), local=(200,))).slices()
        (slice(256, 512, None),)
    """
    if layout.is_whole or layout.numel == 0:
        return layout
    start, local = list(layout.start), list(layout.local)
    for d in reversed(range(len(layout.shape))):
        size, inner = layout.shape[d], prod(layout.shape[d + 1 :])
        low = start[d] * inner // block * block // inner
        high = min(-(-(-(-(start[d] + local[d]) * inner // block) * block) // inner), size)
        if d == 0 or size * inner % block == 0:  # no block runs over the end of this dimension
            start[d], local[d] = low, high - low
            break
        start[d], local[d] = 0, size
    return Layout(layout.shape, tuple(start), tuple(local))


def hold_int8(
    x: Tensor,
    layout: Layout | None = None,
    *,
    cover: Layout | None = None,
    masked: bool = False,
    block: int = INT8_BLOCK,
) -> Int8Tau:
    """Hold 8-bit codes and one fp32 scale per block: block-wise absmax quantisation (arXiv 2110.02861, §2.1).

    With m the largest magnitude of a block: scale = m/127, code = x/scale rounded to nearest even, value =
    code·scale. Error: |value − x| ≤ m/254 + 2⁻²⁴·m + 2⁻¹⁴²; a block of zeros is exact, and 0 stays 0. Unlike
    the source's, the codes are linear: τ is added, never divided by, so that the absolute error counts.

    Args:
        x: values of ``cover``, of any shape; fp32, fp64 or bf16, finite.
        layout: the part to hold; default all of x.
        cover: what x holds: a rectangle around ``layout`` with every block that it touches, as
            :func:`block_cover` gives it; default ``layout``.
        masked: whether x is F(τ) already.
        block: entries per scale.

    Raises:
        ValueError: a value is not finite, or ``cover`` does not hold whole blocks.

    Examples:
        >>> tau = hold_int8(torch.tensor([1.27, -0.5, 0.004, 0.0]))
        >>> tau.codes.tolist(), [round(v, 6) for v in tau.dense(0, 4).tolist()]
        ([127, -50, 0, 0], [1.27, -0.5, 0.0, 0.0])
    """
    layout = Layout.whole(x.shape) if layout is None else layout
    cover = layout if cover is None else cover
    _check_cover(x, layout, cover, block)
    flat = x.detach().reshape(-1)
    low, high = _ends(layout)
    first, count = low // block, (high // block - low // block + 1) if layout.numel else 0
    scales = (_largest_by_block(flat, cover, first, count, block) / _CODES).to(torch.float32)
    if not bool(scales.isfinite().all()):
        raise ValueError("int8 holds finite values only, and τ has NaN or infinity (or exceeds fp32)")
    flat = _part(flat, layout, cover)
    codes = torch.empty(layout.numel, dtype=torch.int8, device=flat.device)
    for at in range(0, layout.numel, _CHUNK):
        end = min(at + _CHUNK, layout.numel)
        each = _scale_of_each(scales, layout, at, end, first, block).to(torch.float64)
        ratio = torch.where(each > 0, flat[at:end].to(torch.float64) / each, 0.0)
        codes[at:end] = ratio.round_().clamp_(-_CODES, _CODES).to(torch.int8)
    return Int8Tau(codes, scales, layout, masked, block)


def hold_sparse(x: Tensor, dtype: torch.dtype | None = None) -> SparseTau:
    """Hold the entries that are not +0, 6 bytes each (4 with bf16 values), and where they are.

    Error: none, bit for bit (−0 and NaN are entries); with ``dtype=torch.bfloat16`` as :func:`hold_dense`.

    Args:
        x: F(τ): fp32, bf16 or fp64 of any shape.
        dtype: dtype of the values kept; default x's own.

    Examples:
        >>> tau = hold_sparse(torch.tensor([0.0, 0.0, 3.0, 0.0, -1.0]))
        >>> tau.offsets.tolist(), tau.values.tolist(), tau.dense(1, 5).tolist()
        ([2, 4], [3.0, -1.0], [0.0, 3.0, 0.0, -1.0])
    """
    flat = x.detach().reshape(-1)
    dtype = flat.dtype if dtype is None else dtype
    if dtype not in _FLOATS:
        raise ValueError(f"τ is held in fp32, bf16 or fp64, not in {dtype}")
    kept = [_nonzero(flat[at : at + SPARSE_BLOCK]) for at in range(0, flat.numel(), SPARSE_BLOCK)]
    counts = torch.tensor([0, *(offsets.numel() for offsets, _ in kept)], dtype=torch.int64, device="cpu")
    starts = counts.cumsum(0)
    empty = (torch.empty(0, dtype=torch.uint16, device=flat.device), flat[:0])
    offsets, values = (torch.cat(parts) for parts in zip(*(kept or [empty]), strict=True))
    return SparseTau(starts.to(flat.device), offsets, values.to(dtype), flat.numel())


def _nonzero(part: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and values of the entries whose bits are not those of +0."""
    bits = part.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()])
    at = bits.nonzero().squeeze(1)
    return at.to(torch.uint16), part[at]


def _working(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _ends(layout: Layout) -> tuple[int, int]:
    """Global indices of the first and the last local entry; (0, 0) where there is none."""
    if layout.numel == 0:
        return 0, 0
    strides = [prod(layout.shape[d + 1 :]) for d in range(len(layout.shape))]
    low = sum(at * stride for at, stride in zip(layout.start, strides, strict=True))
    steps = sum((size - 1) * stride for size, stride in zip(layout.local, strides, strict=True))
    return low, low + steps


def _is_unbroken(layout: Layout) -> bool:
    low, high = _ends(layout)
    return high - low + 1 == layout.numel


def _scale_of_each(
    scales: Tensor, layout: Layout, low: int, high: int, first_block: int, block: int
) -> Tensor:
    """The scale of every local entry ``low … high−1``."""
    if low >= high:
        return scales[:0]
    if not _is_unbroken(layout):
        index = layout.indices(low, high, device=scales.device)
        return scales[index.div_(block, rounding_mode="floor").sub_(first_block)]
    at = _ends(layout)[0] + low
    begin, end = at // block, (at + high - low - 1) // block + 1
    spread = scales[begin - first_block : end - first_block].repeat_interleave(block)
    return spread[at - begin * block : at - begin * block + high - low]


def _check_cover(x: Tensor, layout: Layout, cover: Layout, block: int) -> None:
    if x.numel() != cover.numel:
        raise ValueError(f"x has {x.numel()} entries, and the part it is to be has {cover.numel}")
    needed = block_cover(layout, block)
    if cover.shape != needed.shape or not all(
        c.start <= n.start and n.stop <= c.stop for c, n in zip(cover.slices(), needed.slices(), strict=True)
    ):
        raise ValueError(
            f"int8 blocks of {block} run over the ends of {layout.slices()}: give the values of "
            f"block_cover(layout), that is {needed.slices()}"
        )


def _part(flat: Tensor, layout: Layout, cover: Layout) -> Tensor:
    """The entries of ``layout`` out of those of ``cover``, flat."""
    if layout == cover:
        return flat
    inside = tuple(
        slice(part.start - start, part.stop - start)
        for part, start in zip(layout.slices(), cover.start, strict=True)
    )
    return flat.view(cover.local)[inside].reshape(-1)


def _largest_by_block(flat: Tensor, cover: Layout, first: int, count: int, block: int) -> Tensor:
    """Largest |x| of the blocks ``first … first + count − 1``: NaN where one is, 0 in gaps."""
    result = torch.zeros(count, dtype=flat.dtype, device=flat.device)
    for low, high, number in _pieces(cover, block):
        part = flat[low:high].abs()
        if isinstance(number, Tensor):
            number = number - first
            inside = (number >= 0) & (number < count)
            result.scatter_reduce_(0, number[inside], part[inside], "amax")
        else:
            largest, at = part.view(-1, min(block, high - low)).amax(1), number - first
            begin, end = max(at, 0), min(at + largest.numel(), count)
            if begin < end:
                result[begin:end] = torch.maximum(result[begin:end], largest[begin - at : end - at])
    return result


def _pieces(cover: Layout, block: int) -> Iterator[tuple[int, int, int | Tensor]]:
    """Yield (low, high, number of the first block, or of every entry's) over the cover.

    Where it is unbroken, a piece is a part of one block, or whole blocks; else any range.
    """
    n = cover.numel
    if n and not _is_unbroken(cover):
        for low in range(0, n, _CHUNK):
            high = min(low + _CHUNK, n)
            yield low, high, cover.indices(low, high).div_(block, rounding_mode="floor")
        return
    low, begin = 0, _ends(cover)[0]
    while low < n:
        at = begin + low
        left = block - at % block
        size = (
            min(left, n - low) if left < block or n - low < block else min(_CHUNK, (n - low) // block * block)
        )
        yield low, low + size, at // block
        low += size
