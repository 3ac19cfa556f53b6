"""What one output tensor is: decided over the whole tensor, then computed range by range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trimtab.ops.combine import Operator, merge_range, weighted_sum
from trimtab.ops.exact_sum import exact_l1
from trimtab.ops.interpolate import CHUNK, slerp_coefficients
from trimtab.ops.kernels import merging as kernels
from trimtab.ops.kernels.merging import NonFinite
from trimtab.ops.kernels.ranking import NativeMagnitudes, l1_sums, native_cuts
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.rounding import rounded
from trimtab.ops.select import Magnitudes, Streamed, cuts
from trimtab.ops.sparsify import Counting, Cut, Thinning, l1_ratio, thin, top_count

BLOCK = 1 << 17
"""Entries worked on at a time: the temporaries stay in the caches."""

_STREAMS = 32
"""Models whose masks have a stream of their own; further ones have a step of their own as well."""

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)

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
        factors: those of ``slerp``, once they are decided.
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
    how: tuple[Thinning, ...] = ()
    factors: tuple[Tensor, Tensor] | None = None

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

    def magnitudes(self, term: Term, *, native: bool = True) -> Magnitudes:
        """The magnitudes of δ of one model, to be ranked; ``native`` lets the CPU kernels count them."""
        if native and self.native and self.base is not None:
            return NativeMagnitudes(self.base, term.read, self.count, self.dtype, torch.get_num_threads())
        return Streamed(lambda: self.deltas(term), self.count, self.dtype)

    @cached_property
    def native(self) -> bool:
        """Whether the CPU kernels can do it: the numbers are the same."""
        read = [term.read(0, 0).dtype for term in self.terms]
        if self.base is None:
            return self.dtype == torch.float32 and kernels.refuses_sum(read) is None
        return kernels.refuses([self.base(0, 0).dtype, *read], self.dtype) is None


Cuts = Mapping[tuple[int, float], Cut]
"""Where ``top`` cuts the delta of a model (its place) at a rate."""


def decided(tasks: Sequence[Task], found: Cuts | None = None) -> list[Task]:
    """Decide what F does to each delta; that takes passes over the inputs where F selects or restores norms.

    Args:
        tasks: one output tensor, with one or several sets of weights and rates: what they share is decided
            once, and all rates of a model are selected in the same passes.
        found: where ``top`` cuts, where that was decided over more than this tensor.
    """
    if tasks[0].operator is None:
        return [replace(task, factors=_coefficients(task)) for task in tasks]
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
        for rate, cut in zip(asked, ranked([task.magnitudes(term)], counts), strict=True):
            found[place, rate] = cut[0]
    return found


def ranked(magnitudes: Sequence[Magnitudes], counts: Sequence[int]) -> list[list[Cut]]:
    """:func:`trimtab.ops.select.cuts`, by the CPU kernels where all are theirs."""
    native = [one for one in magnitudes if isinstance(one, NativeMagnitudes)]
    return native_cuts(native, counts) if len(native) == len(magnitudes) else cuts(magnitudes, counts)


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
    sums = _l1_sums(task, term, how)
    if task.stored:
        sums = [rounded(one, task.dtype) for one in sums]
    factor = l1_ratio(*sums)
    return replace(how, factor=rounded(factor, task.dtype) if task.stored else factor)


def _l1_sums(task: Task, term: Term, how: Thinning) -> list[float]:
    """Σ|δ| and Σ|F(δ)|."""
    if task.native and task.base is not None:
        return l1_sums(task.base, term.read, how, task.count, task.dtype, torch.get_num_threads())
    kept = (thin([task.delta(term, low, high)], [how], _place(task, low))[0] for low, high in task.ranges())
    return exact_l1([task.deltas(term), kept])


def mask_key(seed: int, place: int, name: str) -> MaskKey:
    """The key of the Bernoulli mask on the delta of the ``place``-th model of a merge."""
    return MaskKey(seed, place % _STREAMS, place // _STREAMS, name)


def _place(task: Task, low: int) -> Place:
    return Place(Layout.whole((task.count,)), low)


def compute_into(task: Task, low: int, high: int, out: Tensor) -> bool:
    """Write entries ``low … high−1`` of the output, in the dtype of ``out``.

    Args:
        task: an output tensor that is :func:`decided`.
        low: the first entry.
        high: one past the last.
        out: where to; flat.

    Returns:
        Whether all that was read and written is finite.
    """
    read = _read(task, low, high)
    if task.native and out.dtype in _NATIVE:
        return _native_into(task, read, low, out) == NonFinite()
    out.copy_(_merged(task, read, low))
    return all(map(is_finite, (*read, out)))


def computed(task: Task, low: int, high: int) -> Tensor:
    """Entries ``low … high−1`` of the output by torch's operations, in the dtype of the arithmetic."""
    return _merged(task, _read(task, low, high), low)


def _read(task: Task, low: int, high: int) -> list[Tensor]:
    """A range of the base, where there is one, and of each model."""
    base = [] if task.base is None else [task.base(low, high)]
    return base + [term.read(low, high) for term in task.terms]


def _merged(task: Task, read: Sequence[Tensor], low: int) -> Tensor:
    weights = [term.weight for term in task.terms]
    if task.operator is None:
        assert task.factors is not None
        first, second = (values.to(task.dtype) for values in read)
        return task.factors[0] * first + task.factors[1] * second
    if task.base is None:
        return weighted_sum(read, weights, normalize=task.operator.normalize)
    anchor, *models = (values.to(task.dtype) for values in read)
    deltas = [model - anchor for model in models]
    weights = [rounded(weight, task.dtype) for weight in weights]
    return merge_range(
        anchor, deltas, weights, task.how, task.operator, scale=task.scale, place=_place(task, low)
    )


def _native_into(task: Task, read: Sequence[Tensor], low: int, out: Tensor) -> NonFinite:
    weights = [term.weight for term in task.terms]
    if task.operator is None:
        assert task.factors is not None
        return kernels.interpolate_into(out, read[0], read[1], *task.factors)
    if task.base is None:
        return kernels.weighted_sum_into(out, read, weights, normalize=task.operator.normalize)
    return kernels.merge_range_into(
        out,
        read[0],
        read[1:],
        weights,
        task.how,
        task.operator,
        scale=task.scale,
        low=low,
        total=task.count,
        dtype=task.dtype,
    )


def is_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return bool(least.isfinite()) and bool(most.isfinite())


def _coefficients(task: Task) -> tuple[Tensor, Tensor]:
    """The factors of both models in a ``slerp``."""
    first, second = task.terms

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for low, high in _ranges(task.count, CHUNK):
            yield first.read(low, high).to(task.dtype), second.read(low, high).to(task.dtype)

    return slerp_coefficients(task.position, pieces)


def _ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + size, count)) for low in range(0, count, size))
