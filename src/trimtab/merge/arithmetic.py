"""What one output tensor is: decided over the whole tensor, then computed range by range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimtab.ops.combine import Operator, merge_range, weighted_sum
from trimtab.ops.exact_sum import exact_l1
from trimtab.ops.interpolate import CHUNK, slerp_coefficients
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.select import Magnitudes, Streamed, cuts
from trimtab.ops.sparsify import Cut, Thinning, l1_ratio, thin, top_count

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


def decided(task: Task, found: Sequence[Cut | None] = ()) -> Task:
    """Decide what F does to each delta; that takes passes over the inputs where F selects or restores norms.

    Args:
        task: an output tensor.
        found: where ``top`` cuts each delta, where that was decided over more than this tensor.
    """
    operator = task.operator
    if operator is None or operator.sparsify == "none":
        return replace(task, how=(Thinning(),) * len(task.terms))
    given = [*found] or [None] * len(task.terms)
    return replace(
        task, how=tuple(_thinning(task, operator, t, cut) for t, cut in zip(task.terms, given, strict=True))
    )


def _thinning(task: Task, operator: Operator, term: Term, cut: Cut | None) -> Thinning:
    if term.rate == 1 or task.count == 0:
        return Thinning()
    if term.rate == 0:
        return Thinning(factor=0.0)
    if operator.sparsify == "bernoulli":
        how = Thinning(term.rate, key=mask_key(task.seed, term.place, task.name))
    elif cut is not None:
        how = Thinning(term.rate, cut=cut)
    else:
        count = top_count(task.count, term.rate, operator.counting)
        how = Thinning(term.rate, cut=cuts([task.magnitudes(term)], [count])[0][0])
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
