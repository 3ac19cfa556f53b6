"""Several sources as one: how often each row comes, and in which order.

The weight of a source is the number of passes over it in one epoch. With weight 1 (the default) every row
comes once, so that sources without weights are simply put together, as LLaMA-Factory's ``concat`` and
alignment-handbook's mixer of 1.0 do. With 0.5 a random half of the rows comes once; with 2.5 every row
comes twice and a random half a third time. Weights are not shares of the mixture: the share of a source
also depends on its size. (With ``datasets.interleave_datasets`` a small source is either repeated or ends
the epoch early; here neither happens unless a weight asks for it.)

Sources are interleaved evenly, so that any stretch of an epoch has about the proportions of the whole.
Which rows a fraction takes, and the phase of the interleaving, are drawn with keyed hashes: the same seed
gives the same mixture on every machine and Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")


def keyed(seed: int, *place: int) -> float:
    """Return a number in [0, 1) that depends on the seed and the place alone.

    Examples:
        >>> keyed(0, 1) == keyed(0, 1), 0 <= keyed(0, 2) < 1
        (True, True)
    """
    key = ",".join(map(str, (seed, *place))).encode()
    drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return (drawn >> 11) / 2**53


def rows_of(kept: int, weight: float) -> int:
    """Return how many rows a source gives to one epoch: weight × kept, halves rounded up, and at least one.

    The weight is taken as the decimal that was written, so that 0.1 × 5 is one half.

    Examples:
        >>> rows_of(10, 0.5), rows_of(10, 2.5), rows_of(5, 0.1), rows_of(100, 0.001)
        (5, 25, 1, 1)
    """
    exact = Fraction(repr(float(weight))) * kept
    return max(1, int(exact + Fraction(1, 2))) if kept else 0


def passes(kept: int, weight: float, seed: int, source: int) -> list[int]:
    """Return the rows that a source gives to one epoch: whole passes in order, then a random part, in order.

    Args:
        kept: rows the source has.
        weight: passes over it.
        seed: which part.
        source: its place among the sources.

    Examples:
        >>> passes(3, 2.0, 0, 0)
        [0, 1, 2, 0, 1, 2]
    """
    if not kept:
        return []
    whole, rest = divmod(rows_of(kept, weight), kept)
    ranked = sorted(range(kept), key=lambda row: (keyed(seed, source, row), row)) if rest else []
    return [*range(kept)] * whole + sorted(ranked[:rest])


def interleave(counts: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Return the order of a mixture as (source, place within the source), every source evenly spread.

    Item k of a source with n items stands at (k + u) / n of the epoch, where u in [0, 1) is drawn per source.

    Args:
        counts: items per source.
        seed: for the draw of u.

    Examples:
        >>> [source for source, _ in interleave([4, 2], seed=0)].count(0)
        4
    """
    phase = [keyed(seed, source) for source in range(len(counts))]
    order = [
        ((place + phase[source]) / count, source, place)
        for source, count in enumerate(counts)
        for place in range(count)
    ]
    return [(source, place) for _, source, place in sorted(order)]


def shuffled(order: Sequence[int], seed: int) -> list[int]:
    """Return ``order`` in a random order that depends on the seed and its length alone.

    Examples:
        >>> sorted(shuffled([3, 1, 2], seed=0))
        [1, 2, 3]
    """
    ranked = sorted(range(len(order)), key=lambda place: (keyed(seed, -1, place), place))
    return [order[place] for place in ranked]


def mix(kept: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Return the rows of a mixture as indices into its sources put one behind the other.

    Args:
        kept: rows per source.
        weights: passes per source.
        seed: for the fractions and the interleaving.

    Examples:
        >>> mix([3], [1.0], seed=7)
        [0, 1, 2]
    """
    chosen = [
        passes(count, weight, seed, source)
        for source, (count, weight) in enumerate(zip(kept, weights, strict=True))
    ]
    starts = [sum(kept[:source]) for source in range(len(kept))]
    order = interleave([len(rows) for rows in chosen], seed)
    return [starts[source] + chosen[source][place] for source, place in order]


def mix_streams(
    streams: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float], seed: int
) -> Iterator[T]:
    """Yield the items of several streams, whose sizes nobody knows yet, until all are exhausted.

    A weight means passes here too: a stream is started again for every whole pass, and in a partial pass
    each row is taken with the fraction's probability. Which stream comes next is drawn in proportion to the
    weights of those that are not exhausted, so short streams end early.

    Args:
        streams: each starts one pass.
        weights: passes per stream.
        seed: for the draws.
    """
    live = {
        source: _repeated(stream, weight, seed, source)
        for source, (stream, weight) in enumerate(zip(streams, weights, strict=True))
    }
    drawn = 0
    while live:
        source = (
            _drawn({source: weights[source] for source in live}, keyed(seed, -1, drawn))
            if len(live) > 1
            else min(live)
        )
        drawn += 1
        try:
            yield next(live[source])
        except StopIteration:
            del live[source]


def _repeated(stream: Callable[[], Iterator[T]], weight: float, seed: int, source: int) -> Iterator[T]:
    exact = Fraction(repr(float(weight)))
    whole = int(exact)
    for _ in range(whole):
        yield from stream()
    if exact > whole:
        for row, item in enumerate(stream()):
            if keyed(seed, source, row) < exact - whole:
                yield item


def _drawn(weights: dict[int, float], uniform: float) -> int:
    left = uniform * sum(weights.values())
    for source, weight in weights.items():
        left -= weight
        if left < 0:
            return source
    return max(weights)
