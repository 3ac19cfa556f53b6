"""Adam's moments as they are stored: fp32, bf16 rounded stochastically, or torchao's 8-bit blocks.

A step reads a range of a moment in the working dtype, changes it, and writes it back; so nothing of the
model's size is ever widened. What is stored is an ordinary tensor, or torchao's tensor subclass, and goes
through ``state_dict``, ``torch.save`` and ``torch.distributed.checkpoint`` as such.

| state_dtype | bytes per entry and moment | written |
|---|---|---|
| float32 (fp64 for fp64 parameters) | 4 (8) | as it is |
| bfloat16 | 2 | stochastic rounding, unbiased, by keyed bits |
| int8 | 1.016 | to the nearest of torchao's 256 values per block of 256 (arXiv 2110.02861, §2.1 and 2.2) |

bf16 has 8 significant bits, and an average with β₂ = 0.999 moves by less than half a unit in the last of them
at almost every step: rounded to nearest, a second moment would stand still. Rounded stochastically, its
expectation is the fp32 average.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.ops.layout import Layout
from trimtab.ops.masks import FIRST_MOMENT, SECOND_MOMENT, MaskKey, Place, _chunks, _half, _hashed_range

StateDtype = Literal["float32", "bfloat16", "int8"]
STATE_DTYPES: tuple[StateDtype, ...] = ("float32", "bfloat16", "int8")

BLOCK = 256
"""Entries that share a scale in an 8-bit moment; its ranges must begin at multiples of it."""
SMALLEST = 4096
"""Tensors below this size keep fp32 moments where int8 is asked for, as torchao and bitsandbytes do."""


def keys(seed: int, step: int, name: str) -> tuple[MaskKey, MaskKey]:
    """The keys of the bits that round the first and the second moment of one parameter in one step.

    The two streams are a pair, so one ``coarse`` hash word per entry (:mod:`~trimtab.ops.masks`) serves both:
    bf16 takes 16 random bits, the word's high half for the first moment and its low half for the second.
    """
    return MaskKey(seed, FIRST_MOMENT, step, name), MaskKey(seed, SECOND_MOMENT, step, name)


def check_state_dtype(state_dtype: str) -> None:
    """Refuse a ``state_dtype`` that is unknown, or that this installation cannot store.

    Raises:
        ValueError: in one sentence, with the line that installs what is missing.
    """
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"unknown state_dtype {state_dtype!r}; known: {', '.join(STATE_DTYPES)}")
    if state_dtype == "int8":
        torchao_state()


def new_moment(p: Tensor, state_dtype: StateDtype, *, signed: bool, layout: Layout | None = None) -> Tensor:
    """Make a moment of zeros for a parameter: contiguous, on its device, sharded as it is.

    Blocks of an 8-bit moment are cut in the local tensor. It is stored in 8 bits where the local part has at
    least 4,096 entries, is a multiple of 256 long, unbroken in the unsharded tensor and begins at a multiple
    of 256 there; else in fp32. Two shardings therefore have the same values where both store 8 bits, and a
    run is the same on one process and on four where that holds for every shard.

    Args:
        p: the parameter, a plain tensor or a DTensor.
        state_dtype: how to store it; ``float32`` means fp64 for an fp64 parameter.
        signed: True for the first moment, False for the second, which is never negative.
        layout: where the local part lies; needed for int8 where p is a DTensor.

    Raises:
        ValueError: as :func:`check_state_dtype`, or the layout is missing.

    Examples:
        >>> new_moment(torch.empty(2, 3), "bfloat16", signed=True).dtype
        torch.bfloat16
    """
    check_state_dtype(state_dtype)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    if state_dtype == "int8" and _fits_blocks(_layout_of(p, layout)):
        return _zeros_8bit(p, signed)
    dtype = torch.bfloat16 if state_dtype == "bfloat16" else wide
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)


def flat(state: Any) -> Any:
    """A moment as :func:`read` and :func:`write` take it: one dimension, the same storage; None stays None.

    A tensor that is not contiguous (a state made in its parameter's memory format) is made so in place, once.
    """
    if state is None or is_8bit(state):
        return state
    if not state.is_contiguous():
        state.data = state.contiguous()
    return state.detach().view(-1)


def read(moment: Any, low: int, high: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The entries ``low … high−1`` of a moment in the working dtype.

    Args:
        moment: what :func:`flat` returned.
        low: first entry; a multiple of 256 where the moment has 8 bits.
        high: end of the range.
        dtype: fp32, or fp64.

    Returns:
        A flat tensor that may be written to. Where the moment is stored in ``dtype`` it is the moment's own
        range, and changing it changes the moment; else it is a copy, for :func:`write`.
    """
    if not is_8bit(moment):
        return _slice(moment, low, high).to(dtype)
    codes, scale = _range(moment, low, high)
    values: Tensor = moment.qmap.index_select(0, codes.to(torch.int32)).view(-1, BLOCK) * scale[:, None]
    return values.view(-1).to(dtype)


def write(moment: Any, low: int, high: int, values: Tensor, key: MaskKey, place: Place) -> None:
    """Store new values of the entries ``low … high−1``.

    bf16 is rounded stochastically: up or down to a neighbour with the expectation equal to the value, by bits
    that are a function of ``key`` and the global index. 8 bits: torchao's own quantisation of each block.

    Args:
        moment: what :func:`flat` returned.
        low: first entry; a multiple of 256 where the moment has 8 bits.
        high: end of the range.
        values: fp32 or fp64, flat; nothing happens where they are the moment's own range.
        key: as :func:`keys` gives it.
        place: where the range lies in the unsharded tensor.

    Raises:
        ValueError: a range of an 8-bit moment cuts a block.
    """
    if is_8bit(moment):
        codes, scale = _range(moment, low, high)
        blocks = values.to(torch.float32).view(-1, BLOCK)
        scale.copy_(blocks.abs().amax(1).clip_(1e-12))
        codes.copy_(_nearest_codes((blocks / scale[:, None]).view(-1), moment.signed))
        return
    part = _slice(moment, low, high)
    if part.dtype == torch.bfloat16:
        part.copy_(_stochastic_bf16(values.to(torch.float32), key, place))
    elif values.data_ptr() != part.data_ptr() or values.dtype != part.dtype:
        part.copy_(values)


def is_8bit(state: Any) -> bool:
    """Whether a state is torchao's 8-bit one, found without importing torchao."""
    return type(state).__name__ == "OptimState8bit"


def nbytes(state: Any) -> int:
    """Size of a moment in bytes; the subclass's codes, scales and table together."""
    if is_8bit(state):
        return sum(int(t.nbytes) for t in (state.codes, state.scale, state.qmap))
    return int(state.nbytes)


def torchao_state() -> Any:
    """The class of torchao's 8-bit optimizer state.

    Importing it also lets ``torch.load(…, weights_only=True)`` read one.

    Raises:
        ValueError: it cannot be imported; with the line that installs it.
    """
    try:
        with _quiet("torchao", "torch.utils._pytree"):  # notes on kernels and registrations not used here
            state = import_module("torchao.optim.subclass_8bit").OptimState8bit
    except ImportError as error:
        raise ValueError(
            f"state_dtype 'int8' needs torchao, which cannot be imported here ({error}); "
            "install it with: pip install 'trimtab[lowbit]'"
        ) from error
    _make_copyable(state)
    return state


@cache
def _make_copyable(state: Any) -> None:
    """Teach the subclass ``clone``, which it lacks (0.18): without it no optimizer can be deep-copied."""
    clone = torch.ops.aten.clone.default

    @state.implements(clone)  # type: ignore[untyped-decorator]
    def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        old = args[0]
        parts = (old.codes.clone(), old.scale.clone(), old.qmap.clone())
        return type(old)(*parts, old.signed, dtype=old.dtype)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _layout_of(p: Tensor, layout: Layout | None) -> Layout:
    if layout is None and hasattr(p, "to_local"):
        raise ValueError("an 8-bit moment of a sharded parameter needs the layout of its local part")
    return layout or Layout.whole(p.shape)


def _fits_blocks(layout: Layout) -> bool:
    spans = layout.spans()
    if layout.numel < SMALLEST or layout.numel % BLOCK or len(spans) != 1:
        return False
    return spans[0].run == layout.numel and spans[0].base % BLOCK == 0


def _zeros_8bit(p: Tensor, signed: bool) -> Tensor:
    local: Any = p.to_local() if hasattr(p, "to_local") else p
    state: Tensor = torchao_state().zeros(
        local.shape, signed=signed, block_size=BLOCK, device=local.device, dtype=torch.float32
    )
    if local is p:
        return state
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    return DTensor.from_local(
        state, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def _range(moment: Any, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Views of the codes and the scales of whole blocks."""
    if low % BLOCK or high % BLOCK:
        raise ValueError(f"the range {low} … {high} cuts a block of {BLOCK} entries of an 8-bit moment")
    return moment.codes.view(-1)[low:high], moment.scale[low // BLOCK : high // BLOCK]


def _slice(moment: Tensor, low: int, high: int) -> Tensor:
    return moment[low:high]


def _stochastic_bf16(values: Tensor, key: MaskKey, place: Place) -> Tensor:
    """What ``ops.stochastic_round`` gives with ``uniform_u32``, of which bf16 needs the coarse half alone."""
    bits = torch.empty(values.numel(), dtype=torch.int32, device=values.device)
    for at, index, count, high in _chunks(values.numel(), 0, place, values.device):
        one, two, _, _ = key.words(high)
        bits[at : at + count] = _half(_hashed_range(index, count, one, two, values.device), key.stream)
    rounded = bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _nearest_codes(scaled: Tensor, signed: bool) -> Tensor:
    """What torchao's ``quantize_8bit_with_qmap`` gives, 30 times as fast: a look-up and one comparison.

    The upper 16 bits of a float leave a cell so narrow that at most one code begins in it.
    """
    lowest, begins = _code_tables(signed, scaled.device)
    cell = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    codes = lowest.index_select(0, cell)
    return codes.add_(scaled >= begins.index_select(0, codes.to(torch.int32)))


@lru_cache(maxsize=8)
def _code_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the code of the least number of each cell, the least number that has a higher code than c)."""
    with torch.device("cpu"):  # whatever the default device is
        lowest, begins = _code_tables_on_cpu(signed)
    return lowest.to(device), begins.to(device)


def _code_tables_on_cpu(signed: bool) -> tuple[Tensor, Tensor]:
    quantize = import_module("torchao.optim.quant_utils").quantize_8bit_with_qmap
    maps = import_module("torchao.optim.subclass_8bit")
    qmap = torch.tensor(maps.get_qmap_signed() if signed else maps.get_qmap_unsigned())
    low, high = _ordered(qmap[:-1]), _ordered(qmap[1:])  # the code changes between the two: bisect
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        above = quantize(_unordered(middle), qmap).to(torch.int64) > torch.arange(255)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    begins, cells = _unordered(high), torch.arange(1 << 16) << 16
    ends = torch.stack([cells, cells + 0xFFFF]).to(torch.int32).view(torch.float32)
    least, most = ends.amin(0), ends.amax(0)  # NaN where the cell holds one: code 0, as torchao has it
    lowest, highest = torch.bucketize(least, begins, right=True), torch.bucketize(most, begins, right=True)
    assert bool((highest - lowest <= 1)[ends.isfinite().all(0)].all())
    lowest = torch.where(least.isnan(), 0, lowest).to(torch.uint8)
    return lowest, torch.cat([begins, torch.tensor([torch.inf])])


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of fp32 numbers: neighbours are neighbours."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _unordered(k: Tensor) -> Tensor:
    return torch.where(k < 0, -k | 1 << 31, k).to(torch.int32).view(torch.float32)
