# mypy: ignore-errors
# ruff: noqa: SIM300 (capitals here are arguments, not constants)
"""What the GPU kernels stand on: the masks' hash, rounding, and entries read and written in their formats.

Triton, which reads a subset of Python, compiles these functions; they are no Python that could be typed.
bf16 is read and written by its bits, so that its rounding does not depend on who compiles.
"""

import triton
import triton.language as tl

from trimtab.ops.kernels.triton_columns import PIECE, column

_PARAM, _RESIDUAL = tl.constexpr(column("param")), tl.constexpr(column("residual"))
_STEP = tl.constexpr(column("step"))
_ROUNDING_LANES = tl.constexpr(PIECE.index("rounding_coarse"))

# Values of the argument STORED: how the master is kept.
NEAREST, RESIDUAL, STOCHASTIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# -- numbers


@triton.jit
def hashed(index, key0, key1):
    """The integer hash of :mod:`trimtab.ops.masks`, of uint32."""
    x = index + key0
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x ^ key1
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keys(lane, step):
    """The two 32-bit keys that follow from a 64-bit lane at a step: splitmix64's finalizer."""
    x = lane.to(tl.uint64) + step.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def fused(x, y, z, INTERPRET: tl.constexpr):
    """x·y + z, rounded once (in the interpreter, whose fma rounds twice, through fp64)."""
    if INTERPRET:
        result = (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def is_finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def to_bf16_bits(x):
    """fp32 rounded to nearest even, as the 16 bits of bf16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def from_bf16_bits(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16_stochastic(x, random):
    """fp32 rounded by 16 random bits (uint32), as the 16 bits of bf16."""
    rounded = (x.to(tl.int32, bitcast=True) + random.to(tl.int32)) >> 16
    return tl.where(is_finite(x), rounded.to(tl.int16), to_bf16_bits(x))


@triton.jit
def magnitude(x):
    """Integers in the order of |x|, NaN highest."""
    return tl.where(x != x, 0x7FFFFFFF, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


# -- memory


@triton.jit
def number(row, COLUMN: tl.constexpr):
    """An fp32 of a job's row."""
    return tl.load((row + COLUMN).to(tl.pointer_type(tl.float32)))


@triton.jit
def number_64(row, COLUMN: tl.constexpr):
    """An fp64 of a job's row."""
    return tl.load((row + COLUMN).to(tl.pointer_type(tl.float64)))


@triton.jit
def pointers(row, COLUMN: tl.constexpr, KIND: tl.constexpr, first, lane, ALIGNED: tl.constexpr):
    """Where entries ``first + lane`` of a tensor lie whose address is in a job's row."""
    begin = tl.load(row + COLUMN).to(tl.pointer_type(KIND)) + first
    if ALIGNED:  # the compiler heeds this hint on a sum, but not on what is loaded
        begin = tl.multiple_of(begin, 16)
    return begin + lane


@triton.jit
def read(row, COLUMN: tl.constexpr, KIND: tl.constexpr, first, lane, valid, ALIGNED: tl.constexpr):
    """Entries of a tensor in fp32 (fp64 where it is)."""
    if KIND == tl.bfloat16:
        bits = tl.load(pointers(row, COLUMN, tl.int16, first, lane, ALIGNED), mask=valid, other=0)
        value = from_bf16_bits(bits)
    elif KIND == tl.float64:
        value = tl.load(pointers(row, COLUMN, tl.float64, first, lane, ALIGNED), mask=valid, other=0.0)
    else:
        value = tl.load(pointers(row, COLUMN, KIND, first, lane, ALIGNED), mask=valid, other=0.0)
        value = value.to(tl.float32)
    return value


@triton.jit
def write(row, COLUMN: tl.constexpr, KIND: tl.constexpr, first, lane, valid, value, ALIGNED: tl.constexpr):
    tl.store(pointers(row, COLUMN, KIND, first, lane, ALIGNED), value, mask=valid)


@triton.jit
def read_master(
    row,
    first,
    lane,
    valid,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The exact value of the parameter: fp64 for an fp32 parameter with a rounding help (WIDE), else fp32."""
    master = read(row, _PARAM, PARAM, first, lane, valid, ALIGNED)
    if WIDE:
        master = master.to(tl.float64)
        if STORED == RESIDUAL:
            master = master + read(row, _RESIDUAL, tl.bfloat16, first, lane, valid, ALIGNED).to(tl.float64)
    elif STORED == RESIDUAL:
        if PARAM == tl.bfloat16:
            rest = tl.load(pointers(row, _RESIDUAL, tl.int16, first, lane, ALIGNED), mask=valid, other=0)
            master = (master.to(tl.int32, bitcast=True) + rest.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            master = master + read(row, _RESIDUAL, tl.float16, first, lane, valid, ALIGNED) * 0.00048828125
    return master


@triton.jit
def write_master(
    row,
    piece,
    first,
    lane,
    valid,
    index,
    master,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store the master: rounded to nearest, split into weight and residual, or rounded stochastically."""
    random = index
    if STORED == STOCHASTIC:
        step = tl.load(row + _STEP)
        key0, key1 = keys(tl.load(piece + _ROUNDING_LANES), step)
        random = hashed(index, key0, key1) & 0xFFFF
        if WIDE:
            key0, key1 = keys(tl.load(piece + _ROUNDING_LANES + 1), step)
            random = (random << 16) | (hashed(index, key0, key1) & 0xFFFF)
    if WIDE:
        if STORED == STOCHASTIC:
            bits = master.to(tl.int64, bitcast=True)
            rounded = ((bits + (random >> 3).to(tl.int64)) & -536870912).to(tl.float64, bitcast=True)
            size = tl.abs(master)
            usable = (size >= 1.1754943508222875e-38) & (size < float("inf"))
            write(
                row,
                _PARAM,
                PARAM,
                first,
                lane,
                valid,
                tl.where(usable, rounded, master).to(tl.float32),
                ALIGNED,
            )
        else:
            weight = master.to(tl.float32)
            finite = is_finite(weight)
            error = tl.where(finite, master - weight.to(tl.float64), 0.0).to(tl.float32)
            rest = to_bf16_bits(error)
            joined = (weight.to(tl.float64) + from_bf16_bits(rest).to(tl.float64)).to(tl.float32)
            rest = tl.where(finite & (joined != weight), rest - 1, rest)
            write(row, _PARAM, PARAM, first, lane, valid, weight, ALIGNED)
            write(row, _RESIDUAL, tl.int16, first, lane, valid, rest, ALIGNED)
    elif PARAM == tl.float32:
        write(row, _PARAM, PARAM, first, lane, valid, master, ALIGNED)
    elif PARAM == tl.bfloat16:
        if STORED == RESIDUAL:
            bits = master.to(tl.int32, bitcast=True)
            bits = tl.where(master != master, (bits & -65536) | 0x400000, bits)
            weight = (bits + 0x8000) >> 16
            rest = bits - (weight << 16)
            write(row, _PARAM, tl.int16, first, lane, valid, weight.to(tl.int16), ALIGNED)
            write(row, _RESIDUAL, tl.int16, first, lane, valid, rest.to(tl.int16), ALIGNED)
        elif STORED == STOCHASTIC:
            write(row, _PARAM, tl.int16, first, lane, valid, to_bf16_stochastic(master, random), ALIGNED)
        else:
            write(row, _PARAM, tl.int16, first, lane, valid, to_bf16_bits(master), ALIGNED)
    else:
        weight = master.to(tl.float16)
        if STORED == RESIDUAL:
            wide = weight.to(tl.float32)
            finite = is_finite(wide)
            rest = (tl.where(finite, master - wide, 0.0) * 2048.0).to(tl.float16)
            joined = (wide + rest.to(tl.float32) * 0.00048828125).to(tl.float16)
            bits = rest.to(tl.int16, bitcast=True)
            bits = tl.where(finite & (joined != weight), bits - 1, bits)
            write(row, _RESIDUAL, tl.int16, first, lane, valid, bits, ALIGNED)
        elif STORED == STOCHASTIC:
            bits = (master.to(tl.int32, bitcast=True) + (random >> 3).to(tl.int32)) & -8192
            usable = is_finite(master) & (tl.abs(master) >= 6.103515625e-05)
            weight = tl.where(usable, bits.to(tl.float32, bitcast=True), master).to(tl.float16)
        write(row, _PARAM, tl.float16, first, lane, valid, weight, ALIGNED)
