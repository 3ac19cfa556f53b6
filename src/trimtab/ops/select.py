"""What F is on tensors that are spread over processes: exact cuts and factors from summed histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.exact_sum import Reduce, alone, chunks, exact_l1
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.sparsify import (
    Cut,
    Rescale,
    Sparsifier,
    Thinning,
    check_kind,
    l1_ratio,
    magnitude_bits,
    thin,
)

# The bits of a magnitude, from the highest on, as digits that a histogram of at most 16 kB counts.
WIDTHS = {
    torch.float32: (11, 10, 10),
    torch.float64: (11, 11, 11, 10, 10, 10),
    torch.bfloat16: (8, 7),
    torch.float16: (8, 7),
}
Counts = np.ndarray[Any, np.dtype[np.int64]]
_INDEX_WIDTH = 11


@dataclass(frozen=True, slots=True)
class Part:
    """What this process has of an unsharded tensor, and what F shall do to that tensor.

    Args:
        x: the local entries, flat, fp32 or fp64.
        layout: where they lie.
        rate: p in (0, 1].
        count: k, for ``top``.
        key: source of the mask, for ``bernoulli``.
    """

    x: Tensor
    layout: Layout
    rate: float = 1.0
    count: int = 0
    key: MaskKey | None = None

    def changed_by(self, kind: Sparsifier) -> bool:
        """Whether F is more than the identity."""
        if kind == "none" or self.rate == 1 or self.layout.total == 0:
            return False
        return kind != "top" or self.count < self.layout.total


def thinnings(
    parts: Sequence[Part], kind: Sparsifier, rescale: Rescale, reduce: Reduce = alone
) -> list[Thinning]:
    """Decide what F does to unsharded tensors of which each process holds a part.

    It is what :func:`trimtab.ops.sparsify.thinning` decides for a tensor that is whole. ``top`` costs three
    sums over the processes (six in fp64), and one more for every 11 bits of the index where ties have to be
    cut; ``l1`` costs one. All tensors share them.

    Args:
        parts: this process's parts: in every process of the same tensors, in the same order.
        kind: the sparsifier.
        rescale: how it rescales.
        reduce: sums an int64 tensor over the processes.
    """
    for part in parts:
        check_kind(kind, rescale, part.rate)
    acting = [i for i, part in enumerate(parts) if part.changed_by(kind)]
    changed = [parts[i] for i in acting]
    if kind == "top":
        found = [
            Thinning(p.rate, cut=cut) for p, cut in zip(changed, global_cuts(changed, reduce), strict=True)
        ]
    else:
        found = [Thinning(p.rate, key=p.key) for p in changed]
    if rescale == "expected":
        found = [replace(how, factor=1.0 / how.rate) for how in found]
    elif rescale == "l1":
        factors = _l1_factors(changed, found, reduce)
        found = [replace(how, factor=factor) for how, factor in zip(found, factors, strict=True)]
    decided = dict(zip(acting, found, strict=True))
    return [decided.get(i, Thinning()) for i in range(len(parts))]


def global_cuts(parts: Sequence[Part], reduce: Reduce = alone) -> list[Cut]:
    """Where to cut so that exactly ``count`` entries of each unsharded tensor are kept.

    Largest magnitudes first, ties by lower index, NaN above infinity: what :func:`trimtab.ops.top_mask`
    keeps. Radix selection: the histogram of one digit of the magnitudes' bits after the other, summed over
    the processes, says in which bin the k-th largest lies. Where not all entries that tie with it are kept,
    a second selection, over their indices, says which is the last one.

    Args:
        parts: this process's parts: in every process of the same tensors, in the same order.
        reduce: sums an int64 tensor over the processes; called once a digit for all tensors together.

    Examples:
        >>> part = Part(torch.tensor([1.0, -3.0, 3.0]), Layout.whole((3,)), count=1)
        >>> global_cuts([part]) == [Cut(bits=0x40400000, index=2)]
        True
    """
    for part in parts:
        if not 0 <= part.count <= part.layout.total:
            raise ValueError(f"cannot keep {part.count} of {part.layout.total} entries")
        if part.x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"top needs fp32 or fp64 tensors, got {part.x.dtype}")
    searched = [i for i, part in enumerate(parts) if 0 < part.count < part.layout.total]
    at = {i: _by_magnitude(parts[i]) for i in searched}
    _run(list(at.values()), reduce)
    found = {i: search.descent for i, search in at.items()}
    last = {i: _by_index(parts[i], one) for i, one in found.items() if one.need < one.count}
    _run(list(last.values()), reduce)
    ends = {i: search.descent for i, search in last.items()}
    return [_cut(part, found.get(i), ends.get(i)) for i, part in enumerate(parts)]


def _cut(part: Part, at: _Descent | None, last: _Descent | None) -> Cut:
    if at is None:  # all or nothing: no search
        bits = 0 if part.count else (1 << sum(WIDTHS[part.x.dtype])) - 1
        return Cut(bits, part.layout.total if part.count else 0)
    return Cut(at.value, part.layout.total if last is None else last.value + 1)


def _l1_factors(parts: Sequence[Part], how: Sequence[Thinning], reduce: Reduce) -> list[float]:
    """‖x‖₁/‖F(x)‖₁ of each tensor, and 1 where a sum is 0 or not finite."""
    kept = [_kept(part, one) for part, one in zip(parts, how, strict=True)]
    sums = exact_l1([*(part.x for part in parts), *kept], reduce)
    return [l1_ratio(*pair) for pair in zip(sums[: len(parts)], sums[len(parts) :], strict=True)]


def _kept(part: Part, how: Thinning) -> Iterator[Tensor]:
    for low, chunk in _ranges(part.x):
        yield thin([chunk], [how], Place(part.layout, low))[0]


class Magnitudes(Protocol):
    """The magnitudes of entries that need not lie in memory, as they are counted for a cut.

    Attributes:
        total: number of entries.
        widths: bits of each digit of a magnitude, from the highest on.
    """

    total: int
    widths: tuple[int, ...]

    def histograms(self, known: int, prefixes: Sequence[int]) -> Counts:
        """How many entries have which digit after the ``known`` first ones: a row for each prefix."""

    def ties(self, bits: int) -> int:
        """How many entries have the magnitude ``bits``."""

    def tie(self, bits: int, number: int) -> int:
        """Index of the ``number``-th of them, from 1."""


class Streamed:
    """The magnitudes of a tensor that is read, or computed, piece by piece.

    Args:
        pieces: yields the entries in order, each time it is called.
        total: their number.
        dtype: their dtype.
    """

    def __init__(self, pieces: Callable[[], Iterable[Tensor]], total: int, dtype: torch.dtype) -> None:
        self._pieces = pieces
        self.total = total
        self.widths = WIDTHS[dtype]

    def histograms(self, known: int, prefixes: Sequence[int]) -> Counts:
        """See :class:`Magnitudes`."""
        width, below = self.widths[known], sum(self.widths[known + 1 :])
        counts = torch.zeros(len(prefixes), 1 << width, dtype=torch.int64)
        for keys in self._keys():
            for row, prefix in zip(counts, prefixes, strict=True):
                row += _digits(keys, prefix if known else None, width, below)
        return counts.numpy()

    def ties(self, bits: int) -> int:
        """See :class:`Magnitudes`."""
        return sum(int((keys == bits).sum()) for keys in self._keys())

    def tie(self, bits: int, number: int) -> int:
        """See :class:`Magnitudes`."""
        low = 0
        for keys in self._keys():
            tied = (keys == bits).nonzero().squeeze(1)
            if number <= tied.numel():
                return low + int(tied[number - 1])
            number -= tied.numel()
            low += keys.numel()
        raise ValueError("there are not as many ties")

    def _keys(self) -> Iterator[Tensor]:
        return (magnitude_bits(chunk) for piece in self._pieces() for chunk in chunks(piece))


def cuts(magnitudes: Sequence[Magnitudes], counts: Sequence[int]) -> list[list[Cut]]:
    """Where to cut so that the ``k`` largest of all entries of several tensors are kept, for several k.

    The tensors are ranked as one, one after the other; ties go to the lower index.

    Args:
        magnitudes: of each tensor.
        counts: each k, between 1 and the number of all entries.

    Returns:
        For each k a cut for each tensor.

    Examples:
        >>> x = torch.tensor([1.0, -3.0, 3.0])
        >>> cuts([Streamed(lambda: [x], 3, x.dtype)], [1]) == [[Cut(bits=0x40400000, index=2)]]
        True
    """
    widths, total = magnitudes[0].widths, sum(one.total for one in magnitudes)
    if not all(1 <= k <= total for k in counts):
        raise ValueError(f"cannot keep {list(counts)} of {total} entries")
    searched = {k: _Descent(widths, k, total, largest=True) for k in set(counts) if k < total}
    for known in range(len(widths)):
        prefixes = sorted({search.value for search in searched.values()})
        if prefixes:
            rows = np.zeros((len(prefixes), 1 << widths[known]), np.int64)
            for one in magnitudes:  # none is kept: arrays between large temporaries split up the heap
                rows += one.histograms(known, prefixes)
            for search in searched.values():
                search.descend(rows[prefixes.index(search.value)])
    return [_cuts_at(searched.get(k), magnitudes) for k in counts]


def _cuts_at(found: _Descent | None, magnitudes: Sequence[Magnitudes]) -> list[Cut]:
    """The cut of each tensor, given the magnitude at which to cut; everything is kept where it is None."""
    if found is None or found.need == found.count:
        return [Cut(found.value if found else 0, one.total) for one in magnitudes]
    result, left = [], found.need
    for one in magnitudes:
        tied = one.ties(found.value) if len(magnitudes) > 1 else found.count
        if tied <= left:
            index = one.total
        else:
            index = one.tie(found.value, left) + 1 if left else 0
        result.append(Cut(found.value, index))
        left -= min(tied, left)
    return result


# -- radix selection


@dataclass(slots=True)
class _Descent:
    """The search for the ``need``-th of ``count`` integers, digit by digit, given histograms of the digits.

    Args:
        widths: bits of each digit, from the highest on.
        need: which integer, from 1; in the end, among those that are equal to it.
        count: how many integers there are; in the end, how many are equal to it.
        largest: count from the largest on, else from the smallest.
        value: what is known of the integer, in the end all of it.
        known: how many of its digits that is.
    """

    widths: tuple[int, ...]
    need: int
    count: int
    largest: bool
    value: int = 0
    known: int = 0

    def descend(self, counts: Counts) -> None:
        """Find the next digit in the histogram of those that begin with the known ones."""
        ranked = counts[::-1] if self.largest else counts
        reached = ranked.cumsum()
        if reached[-1] != self.count:
            raise ValueError(
                f"{reached[-1]} entries where {self.count} were expected: the layouts of the processes do "
                "not make up one tensor"
            )
        place = int(reached.searchsorted(self.need))
        self.count = int(ranked[place])
        self.need -= int(reached[place]) - self.count
        digit = len(counts) - 1 - place if self.largest else place
        self.value = self.value << self.widths[self.known] | digit
        self.known += 1


@dataclass(slots=True)
class _Search:
    """A descent among integers that are spread over processes.

    Args:
        keys: the local keys, chunk by chunk.
        descent: how far it is.
        device: where the keys are.
    """

    keys: Callable[[], Iterator[Tensor]]
    descent: _Descent
    device: torch.device

    def histogram(self) -> Tensor:
        """Count the next digit of the local keys that begin with the known ones."""
        at = self.descent
        width, below = at.widths[at.known], sum(at.widths[at.known + 1 :])
        counts = torch.zeros(1 << width, dtype=torch.int64, device=self.device)
        for keys in self.keys():
            counts += _digits(keys, at.value if at.known else None, width, below)
        return counts


def _digits(keys: Tensor, prefix: int | None, width: int, below: int) -> Tensor:
    """The histogram of a digit of ``width`` bits with ``below`` bits after it, of the keys that begin so."""
    if prefix is not None:
        keys = keys[keys >> below + width == prefix].bitwise_and_((1 << below + width) - 1)
    return torch.bincount(keys >> below if below else keys, minlength=1 << width)


def _run(searches: Sequence[_Search], reduce: Reduce) -> None:
    """Take all searches to their end; each round sums one histogram of every search that goes on."""
    while going := [one for one in searches if one.descent.known < len(one.descent.widths)]:
        histograms = [search.histogram() for search in going]
        together = torch.cat(histograms)
        reduce(together)
        counts = np.split(together.cpu().numpy(), np.cumsum([one.numel() for one in histograms])[:-1])
        for search, one in zip(going, counts, strict=True):
            search.descent.descend(one)


def _by_magnitude(part: Part) -> _Search:
    """The search for the magnitude of the last entry that is kept."""

    def bits() -> Iterator[Tensor]:
        return map(magnitude_bits, chunks(part.x))

    widths = WIDTHS[part.x.dtype]
    return _Search(bits, _Descent(widths, part.count, part.layout.total, largest=True), part.x.device)


def _by_index(part: Part, at: _Descent) -> _Search:
    """The search for the index of the last entry that is kept, among those that tie at its magnitude."""

    def indices() -> Iterator[Tensor]:
        for low, chunk in _ranges(part.x):
            tied = (magnitude_bits(chunk) == at.value).nonzero().squeeze(1)
            if tied.numel():
                yield part.layout.indices(low, low + chunk.numel(), device=chunk.device)[tied]

    return _Search(indices, _Descent(_index_widths(part), at.need, at.count, largest=False), part.x.device)


def _index_widths(part: Part) -> tuple[int, ...]:
    first, digits = divmod((part.layout.total - 1).bit_length(), _INDEX_WIDTH)[::-1]
    return (first,) * (first > 0) + (_INDEX_WIDTH,) * digits


def _ranges(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    low = 0
    for chunk in chunks(flat):
        yield low, chunk
        low += chunk.numel()
