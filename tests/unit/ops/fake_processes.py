"""Processes of one test: threads that sum tensors with each other, or show each other values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Ring:
    """What the threads communicate through, and a count of the sums."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list[Any] = [None] * size
        self.calls = 0

    def gather(self, rank: int, value: Any) -> list[Any]:
        """What every thread has given."""
        self._given[rank] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def reduce(self, rank: int) -> Callable[[Tensor], None]:
        """A :data:`~trimtab.ops.exact_sum.Reduce` for one of the threads."""

        def summed(counts: Tensor) -> None:
            self.calls += rank == 0
            given = self.gather(rank, counts.clone())
            counts.zero_()
            for one in given:
                counts.add_(one)

        return summed

    def abort(self) -> None:
        """Let no thread wait for one that has failed."""
        self._barrier.abort()


def processes(size: int, work: Callable[[int, Ring], Any]) -> tuple[list[Any], Ring]:
    """Call ``work`` with every rank at the same time. Returns the results; the first real error is raised."""
    ring, results, errors = Ring(size), [None] * size, list[BaseException]()

    def one(rank: int) -> None:
        try:
            results[rank] = work(rank, ring)
        except BaseException as error:
            errors.append(error)
            ring.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results, ring


def run(work: Sequence[Callable[[Callable[[Tensor], None]], Any]]) -> tuple[list[Any], Ring]:
    """Call each function with its own reduce, at the same time. Returns their results and the ring."""
    return processes(len(work), lambda rank, ring: work[rank](ring.reduce(rank)))
