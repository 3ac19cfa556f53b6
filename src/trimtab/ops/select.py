"""What F is on tensors that are spread over processes: exact cuts and factors from summed histograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.exact_sum import Reduce, alone, chunks, exact_l1
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.sparsify import Cut, Rescale, Sparsifier, Thinning, check_kind, magnitude_bits, thin

# The bits of a magnitude, from the highest on, as digits that a histogram of at most 16 kB counts.
_WIDTHS = {torch.float32: (11, 10, 10), torch.float64: (11, 11, 11, 10, 10, 10)}
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
        if part.x.dtype not in _WIDTHS:
            raise ValueError(f"top needs fp32 or fp64 tensors, got {part.x.dtype}")
    searched = [i for i, part in enumerate(parts) if 0 < part.count < part.layout.total]
    at = {i: _by_magnitude(parts[i]) for i in searched}
    _run(list(at.values()), reduce)
    last = {i: _by_index(parts[i], at[i]) for i in searched if at[i].need < at[i].count}
    _run(list(last.values()), reduce)
    return [_cut(part, at.get(i), last.get(i)) for i, part in enumerate(parts)]


def _cut(part: Part, at: _Search | None, last: _Search | None) -> Cut:
    if at is None:  # all or nothing: no search
        bits = 0 if part.count else (1 << sum(_WIDTHS[part.x.dtype])) - 1
        return Cut(bits, part.layout.total if part.count else 0)
    return Cut(at.value, part.layout.total if last is None else last.value + 1)


def _l1_factors(parts: Sequence[Part], how: Sequence[Thinning], reduce: Reduce) -> list[float]:
    """‖x‖₁/‖F(x)‖₁ of each tensor, and 1 where a sum is 0 or not finite."""
    kept = [_kept(part, one) for part, one in zip(parts, how, strict=True)]
    sums = exact_l1([*(part.x for part in parts), *kept], reduce)
    return [
        before / after if math.isfinite(before) and math.isfinite(after) and before > 0 < after else 1.0
        for before, after in zip(sums[: len(parts)], sums[len(parts) :], strict=True)
    ]


def _kept(part: Part, how: Thinning) -> Iterator[Tensor]:
    for low, chunk in _ranges(part.x):
        yield thin([chunk], [how], Place(part.layout, low))[0]


# -- radix selection


@dataclass(slots=True)
class _Search:
    """The search for the ``need``-th key among integers that are spread over processes, digit by digit.

    Args:
        keys: the local keys, chunk by chunk.
        widths: bits of each digit, from the highest on.
        need: which key, from 1; in the end, among those that are equal to it.
        count: how many keys there are in all processes; in the end, how many are equal to it.
        device: where the keys are.
        largest: count from the largest key on, else from the smallest.
        value: what is known of the key, in the end all of it.
        known: how many of its digits that is.
    """

    keys: Callable[[], Iterator[Tensor]]
    widths: tuple[int, ...]
    need: int
    count: int
    device: torch.device
    largest: bool
    value: int = 0
    known: int = 0

    def histogram(self) -> Tensor:
        """Count the next digit of the local keys that begin with the known ones."""
        width, below = self.widths[self.known], sum(self.widths[self.known + 1 :])
        counts = torch.zeros(1 << width, dtype=torch.int64, device=self.device)
        for keys in self.keys():
            if self.known:
                keys = keys[keys >> below + width == self.value].bitwise_and_((1 << below + width) - 1)
            digits = keys >> below if below else keys
            counts += torch.bincount(digits, minlength=1 << width)
        return counts

    def descend(self, counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Find the next digit in the histogram over all processes."""
        ranked = counts[::-1] if self.largest else counts
        reached = ranked.cumsum()
        if reached[-1] != self.count:
            raise ValueError(
                f"the processes hold {reached[-1]} entries where {self.count} were expected: their layouts "
                "do not make up one tensor"
            )
        place = int(reached.searchsorted(self.need))
        self.count = int(ranked[place])
        self.need -= int(reached[place]) - self.count
        digit = len(counts) - 1 - place if self.largest else place
        self.value = self.value << self.widths[self.known] | digit
        self.known += 1


def _run(searches: Sequence[_Search], reduce: Reduce) -> None:
    """Take all searches to their end; each round sums one histogram of every search that goes on."""
    while going := [search for search in searches if search.known < len(search.widths)]:
        histograms = [search.histogram() for search in going]
        together = torch.cat(histograms)
        reduce(together)
        counts = np.split(together.cpu().numpy(), np.cumsum([one.numel() for one in histograms])[:-1])
        for search, one in zip(going, counts, strict=True):
            search.descend(one)


def _by_magnitude(part: Part) -> _Search:
    """The search for the magnitude of the last entry that is kept."""

    def bits() -> Iterator[Tensor]:
        return map(magnitude_bits, chunks(part.x))

    widths = _WIDTHS[part.x.dtype]
    return _Search(bits, widths, part.count, part.layout.total, part.x.device, largest=True)


def _by_index(part: Part, at: _Search) -> _Search:
    """The search for the index of the last entry that is kept, among those that tie at its magnitude."""

    def indices() -> Iterator[Tensor]:
        for low, chunk in _ranges(part.x):
            tied = (magnitude_bits(chunk) == at.value).nonzero().squeeze(1)
            if tied.numel():
                yield part.layout.indices(low, low + chunk.numel(), device=chunk.device)[tied]

    return _Search(indices, _index_widths(part), at.need, at.count, part.x.device, largest=False)


def _index_widths(part: Part) -> tuple[int, ...]:
    first, digits = divmod((part.layout.total - 1).bit_length(), _INDEX_WIDTH)[::-1]
    return (first,) * (first > 0) + (_INDEX_WIDTH,) * digits


def _ranges(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    low = 0
    for chunk in chunks(flat):
        yield low, chunk
        low += chunk.numel()
