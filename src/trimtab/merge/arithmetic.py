"""What one output tensor is: decided over the whole tensor, then computed range by range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimtab.ops.combine import Operator, merge_range, weighted_sum
from trimtab.ops.exact_sum import exact_l1
from trimtab.ops.interpolate import CHUNK, slerp_coefficients
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.select import Magnitudes, Streamed, cuts
from trimtab.ops.sparsify import Counting, Cut, Thinning, l1_ratio, thin, top_count

BLOCK = 1 << 17
"""Entries worked on at a time: the temporaries stay in the caches."""

_STREAMS = 32
"""Models whose masks have a stream of their own; further ones have a step of their own as well."""

Read = Callable[[int, int], Tensor]
"""Entries ``low … high−1`` of one model's tensor, flat."""


@dataclass(frozen=True)
class Term:
    """One model's part in an output tensor.

    Args:
        read: its entries.
        weight: its weight; of ``slerp`` not used.
        rate: share of its delta's entries that F keeps; 0 drops all.
        place: which of the merge's models it is: its masks are drawn from this.
    """

    read: Read
    weight: float = 1.0
    rate: float = 1.0
    place: int = 0


@dataclass(frozen=True)
class Task:
    """One output tensor: what is read, and what is done with it.

    Args:
        name: its key in the output; masks are a function of it.
        count: number of entries.
        terms: what is combined.
        base: what deltas are taken to, and the result is added to; None combines the models themselves.
        operator: F and ⊕; None for ``slerp``.
        dtype: of the arithmetic: fp32 or fp64, or a 16-bit dtype to which each operation is rounded.
        scale: λ.
        position: t of ``slerp``.
        seed: of the masks.
        stored: whether factors are rounded to ``dtype`` too, as mergekit's are.
        how: what F does to each delta, once that is decided.
    """

    name: str
    count: int
    terms: tuple[Term, ...]
    base: Read | None
    operator: Operator | None
    dtype: torch.dtype
    scale: float = 1.0
    position: float = 0.0
    seed: int = 0
    stored: bool = False
    how: tuple[Thinning, ...] = field(default=())

    @property
    def counting(self) -> Counting:
        """How k follows from a rate, for ``top``."""
        return self.operator.counting if self.operator else "ceil"

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ranges of :data:`BLOCK` entries, and the rest."""
        return _ranges(self.count, BLOCK)

    def delta(self, term: Term, low: int, high: int) -> Tensor:
        """δ of one model: entries ``low … high−1``, in the dtype of the arithmetic."""
        assert self.base is not None
        return term.read(low, high).to(self.dtype) - self.base(low, high).to(self.dtype)

    def deltas(self, term: Term) -> Iterator[Tensor]:
        """δ of one model, piece by piece."""
        return (self.delta(term, low, high) for low, high in self.ranges())

    def magnitudes(self, term: Term) -> Magnitudes:
        """The magnitudes of δ of one model, to be ranked."""
        return Streamed(lambda: self.deltas(term), self.count, self.dtype)


Cuts = Mapping[tuple[int, float], Cut]
"""Where ``top`` cuts the delta of a model (its place) at a rate."""


def decided(tasks: Sequence[Task], found: Cuts | None = None) -> list[Task]:
    """Decide what F does to each delta; that takes passes over the inputs where F selects or restores norms.

    Args:
        tasks: one output tensor, with one or several sets of weights and rates: what they share is decided
            once, and all rates of a model are selected in the same passes.
        found: where ``top`` cuts, where that was decided over more than this tensor.
    """
    cut = _cuts(tasks) if found is None else found
    known: dict[tuple[int, float], Thinning] = {}
    for task in tasks:
        for term in task.terms:
            at = term.place, term.rate
            if at not in known:
                known[at] = _thinning(task, term, cut.get(at))
    return [replace(task, how=tuple(known[t.place, t.rate] for t in task.terms)) for task in tasks]


def _cuts(tasks: Sequence[Task]) -> dict[tuple[int, float], Cut]:
    """Where ``top`` cuts each model's delta in this tensor, at each of its rates."""
    rates: dict[int, dict[float, tuple[Task, Term]]] = {}
    for task in tasks:
        if task.operator is not None and task.operator.sparsify == "top":
            for term in task.terms:
                if 0 < term.rate < 1 and task.count:
                    rates.setdefault(term.place, {})[term.rate] = task, term
    found = {}
    for place, asked in rates.items():
        task, term = next(iter(asked.values()))
        counts = [top_count(task.count, rate, task.counting) for rate in asked]
        for rate, cut in zip(asked, cuts([task.magnitudes(term)], counts), strict=True):
            found[place, rate] = cut[0]
    return found


def _thinning(task: Task, term: Term, cut: Cut | None) -> Thinning:
    operator = task.operator
    if operator is None or operator.sparsify == "none" or term.rate == 1 or task.count == 0:
        return Thinning()
    if term.rate == 0:
        return Thinning(factor=0.0)
    if operator.sparsify == "bernoulli":
        how = Thinning(term.rate, key=mask_key(task.seed, term.place, task.name))
    else:
        how = Thinning(term.rate, cut=cut)
    if operator.rescale == "expected":
        return replace(how, factor=1.0 / term.rate)
    if operator.rescale == "none":
        return how
    kept = (thin([task.delta(term, low, high)], [how], _place(task, low))[0] for low, high in task.ranges())
    sums = exact_l1([task.deltas(term), kept])
    if task.stored:
        sums = [rounded(one, task.dtype) for one in sums]
    factor = l1_ratio(*sums)
    return replace(how, factor=rounded(factor, task.dtype) if task.stored else factor)


def mask_key(seed: int, place: int, name: str) -> MaskKey:
    """The key of the Bernoulli mask on the delta of the ``place``-th model of a merge."""
    return MaskKey(seed, place % _STREAMS, place // _STREAMS, name)


def _place(task: Task, low: int) -> Place:
    return Place(Layout.whole((task.count,)), low)


def computed(task: Task, low: int, high: int) -> Tensor:
    """Entries ``low … high−1`` of the output, in the dtype of the arithmetic.

    Args:
        task: an output tensor that is :func:`decided`.
        low: the first entry.
        high: one past the last.
    """
    if task.operator is None:
        raise ValueError("slerp is computed by its coefficients: see interpolated")
    if task.base is None:
        read = [term.read(low, high) for term in task.terms]
        return weighted_sum(read, [t.weight for t in task.terms], normalize=task.operator.normalize)
    anchor = task.base(low, high).to(task.dtype)
    deltas = [term.read(low, high).to(task.dtype) - anchor for term in task.terms]
    weights = [rounded(term.weight, task.dtype) for term in task.terms]
    return merge_range(
        anchor, deltas, weights, task.how, task.operator, scale=task.scale, place=_place(task, low)
    )


def rounded(weight: float, dtype: torch.dtype) -> float:
    """A weight as a tensor of ``dtype`` holds it."""
    return float(torch.tensor(weight, dtype=dtype))


def coefficients(task: Task) -> tuple[Tensor, Tensor]:
    """The factors of both models in a ``slerp``."""
    first, second = task.terms

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for low, high in _ranges(task.count, CHUNK):
            yield first.read(low, high).to(task.dtype), second.read(low, high).to(task.dtype)

    return slerp_coefficients(task.position, pieces)


def interpolated(task: Task, factors: tuple[Tensor, Tensor], low: int, high: int) -> Tensor:
    """Entries ``low … high−1`` of a ``slerp``, given its :func:`coefficients`."""
    first, second = (term.read(low, high).to(task.dtype) for term in task.terms)
    return factors[0] * first + factors[1] * second


def _ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + size, count)) for low in range(0, count, size))
