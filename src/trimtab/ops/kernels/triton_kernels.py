# mypy: ignore-errors
# ruff: noqa: SIM300 (capitals here are arguments, not constants)
"""The step on a GPU, as Triton kernels: what :class:`~trimtab.ops.kernels.job.Job` says, entry by entry.

All addresses come from a table in the device's memory (:mod:`~trimtab.ops.kernels.triton_columns`), so one
launch serves any number of tensors. Launched without contraction of products and sums; where torch's CPU code
fuses them (lerp, addcmul), so does ``fused``. Divisions and roots are rounded correctly.
"""

import torch
import triton
import triton.language as tl

from trimtab.ops.kernels.triton_columns import PIECE, WIDTH, column
from trimtab.ops.kernels.triton_numbers import (
    fused,
    hashed,
    keys,
    magnitude,
    number,
    number_64,
    pointers,
    read,
    read_master,
    to_bf16_stochastic,
    write,
    write_master,
)

_WIDTH = tl.constexpr(WIDTH)
_PIECE = tl.constexpr(len(PIECE))
_FIRST, _SECOND = tl.constexpr(column("first")), tl.constexpr(column("second"))
_GREATEST, _GRAD = tl.constexpr(column("greatest")), tl.constexpr(column("grad"))
_ANCHOR, _UPDATE = tl.constexpr(column("anchor")), tl.constexpr(column("update"))
_TAU, _SCALES = tl.constexpr(column("tau")), tl.constexpr(column("scales"))
_CLOCK, _RATE = tl.constexpr(column("clock")), tl.constexpr(column("rate"))
_STEP, _THRESHOLD = tl.constexpr(column("step")), tl.constexpr(column("threshold"))
_CUT, _TAU_CUT = tl.constexpr(column("cut_bits")), tl.constexpr(column("tau_bits"))
_UPDATE_WEIGHT, _TAU_WEIGHT = tl.constexpr(column("update_weight")), tl.constexpr(column("tau_weight"))
_UPDATE_FACTOR, _TAU_FACTOR = tl.constexpr(column("update_factor")), tl.constexpr(column("tau_factor"))
_DECAY, _DECAY_AFTER = tl.constexpr(column("decay")), tl.constexpr(column("decay_after"))
_ANCHOR_DECAY, _SIGN = tl.constexpr(column("anchor_decay")), tl.constexpr(column("sign"))
_BLEND, _LIGHT = tl.constexpr(column("blend")), tl.constexpr(column("light"))
_BETA2, _FRESH = tl.constexpr(column("beta2")), tl.constexpr(column("fresh"))
_SIZE, _ROOT, _EPS = tl.constexpr(column("size")), tl.constexpr(column("root")), tl.constexpr(column("eps"))
_DECAY_64, _DECAY_AFTER_64 = tl.constexpr(column("decay_64")), tl.constexpr(column("decay_after_64"))
_ANCHOR_DECAY_64 = tl.constexpr(column("anchor_decay_64"))
_BETA1_64, _BETA2_64 = tl.constexpr(column("beta1_64")), tl.constexpr(column("beta2_64"))
_DECAY_RATE_64, _DECAY_AFTER_RATE_64 = (
    tl.constexpr(column("decay_rate_64")),
    tl.constexpr(column("decay_after_rate_64")),
)
_MASK_LANES = tl.constexpr(PIECE.index("mask_coarse"))
_MOMENT_LANES = tl.constexpr(PIECE.index("moment_coarse"))
_HIGH, _SCALE_SHIFT = tl.constexpr(PIECE.index("high")), tl.constexpr(PIECE.index("scale_shift"))

# Values of constexpr arguments.
PLAIN, MERGE, FORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOTHING, ADVANCE, REPEAT, BUFFER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KEEP_ALL, BERNOULLI, TOP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LINEAR, SIGN, SIGN_UNWEIGHTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DENSE, INT8, SPARSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# -- one entry's step


@triton.jit
def over_scalar(x, y, INTERPRET: tl.constexpr):
    """Quotient x/y rounded to nearest, y > 0 neither tiny nor huge: Markstein's correction of x·(1/y)."""
    inverse = tl.div_rn(1.0, y)
    guess = x * inverse
    result = fused(fused(-guess, y, x, INTERPRET), inverse, guess, INTERPRET)
    return tl.where(result != result, guess, result)  # infinity has no remainder


@triton.jit
def adam(
    row,
    first,
    lane,
    valid,
    SOURCE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(u, m, v, AMSGrad's v): Adam's update from moments that the gradient advances, or as they are."""
    mean = read(row, _FIRST, MOMENT, first, lane, valid, ALIGNED)
    square = read(row, _SECOND, MOMENT, first, lane, valid, ALIGNED)
    widest = square
    if GREATEST:
        widest = read(row, _GREATEST, tl.float32, first, lane, valid, ALIGNED)
    if SOURCE == ADVANCE:
        grad = read(row, _GRAD, GRAD, first, lane, valid, ALIGNED) * number(row, _SIGN)
        start = tl.where(number(row, _LIGHT) != 0, mean, grad)
        mean = fused(number(row, _BLEND), grad - mean, start, INTERPRET)
        square = fused(number(row, _FRESH) * grad, grad, square * number(row, _BETA2), INTERPRET)
        if GREATEST:
            widest = tl.maximum(widest, square, propagate_nan=tl.PropagateNan.ALL)
        else:
            widest = square
    denominator = over_scalar(tl.sqrt_rn(widest), number(row, _ROOT), INTERPRET) + number(row, _EPS)
    return tl.div_rn(number(row, _SIZE) * mean, denominator), mean, square, widest


@triton.jit
def keep_moments(
    row,
    piece,
    first,
    lane,
    valid,
    index,
    mean,
    square,
    widest,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store advanced moments; bf16 is rounded stochastically, with one hash word for both."""
    if MOMENT == tl.bfloat16:
        key0, key1 = keys(tl.load(piece + _MOMENT_LANES), tl.load(row + _STEP))
        word = hashed(index, key0, key1)
        one = to_bf16_stochastic(mean, word >> 16)
        other = to_bf16_stochastic(square, word & 0xFFFF)
        write(row, _FIRST, tl.int16, first, lane, valid, one, ALIGNED)
        write(row, _SECOND, tl.int16, first, lane, valid, other, ALIGNED)
    else:
        write(row, _FIRST, MOMENT, first, lane, valid, mean, ALIGNED)
        write(row, _SECOND, MOMENT, first, lane, valid, square, ALIGNED)
    if GREATEST:
        write(row, _GREATEST, tl.float32, first, lane, valid, widest, ALIGNED)


@triton.jit
def base_and_update(
    row,
    first,
    lane,
    valid,
    SOURCE: tl.constexpr,
    BASE: tl.constexpr,
    ANCHOR: tl.constexpr,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(base, Δ, m, v, AMSGrad's v) of a job's entries; base is meaningless without BASE or ANCHOR."""
    base = tl.zeros_like(valid.to(tl.float32))
    update = base
    mean = base
    square = base
    widest = base
    if BASE or ANCHOR:
        base = read_master(row, first, lane, valid, PARAM, STORED, WIDE, ALIGNED)
        if WIDE:
            base = base * number_64(row, _DECAY_64)
        else:
            base = base * number(row, _DECAY)
    if ANCHOR:
        master = base
        if WIDE:
            base = read(row, _ANCHOR, tl.float64, first, lane, valid, ALIGNED) * number_64(
                row, _ANCHOR_DECAY_64
            )
        else:
            base = read(row, _ANCHOR, tl.float32, first, lane, valid, ALIGNED)
            base = base * number(row, _ANCHOR_DECAY)
        update = (master - base).to(tl.float32)
    if SOURCE == BUFFER:
        update = read(row, _UPDATE, tl.float32, first, lane, valid, ALIGNED)
    elif SOURCE != NOTHING:
        own, mean, square, widest = adam(
            row, first, lane, valid, SOURCE, GRAD, MOMENT, GREATEST, ALIGNED, INTERPRET
        )
        if ANCHOR:
            update = update + own
        else:
            update = own
    return base, update, mean, square, widest


@triton.jit
def below(half, fine_half, threshold):
    """Whether the uniform number of two halves is below round(p·2^32)."""
    cell = (threshold >> 16).to(tl.uint32)
    return (half < cell) | ((half == cell) & (fine_half < (threshold & 0xFFFF).to(tl.uint32)))


@triton.jit
def drawn(row, piece, valid, index, THIN: tl.constexpr, THIN_TAU: tl.constexpr, FINE: tl.constexpr):
    """(Δ's mask, τ's mask): one hash word serves both, a second one where p has more than 16 bits (FINE)."""
    step = tl.load(row + _STEP)
    threshold = tl.load(row + _THRESHOLD)
    key0, key1 = keys(tl.load(piece + _MASK_LANES), step)
    coarse = hashed(index, key0, key1)
    fine = tl.zeros_like(index)
    if FINE:
        key0, key1 = keys(tl.load(piece + _MASK_LANES + 1), step)
        fine = hashed(index, key0, key1)
    keep = valid
    keep_tau = valid
    if THIN == BERNOULLI:
        keep = below(coarse >> 16, fine >> 16, threshold)
    if THIN_TAU == BERNOULLI:
        keep_tau = below(coarse & 0xFFFF, fine & 0xFFFF, threshold)
    return keep, keep_tau


@triton.jit
def kept_by_cut(x, index, high, row, COLUMN: tl.constexpr):
    """Whether top keeps an entry: above the cut, or at it and of a low enough index."""
    bits = magnitude(x)
    cut = tl.load(row + COLUMN).to(tl.int32)
    last = tl.load(row + COLUMN + 1) - (high << 32)
    return (bits > cut) | ((bits == cut) & (index.to(tl.int64) < last))


@triton.jit
def merged(
    row,
    piece,
    valid,
    index,
    update,
    tau,
    THIN: tl.constexpr,
    THIN_TAU: tl.constexpr,
    HASH: tl.constexpr,
    FINE: tl.constexpr,
    RESCALE: tl.constexpr,
    VOTE: tl.constexpr,
):
    """((1−α)·F(Δ)) ⊕ (α·F(τ))."""
    keep = valid
    keep_tau = valid
    if HASH:
        keep, keep_tau = drawn(row, piece, valid, index, THIN, THIN_TAU, FINE)
    high = tl.load(piece + _HIGH)
    if THIN == TOP:
        keep = kept_by_cut(update, index, high, row, _CUT)
    if THIN_TAU == TOP:
        keep_tau = kept_by_cut(tau, index, high, row, _TAU_CUT)
    if THIN != KEEP_ALL:
        update = tl.where(keep, update, 0.0)
        if RESCALE:
            update = update * number(row, _UPDATE_FACTOR)
    if THIN_TAU != KEEP_ALL:
        tau = tl.where(keep_tau, tau, 0.0)
        if RESCALE:
            tau = tau * number(row, _TAU_FACTOR)
    a = update * number(row, _UPDATE_WEIGHT)
    b = tau * number(row, _TAU_WEIGHT)
    if VOTE != LINEAR:
        if VOTE == SIGN:
            total = a + b
            plus = total > 0
        else:
            total = update + tau
            plus = (total >= 0) | (total != total)
        minus = total < 0
        undecided = total != total
        a = tl.where((plus & (a > 0)) | (minus & (a < 0)) | undecided, a, 0.0)
        b = tl.where((plus & (b > 0)) | (minus & (b < 0)) | undecided, b, 0.0)
    return a + b


@triton.jit
def read_tau(
    row,
    piece,
    first,
    lane,
    valid,
    keep,
    index,
    kept_before,
    TAU: tl.constexpr,
    TAU_KIND: tl.constexpr,
    SKIP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Entries of τ; those that F drops need not be read (SKIP)."""
    wanted = valid
    if SKIP:
        wanted = valid & keep
    if TAU == INT8:
        codes = tl.load(pointers(row, _TAU, tl.int8, first, lane, ALIGNED), mask=wanted, other=0)
        block = (index >> 7).to(tl.int32) + tl.load(piece + _SCALE_SHIFT).to(tl.int32)
        scales = tl.load(row + _SCALES).to(tl.pointer_type(tl.float32))
        tau = codes.to(tl.float32) * tl.load(scales + block, mask=wanted, other=0.0)
    elif TAU == SPARSE:
        begin = (first & 31).to(tl.int32)
        bitmap = tl.load(row + _SCALES).to(tl.pointer_type(tl.int32)) + (first >> 5)
        words = tl.load(bitmap + ((begin + lane) >> 5), mask=valid, other=0)
        inside = ((words >> ((begin + lane) & 31)) & 1) * valid.to(tl.int32)
        slot = kept_before + tl.cumsum(inside, 0) - 1
        tau = read(row, _TAU, TAU_KIND, 0, slot, inside != 0, False)
    else:
        tau = read(row, _TAU, TAU_KIND, first, lane, wanted, ALIGNED)
    return tau


@triton.jit
def place(owners, pieces, rows, BLOCK: tl.constexpr, RUNS: tl.constexpr, ALIGNED: tl.constexpr):
    """What this program works on: (row, piece, first entry, lane, valid, low halves of global indices)."""
    owner = owners + tl.program_id(0) * 4
    row = rows + tl.load(owner).to(tl.int64) * _WIDTH
    piece = pieces + tl.load(owner + 1).to(tl.int64) * _PIECE
    start = tl.load(owner + 2).to(tl.int64) * BLOCK
    first = tl.load(piece) + start
    left = tl.minimum(tl.load(piece + 1) - start, BLOCK).to(tl.int32)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
        left = tl.multiple_of(left, 16)
    lane = tl.arange(0, BLOCK)
    along = start.to(tl.uint32) + lane.to(tl.uint32)
    index = tl.load(piece + 2).to(tl.uint32)
    if RUNS:
        run = tl.load(piece + 3).to(tl.uint32)
        index = index + along // run * tl.load(piece + 4).to(tl.uint32) + along % run
    else:
        index = index + along
    return row, piece, first, lane, lane < left, index


@triton.jit
def sweep(
    owners,
    pieces,
    rows,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr,
    MODE: tl.constexpr,
    SOURCE: tl.constexpr,
    ANCHOR: tl.constexpr,
    REOPEN: tl.constexpr,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
    TAU: tl.constexpr,
    TAU_KIND: tl.constexpr,
    THIN: tl.constexpr,
    THIN_TAU: tl.constexpr,
    HASH: tl.constexpr,
    FINE: tl.constexpr,
    SKIP: tl.constexpr,
    RESCALE: tl.constexpr,
    VOTE: tl.constexpr,
):
    """One pass over a block of entries: the plain step, the merge, or Δ alone into the update buffer (FORM).

    Reads stand before the first write, which would keep the compiler from moving them up; masks are drawn
    where they are used, since registers are scarce.
    """
    row, piece, first, lane, valid, index = place(owners, pieces, rows, BLOCK, RUNS, ALIGNED)
    tau = tl.zeros_like(valid.to(tl.float32))
    if MODE == MERGE:
        keep_tau = valid
        if SKIP:
            _, keep_tau = drawn(row, piece, valid, index, THIN, THIN_TAU, FINE)
        kept_before = tl.load(owners + tl.program_id(0) * 4 + 3)
        tau = read_tau(
            row, piece, first, lane, valid, keep_tau, index, kept_before, TAU, TAU_KIND, SKIP, ALIGNED
        )
    base, update, mean, square, widest = base_and_update(
        row,
        first,
        lane,
        valid,
        SOURCE,
        MODE != FORM,
        ANCHOR,
        PARAM,
        STORED,
        WIDE,
        GRAD,
        MOMENT,
        GREATEST,
        ALIGNED,
        INTERPRET,
    )
    if SOURCE == ADVANCE:
        keep_moments(row, piece, first, lane, valid, index, mean, square, widest, MOMENT, GREATEST, ALIGNED)
    if MODE == FORM:
        write(row, _UPDATE, tl.float32, first, lane, valid, update, ALIGNED)
    else:
        if MODE == MERGE:
            update = merged(row, piece, valid, index, update, tau, THIN, THIN_TAU, HASH, FINE, RESCALE, VOTE)
        if WIDE:
            master = (base + update.to(tl.float64)) * number_64(row, _DECAY_AFTER_64)
        else:
            master = (base + update) * number(row, _DECAY_AFTER)
        write_master(row, piece, first, lane, valid, index, master, PARAM, STORED, WIDE, ALIGNED)
        if REOPEN:
            if WIDE:
                write(row, _ANCHOR, tl.float64, first, lane, valid, master, ALIGNED)
            else:
                write(row, _ANCHOR, tl.float32, first, lane, valid, master, ALIGNED)


@triton.jit
def tick(rows):
    """Write into a job's row what follows from the step count and the learning rate on the device.

    With it, a captured graph steps on by itself: the host wrote the row once.
    """
    row = rows + tl.program_id(0).to(tl.int64) * _WIDTH
    clock = tl.load(row + _CLOCK)
    if clock != 0:
        step = tl.load(clock.to(tl.pointer_type(tl.float32)))
        rate = tl.load(tl.load(row + _RATE).to(tl.pointer_type(tl.float32))).to(tl.float64)
        along = step.to(tl.float64)
        power1 = tl.exp2(along * tl.log2(number_64(row, _BETA1_64)))
        power2 = tl.exp2(along * tl.log2(number_64(row, _BETA2_64)))
        tl.store(row + _STEP, step.to(tl.int64))
        singles = row.to(tl.pointer_type(tl.float32))
        tl.store(singles + 2 * _SIZE, (-rate / (1.0 - power1)).to(tl.float32))
        tl.store(singles + 2 * _ROOT, tl.sqrt(1.0 - power2).to(tl.float32))
        doubles = row.to(tl.pointer_type(tl.float64))
        decay = 1.0 - rate * number_64(row, _DECAY_RATE_64)
        tl.store(singles + 2 * _DECAY, decay.to(tl.float32))
        tl.store(doubles + _DECAY_64, decay)
        after = 1.0 - rate * number_64(row, _DECAY_AFTER_RATE_64)
        tl.store(singles + 2 * _DECAY_AFTER, after.to(tl.float32))
        tl.store(doubles + _DECAY_AFTER_64, after)


FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Formats of parameters and gradients that the kernels read, and what they call them."""

INTERPRETED = not isinstance(sweep, triton.runtime.JITFunction)
"""Whether these kernels run in Triton's interpreter, on tensors of the CPU."""
