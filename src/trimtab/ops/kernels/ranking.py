"""Offline merging on the CPU, in C: where the top sparsifier cuts a delta, and the sums of magnitudes.

A sample brackets the k-th largest magnitude; one pass counts what lies above the bracket and at its ends, and
lists what lies inside. Where the bracket has missed, or too much lies inside, histograms take a pass for each
digit. Either way the cut is the one of :func:`trimtab.ops.select.cuts`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.exact_sum import exact_l1
from trimtab.ops.kernels.loaded import each
from trimtab.ops.kernels.merge_structs import (
    KINDS,
    NAN_MAGNITUDE,
    WORD,
    CRanked,
    CTerm,
    fill_term,
    in_single,
    library,
)
from trimtab.ops.select import Counts, cuts
from trimtab.ops.sparsify import Cut, Thinning

Read = Callable[[int, int], Tensor]
"""Entries ``low … high−1`` of one tensor, flat; called from several threads at once where there are some."""

WIDTHS = {torch.float32: (16, 15), torch.bfloat16: (15,), torch.float16: (15,)}
_RANGE = 1 << 18
"""Entries of a pass that are read at a time."""
_COUNTED = 1 << 22
"""Entries that a histogram counts at a time: its counters are cleared and summed up each time."""
_SMALL = 1 << 16
"""Entries that are listed all."""
_LINE = 16
_LINES = (1 << 9, 1 << 16)
_LISTED = 1 << 22
"""Entries that a bracket lists, at most: 16 MB, however large the models."""
_MARGIN = 4.0
"""Standard deviations of the sample's rank on either side."""
_EXPONENTS = 256

Bits = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """What a pass has found in the range that begins at ``start``."""

    start: int
    count: int
    above: int
    at_high: int
    at_low: int
    inside: Bits

    def equal(self, value: int, low: int, high: int) -> int:
        """How many are ``value``, which lies in the bracket ``low … high``."""
        if value == high:
            return self.at_high
        return self.at_low if value == low else int(np.count_nonzero(self.inside == value))


class NativeMagnitudes:
    """The magnitudes of one model's delta: :class:`trimtab.ops.select.Magnitudes`, in C.

    Args:
        read_anchor: reads the anchor.
        read_model: reads the model; fp32, bf16 or fp16, as the anchor.
        total: entries of the tensor.
        dtype: of the arithmetic, see :func:`trimtab.ops.kernels.merging.merge_range_into`.
        threads: how many threads read and count.
    """

    def __init__(
        self, read_anchor: Read, read_model: Read, total: int, dtype: torch.dtype, threads: int = 1
    ) -> None:
        self.total = total
        self.dtype = dtype
        self.widths = WIDTHS[dtype]
        self._read = read_anchor, read_model
        self._threads = threads

    def histograms(self, known: int, prefixes: Sequence[int]) -> Counts:
        """See :class:`trimtab.ops.select.Magnitudes`."""
        rows: list[Counts] = []
        asked = list(prefixes) if known else [0]
        ranges = list(_ranges(self.total, _COUNTED))

        def count(part: list[tuple[int, int]]) -> None:
            counts = np.zeros((len(asked), 1 << self.widths[known]), np.int64)
            for low, high in part:
                delta_histograms(*self._both(low, high), self.dtype, known, asked, counts)
            rows.append(counts)

        shares = [ranges[i :: self._threads] for i in range(self._threads)]
        each(count, [share for share in shares if share] or [[]], self._threads)
        return np.broadcast_to(sum(rows[1:], rows[0]), (len(prefixes), 1 << self.widths[known]))

    def ties(self, bits: int) -> int:
        """See :class:`trimtab.ops.select.Magnitudes`."""
        value = in_single(bits, self.dtype)
        return sum(one.at_high for one in self.survey(value, value))

    def tie(self, bits: int, number: int) -> int:
        """See :class:`trimtab.ops.select.Magnitudes`."""
        value = in_single(bits, self.dtype)
        return self.place(self.survey(value, value), value, (value, value), number)

    def survey(self, low: int, high: int) -> list[_Surveyed]:
        """Count the magnitudes above ``high`` and at both ends, list those between them; as fp32's bits."""
        ranges = list(_ranges(self.total, _RANGE))
        found: dict[int, _Surveyed] = {}

        def look(ends: tuple[int, int]) -> None:
            found[ends[0]] = _survey(*self._both(*ends), self.dtype, ends[0], (low, high))

        each(look, ranges, self._threads)
        return [found[start] for start, _ in ranges]

    def sample(self, before: int, total: int, lines: int) -> list[Bits]:
        """The share of this tensor in a sample of ``lines`` times 16 neighbours among ``total`` entries.

        Args:
            before: entries of the tensors before this one.
            total: entries of all tensors.
            lines: of the whole sample.
        """
        ranges = []
        for low, high in _ranges(self.total, _RANGE):
            share = lines * (before + high) // total - lines * (before + low) // total
            if share and high - low >= _LINE:
                ranges.append((low, high, share))
        found: dict[int, Bits] = {}

        def look(item: tuple[int, int, int]) -> None:
            low, high, share = item
            found[low] = _listed(*self._both(low, high), self.dtype, min(share, (high - low) // _LINE))

        each(look, ranges, self._threads)
        return [found[low] for low, _, _ in ranges]

    def place(self, surveys: Sequence[_Surveyed], value: int, ends: tuple[int, int], number: int) -> int:
        """Index of the ``number``-th entry of a magnitude, from 1, given a survey with it in the bracket."""
        for one in surveys:
            equal = one.equal(value, *ends)
            if number <= equal:
                plan = _plan(*self._both(one.start, one.start + one.count), self.dtype)
                plan.high, plan.found = value, number
                return one.start + int(library().trimtab_place(ctypes.addressof(plan)))
            number -= equal
        raise ValueError("there are not as many ties")

    def _both(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        return self._read[0](low, high), self._read[1](low, high)


def native_cuts(magnitudes: Sequence[NativeMagnitudes], counts: Sequence[int]) -> list[list[Cut]]:
    """:func:`trimtab.ops.select.cuts`, most often in one pass.

    Args:
        magnitudes: of each tensor; ranked as one, one after the other.
        counts: each k, between 1 and the number of all entries.
    """
    total = sum(one.total for one in magnitudes)
    searched = {k for k in counts if k < total}
    valid = all(1 <= k <= total for k in counts)
    if valid and len(searched) == 1 and len({one.dtype for one in magnitudes}) == 1:
        found = _cuts_in_one_pass(magnitudes, searched.pop(), total)
        if found is not None:
            return [found if k < total else [Cut(0, one.total) for one in magnitudes] for k in counts]
    return cuts(magnitudes, counts)


def _cuts_in_one_pass(magnitudes: Sequence[NativeMagnitudes], k: int, total: int) -> list[Cut] | None:
    ends = _bracket(magnitudes, k, total)
    if ends is None:
        return None
    surveys = [one.survey(*ends) for one in magnitudes]
    found = _ranked([one for survey in surveys for one in survey], ends, k)
    if found is None:
        return None
    value, need = found
    equal = [sum(one.equal(value, *ends) for one in survey) for survey in surveys]
    bits = _in_dtype(value, magnitudes[0].dtype)
    if need == sum(equal):
        return [Cut(bits, one.total) for one in magnitudes]
    result, left = [], need
    for one, survey, tied in zip(magnitudes, surveys, equal, strict=True):
        index = one.total
        if tied > left:
            index = one.place(survey, value, ends, left) + 1 if left else 0
        result.append(Cut(bits, index))
        left -= min(tied, left)
    return result


def _bracket(magnitudes: Sequence[NativeMagnitudes], k: int, total: int) -> tuple[int, int] | None:
    """Two magnitudes between which the k-th largest lies, most likely; None where a pass would list much."""
    if total <= _SMALL:
        return 0, NAN_MAGNITUDE
    lines, before, found = min(max(total >> 14, _LINES[0]), _LINES[1]), 0, list[Bits]()
    for one in magnitudes:
        found += one.sample(before, total, lines)
        before += one.total
    if not found:  # crumbs
        return None
    sample = np.concatenate(found)
    ranked = np.sort(sample)
    size = len(ranked)
    rank = k / total * size
    middle = ranked[size - min(max(round(rank), 1), size)]
    above = np.count_nonzero(sample.reshape(-1, _LINE) >= middle, axis=1)
    margin = _MARGIN * float(np.sqrt(np.square(above - above.mean()).sum() + 1)) + 1
    last, first = size - int(rank - margin), size - int(np.ceil(rank + margin))
    high = int(ranked[last]) if last < size else NAN_MAGNITUDE
    low = int(ranked[first]) if first >= 0 else 0
    inside = int(np.searchsorted(ranked, high, "left") - np.searchsorted(ranked, low, "right"))
    crowded = 4 * inside > size or inside * total > _LISTED * size
    return None if crowded else (low, high)


def _ranked(surveys: Sequence[_Surveyed], ends: tuple[int, int], k: int) -> tuple[int, int] | None:
    """The k-th largest and how many of its equals are among the k; None where it lies outside the bracket."""
    low, high = ends
    need = k - sum(one.above for one in surveys)
    at_high, at_low = sum(one.at_high for one in surveys), sum(one.at_low for one in surveys)
    if need < 1:
        return None
    if need <= at_high:
        return high, need
    need -= at_high
    inside = np.concatenate([one.inside for one in surveys])
    if need <= len(inside):
        inside.partition(len(inside) - need)
        value = int(inside[len(inside) - need])
        return value, need - int(np.count_nonzero(inside > value))
    need -= len(inside)
    return (low, need) if need <= at_low else None


def delta_histograms(
    anchor: Tensor, model: Tensor, dtype: torch.dtype, known: int, prefixes: Sequence[int], counts: Counts
) -> None:
    """Add to ``counts`` how many of a range's magnitudes have which digit after the ``known`` first ones.

    Args:
        anchor: the range of the anchor; fp32, bf16 or fp16.
        model: that of the model.
        dtype: of the arithmetic.
        known: how many digits of :data:`WIDTHS` the prefixes hold.
        prefixes: these digits, one for each row; where none are known, there is one row.
        counts: int64, (prefixes, 2^width).
    """
    widths = WIDTHS[dtype]
    if counts.shape != (len(prefixes), 1 << widths[known]) or not counts.flags.c_contiguous:
        raise ValueError(f"expected counts of {len(prefixes)} × 2^{widths[known]}, got {counts.shape}")
    plan = _plan(anchor, model, dtype)
    wanted = np.asarray(prefixes, np.int64)
    plan.counts, plan.width, plan.below = counts.ctypes.data, widths[known], sum(widths[known + 1 :])
    plan.prefixes, plan.prefix_count = wanted.ctypes.data if known else 0, len(wanted)
    if not library().trimtab_histogram(ctypes.addressof(plan)):
        raise MemoryError("the CPU kernels found no memory for a histogram")


def l1_tables(
    anchor: Tensor, model: Tensor, how: Thinning, *, low: int = 0, total: int, dtype: torch.dtype
) -> Tensor:
    """Of |δ| and of |F(δ)| in a range: for each exponent how many there are, and the sum of their fractions.

    Both are the tables that :func:`trimtab.ops.exact_sum.exact_l1` sums over processes.

    Args:
        anchor: the range of the anchor; fp32, bf16 or fp16.
        model: that of the model.
        how: F; its factor is left out.
        low: where the range begins.
        total: entries of the whole tensor.
        dtype: of the arithmetic.

    Returns:
        int64 tensor (2, 2, 256).
    """
    sums = torch.zeros(2, 2, _EXPONENTS, dtype=torch.int64)
    for at in range(low, low + anchor.numel(), _RANGE):  # none may lie on both sides of 2^32
        size = min(_RANGE, low + anchor.numel() - at)
        for start, count in _sides(at, size):
            part = slice(start - low, start - low + count)
            plan, term = _plan(anchor[part], model[part], dtype), CTerm()
            fill_term(term, how, start, count, total, dtype, [])
            plan.term, plan.base = ctypes.addressof(term), start % WORD
            plan.sums = sums.data_ptr()
            library().trimtab_l1(ctypes.addressof(plan))
    return sums


def l1_sums(
    read_anchor: Read, read_model: Read, how: Thinning, total: int, dtype: torch.dtype, threads: int = 1
) -> list[float]:
    """Σ|δ| and Σ|F(δ)| of a whole tensor, F without its factor: what :func:`exact_l1` gives, NaN included."""
    tables: list[Tensor] = []

    def add(ends: tuple[int, int]) -> None:
        both = read_anchor(*ends), read_model(*ends)
        tables.append(l1_tables(*both, how, low=ends[0], total=total, dtype=dtype))

    each(add, _ranges(total, _RANGE), threads)
    nothing = torch.empty(0)
    counted = (
        torch.stack(tables).sum(0).view(-1) if tables else torch.zeros(4 * _EXPONENTS, dtype=torch.int64)
    )
    return exact_l1([nothing, nothing], lambda counts: counts.add_(counted))


# -- between Python and C


def _survey(
    anchor: Tensor, model: Tensor, dtype: torch.dtype, start: int, ends: tuple[int, int]
) -> _Surveyed:
    plan, inside = _plan(anchor, model, dtype), np.empty(anchor.numel() + _LINE, np.uint32)
    plan.low, plan.high = ends
    plan.list = inside.ctypes.data
    library().trimtab_survey(ctypes.addressof(plan))
    return _Surveyed(start, plan.n, plan.above, plan.at_high, plan.at_low, inside[: plan.found].copy())


def _listed(anchor: Tensor, model: Tensor, dtype: torch.dtype, lines: int) -> Bits:
    """The magnitudes of a range, or of a sample of lines, as fp32's bits."""
    count = _LINE * lines if lines else anchor.numel()
    plan, found = _plan(anchor, model, dtype), np.empty(count + _LINE, np.uint32)
    plan.low, plan.high, plan.lines, plan.list = 1, 0, lines, found.ctypes.data
    library().trimtab_survey(ctypes.addressof(plan))
    return found[: plan.found]


def _plan(anchor: Tensor, model: Tensor, dtype: torch.dtype) -> CRanked:
    if anchor.numel() != model.numel() or not (anchor.is_contiguous() and model.is_contiguous()):
        raise ValueError(f"ranges of {anchor.numel()} and {model.numel()} entries, or not contiguous")
    return CRanked(
        anchor=anchor.data_ptr(),
        model=model.data_ptr(),
        anchor_kind=KINDS[anchor.dtype],
        model_kind=KINDS[model.dtype],
        kind=KINDS[dtype],
        n=anchor.numel(),
    )


def _in_dtype(magnitude: int, dtype: torch.dtype) -> int:
    """The inverse of :func:`~trimtab.ops.kernels.merge_structs.in_single`: the greatest number for NaN."""
    if magnitude == NAN_MAGNITUDE:
        return 0x7FFFFFFF if dtype == torch.float32 else 0x7FFF
    if dtype == torch.bfloat16:
        return magnitude >> 16
    if dtype == torch.float16:
        return int(np.array(magnitude, np.uint32).view(np.float32).astype(np.float16).view(np.uint16))
    return magnitude


def _ranges(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + size, total)) for low in range(0, total, size))


def _sides(low: int, count: int) -> Iterator[tuple[int, int]]:
    """A range in the pieces whose indices have one upper half."""
    left = min(count, -low % WORD or count)
    yield low, left
    if count > left:
        yield low + left, count - left
