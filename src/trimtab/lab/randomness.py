"""Random choices that are the same on every machine: named streams over NumPy's raw PCG64 words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_WORDS = 4096
_RANGE = 1 << 64


class Stream:
    """An endless sequence of random choices, fixed by the key it was made with.

    NumPy promises that a bit generator's raw words never change, but not that ``Generator``'s methods turn
    them into the same numbers for ever. A world that is to be the same in five years therefore uses the raw
    words.

    Args: key: Strings and integers that name the stream, for instance ``("sft", 0)``. Different keys give
        independent
            streams.

    Example:
        >>> Stream("doc", 0).below(10), Stream("doc", 0).below(10), Stream("doc", 1).below(10)
        (7, 7, 3)
    """

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        self._source = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little")))
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            self._words = self._source.random_raw(_WORDS).tolist()
            self._words.reverse()
        return self._words.pop()

    def below(self, n: int) -> int:
        """Return an integer in [0, n), uniform to within n / 2⁶⁴."""
        return (self._word() * n) >> 64

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high], both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._word() < probability * _RANGE

    def pick(self, options: Sequence[T]) -> T:
        """Return one of ``options``."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """Return one of ``options`` with probability proportional to its weight."""
        point = self._word() / _RANGE * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            point -= weight
            if point < 0:
                return option
        return options[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order (Fisher and Yates)."""
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """Return ``k`` different items in random order."""
        pool = list(items)
        for i in range(k):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]
