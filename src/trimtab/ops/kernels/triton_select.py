# mypy: ignore-errors
"""Where top cuts, found on the GPU without the host: the k-th largest magnitude and, of its ties, the last.

For each tensor: (1) ``sample``: order statistics of a sample give a bracket in which the threshold lies
almost surely. (2) ``scan``, one pass over all entries: advance the moments, count what is above the
bracket, list what is in it (a few per cent) and count that in fine bins. (3) ``narrow``: find the
threshold's bin. (4) ``gather``: pick its few entries from the list. (5) ``choose``: the cut is the one of
them at the right rank, by magnitude and then by index. (6) ``exhaust`` does, in passes over the tensor,
what a bracket that missed, or more ties than fit, leaves undone. So the result is exact always, and one
pass over memory is what it costs as a rule.

A threshold of 0 needs no ties told apart: a zero is the same kept or dropped. The cut is written into the
job's row, where the step reads it.
"""

import triton
import triton.language as tl

from trimtab.ops.kernels.triton_columns import SEARCH, STATE, WIDTH, column
from trimtab.ops.kernels.triton_kernels import base_and_update, keep_moments, place
from trimtab.ops.kernels.triton_numbers import hashed, magnitude

_WIDTH = tl.constexpr(WIDTH)
_CUT = tl.constexpr(column("cut_bits"))
_SEARCH, _STATE = tl.constexpr(len(SEARCH)), tl.constexpr(len(STATE))
_JOB, _TOTAL = tl.constexpr(SEARCH.index("job")), tl.constexpr(SEARCH.index("total"))
_COUNT, _CAPACITY = tl.constexpr(SEARCH.index("count")), tl.constexpr(SEARCH.index("capacity"))
_OFFSET, _SAMPLES = tl.constexpr(SEARCH.index("offset")), tl.constexpr(SEARCH.index("samples"))
_UPPER, _LOWER = tl.constexpr(SEARCH.index("upper")), tl.constexpr(SEARCH.index("lower"))
_ABOVE, _LISTED = tl.constexpr(STATE.index("above")), tl.constexpr(STATE.index("listed"))
_LOW, _HIGH = tl.constexpr(STATE.index("low")), tl.constexpr(STATE.index("high"))
_SHIFT, _NEED = tl.constexpr(STATE.index("shift")), tl.constexpr(STATE.index("need"))
_FOUND, _SHORT = tl.constexpr(STATE.index("found")), tl.constexpr(STATE.index("short"))
_TODO = tl.constexpr(STATE.index("todo"))

# What is left to do.
CHOOSE, EXHAUST = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sample(
    which,
    searches,
    states,
    rows,
    SAMPLES: tl.constexpr,
    BINS: tl.constexpr,
    INTERPRET: tl.constexpr,
    SOURCE: tl.constexpr,
    ANCHOR: tl.constexpr,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
):
    """Bracket the threshold by two order statistics of a sample: positions from the masks' hash, all of a
    small tensor.
    """
    number = tl.load(which + tl.program_id(0)).to(tl.int64)
    search = searches + number * _SEARCH
    state = states + number * _STATE
    row = rows + tl.load(search + _JOB) * _WIDTH
    total = tl.load(search + _TOTAL)
    samples = tl.load(search + _SAMPLES).to(tl.int32)
    lane = tl.arange(0, SAMPLES)
    key = (lane * 0 + 0x243F6A88).to(tl.uint32)
    drawn = tl.umulhi(hashed(lane.to(tl.uint32), key, key), (lane * 0).to(tl.uint32) + total.to(tl.uint32))
    at = tl.where(total <= SAMPLES, lane, drawn.to(tl.int32)).to(tl.int64)
    valid = lane < samples
    _, update, _, _, _ = base_and_update(
        row,
        0,
        at,
        valid,
        SOURCE,
        False,
        ANCHOR,
        PARAM,
        STORED,
        WIDE,
        GRAD,
        MOMENT,
        GREATEST,
        False,
        INTERPRET,
    )
    bits = tl.where(valid, magnitude(update), -1)
    upper = tl.load(search + _UPPER).to(tl.int32)
    lower = tl.load(search + _LOWER).to(tl.int32)
    high = tl.full((), 0, tl.int32)
    low = tl.full((), 0, tl.int32)
    for i in range(31):  # the largest value that at least `upper` (`lower`) entries reach, bit by bit
        bit = 1 << (30 - i)
        high = tl.where(tl.sum((bits >= high + bit).to(tl.int32)) >= upper, high + bit, high)
        low = tl.where(tl.sum((bits >= low + bit).to(tl.int32)) >= lower, low + bit, low)
    # Bins cover the bracket; where it has no upper end, two octaves above the sample's largest entry.
    reach = tl.minimum(tl.max(bits), 0x7FFFFFFF - 0x1000000) + 0x1000000
    reach = tl.where(upper > 0, high, tl.maximum(reach, low))
    shift = tl.full((), 0, tl.int32)
    for i in range(31):
        shift = shift + (((reach - low) >> i) >= BINS).to(tl.int32)
    tl.store(state + _LOW, low)
    tl.store(state + _HIGH, high)
    tl.store(state + _SHIFT, shift)


@triton.jit
def scan(
    owners,
    pieces,
    rows,
    searches,
    states,
    bins,
    listed_bits,
    listed_index,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr,
    SOURCE: tl.constexpr,
    KEEP: tl.constexpr,
    ANCHOR: tl.constexpr,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
):
    """Form Δ (and keep the advanced moments), count what is above the bracket, list what is in it."""
    row, piece, first, lane, valid, index = place(owners, pieces, rows, BLOCK, False, ALIGNED)
    number = tl.load(owners + tl.program_id(0) * 4 + 3).to(tl.int64)
    search = searches + number * _SEARCH
    state = states + number * _STATE
    _, update, mean, square, widest = base_and_update(
        row,
        first,
        lane,
        valid,
        SOURCE,
        False,
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
    low = tl.load(state + _LOW)
    high = tl.load(state + _HIGH)
    shift = tl.load(state + _SHIFT)
    if KEEP:
        keep_moments(row, piece, first, lane, valid, index, mean, square, widest, MOMENT, GREATEST, ALIGNED)
    bits = magnitude(update)
    tl.atomic_add(state + _ABOVE, tl.sum((valid & (bits > high)).to(tl.int32)), sem="relaxed")
    inside = valid & (bits >= low) & (bits <= high) & (bits > 0)
    begin = tl.atomic_add(state + _LISTED, tl.sum(inside.to(tl.int32)), sem="relaxed")
    slot = begin + tl.cumsum(inside.to(tl.int32), 0) - 1
    room = inside & (slot < tl.load(search + _CAPACITY).to(tl.int32))
    offset = tl.load(search + _OFFSET)
    tl.store(listed_bits + offset + slot, bits, mask=room)
    tl.store(listed_index + offset + slot, index.to(tl.int32), mask=room)
    bin = tl.minimum((bits - low) >> shift, BINS - 1)
    tl.atomic_add(bins + number * BINS + bin, 1, mask=inside, sem="relaxed")


@triton.jit
def narrow(searches, states, bins, rows, BINS: tl.constexpr, SHORT: tl.constexpr):
    """Find the bin of the threshold. Where it is kept whole, or the threshold is 0, that is the cut."""
    number = tl.program_id(0).to(tl.int64)
    search = searches + number * _SEARCH
    state = states + number * _STATE
    cut = rows + tl.load(search + _JOB) * _WIDTH + _CUT
    total = tl.load(search + _TOTAL)
    listed = tl.load(state + _LISTED)
    low = tl.load(state + _LOW)
    shift = tl.load(state + _SHIFT)
    need = tl.load(search + _COUNT).to(tl.int32) - tl.load(state + _ABOVE)
    lane = tl.arange(0, BINS)
    counts = tl.load(bins + number * BINS + (BINS - 1 - lane))  # from the largest values on
    before = tl.sum((tl.cumsum(counts, 0) < need).to(tl.int32))
    rest = need - tl.sum(tl.where(lane < before, counts, 0))
    found = tl.sum(tl.where(lane == before, counts, 0))
    begin = low + ((BINS - 1 - before) << shift)
    if (need > listed) & (low == 0):
        tl.store(cut, 0)
        tl.store(cut + 1, total)
    elif (need <= 0) | (need > listed):  # the bracket missed: begin again
        tl.store(state + _LOW, 0)
        tl.store(state + _SHIFT, 31)
        tl.store(state + _TODO, EXHAUST)
    elif rest == found:
        tl.store(cut, begin.to(tl.int64))
        tl.store(cut + 1, total)
    else:
        tl.store(state + _LOW, begin)
        tl.store(state + _SHIFT, tl.where(before == 0, 31, shift))  # the last bin has no upper end
        tl.store(state + _NEED, rest)
        tl.store(state + _FOUND, found)
        lost = (found > SHORT) | (listed > tl.load(search + _CAPACITY).to(tl.int32))
        tl.store(state + _TODO, tl.where(lost, EXHAUST, CHOOSE))


@triton.jit
def gather(
    owners, searches, states, listed_bits, listed_index, short, BLOCK: tl.constexpr, SHORT: tl.constexpr
):
    """Pick the entries of the threshold's bin from the list: magnitude above, falling index below."""
    number = tl.load(owners + tl.program_id(0) * 2).to(tl.int64)
    block = tl.load(owners + tl.program_id(0) * 2 + 1)
    state = states + number * _STATE
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = (slot < tl.load(state + _LISTED)) & (tl.load(state + _TODO) == CHOOSE)
    offset = tl.load(searches + number * _SEARCH + _OFFSET)
    low = tl.load(state + _LOW)
    bits = tl.load(listed_bits + offset + slot, mask=inside, other=0)
    index = tl.load(listed_index + offset + slot, mask=inside, other=0)
    wanted = inside & (bits >= low) & (((bits - low) >> tl.load(state + _SHIFT)) == 0)
    begin = tl.atomic_add(state + _SHORT, tl.sum(wanted.to(tl.int32)), sem="relaxed")
    to = begin + tl.cumsum(wanted.to(tl.int32), 0) - 1
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    tl.store(short + number * SHORT + to, key, mask=wanted & (to < SHORT))


@triton.jit
def choose(searches, states, short, rows, SHORT: tl.constexpr):
    """Find the entry of the right rank among the few of the threshold's bin; the cut is just behind it."""
    number = tl.program_id(0).to(tl.int64)
    state = states + number * _STATE
    if tl.load(state + _TODO) == CHOOSE:
        lane = tl.arange(0, SHORT)
        found = tl.load(state + _FOUND)
        need = tl.load(state + _NEED)
        entries = tl.load(short + number * SHORT + lane, mask=lane < found, other=-1)
        key = tl.full((), 0, tl.int64)
        one = tl.full((), 1, tl.int64)
        for i in range(63):
            bit = one << (62 - i)
            key = tl.where(tl.sum((entries >= key + bit).to(tl.int32)) >= need, key + bit, key)
        cut = rows + tl.load(searches + number * _SEARCH + _JOB) * _WIDTH + _CUT
        tl.store(cut, key >> 32)
        tl.store(cut + 1, 0x80000000 - (key & 0xFFFFFFFF))


@triton.jit
def exhaust(
    which,
    searches,
    states,
    rows,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
    SOURCE: tl.constexpr,
    ANCHOR: tl.constexpr,
    PARAM: tl.constexpr,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    GREATEST: tl.constexpr,
):
    """Find the cut in passes over the tensor, one program alone: 4 bits of the threshold each, then its ties.

    It does so from the window of 2^shift values that is known: all of them where the bracket missed.
    """
    number = tl.load(which + tl.program_id(0)).to(tl.int64)
    search = searches + number * _SEARCH
    state = states + number * _STATE
    if tl.load(state + _TODO) == EXHAUST:
        row = rows + tl.load(search + _JOB) * _WIDTH
        total = tl.load(search + _TOTAL).to(tl.int32)
        count = tl.load(search + _COUNT).to(tl.int32)
        threshold = tl.load(state + _LOW)
        left = tl.load(state + _SHIFT)
        lane = tl.arange(0, BLOCK)
        digits = tl.arange(0, 16)
        while left > 0:
            width = tl.minimum(left, 4)
            left = left - width
            steps = threshold + (digits << left)
            reached = tl.zeros([16], tl.int32)
            for start in range(0, total, BLOCK):
                at = start + lane
                valid = at < total
                _, update, _, _, _ = base_and_update(
                    row,
                    0,
                    at.to(tl.int64),
                    valid,
                    SOURCE,
                    False,
                    ANCHOR,
                    PARAM,
                    STORED,
                    WIDE,
                    GRAD,
                    MOMENT,
                    GREATEST,
                    False,
                    INTERPRET,
                )
                bits = tl.where(valid, magnitude(update), -1)
                reached += tl.sum((bits[:, None] >= steps[None, :]).to(tl.int32), axis=0)
            enough = (reached >= count) & (digits < (1 << width)) & (steps >= threshold)
            threshold = threshold + ((tl.sum(enough.to(tl.int32)) - 1) << left)
        above = tl.full((), 0, tl.int32)
        for start in range(0, total, BLOCK):
            at = start + lane
            valid = at < total
            _, update, _, _, _ = base_and_update(
                row,
                0,
                at.to(tl.int64),
                valid,
                SOURCE,
                False,
                ANCHOR,
                PARAM,
                STORED,
                WIDE,
                GRAD,
                MOMENT,
                GREATEST,
                False,
                INTERPRET,
            )
            above += tl.sum((valid & (magnitude(update) > threshold)).to(tl.int32))
        seen = tl.full((), 0, tl.int32)
        last = total
        for start in range(0, total, BLOCK):
            at = start + lane
            valid = at < total
            _, update, _, _, _ = base_and_update(
                row,
                0,
                at.to(tl.int64),
                valid,
                SOURCE,
                False,
                ANCHOR,
                PARAM,
                STORED,
                WIDE,
                GRAD,
                MOMENT,
                GREATEST,
                False,
                INTERPRET,
            )
            tied = valid & (magnitude(update) == threshold)
            rank = seen + tl.cumsum(tied.to(tl.int32), 0)
            here = tied & (rank == count - above)
            last = tl.minimum(last, tl.min(tl.where(here, at + 1, total)))
            seen += tl.sum(tied.to(tl.int32))
        tl.store(row + _CUT, threshold.to(tl.int64))
        tl.store(row + _CUT + 1, last.to(tl.int64))
