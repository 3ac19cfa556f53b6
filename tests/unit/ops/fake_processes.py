"""Processes of one test: threads that sum tensors with each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Ring:
    """A :data:`~trimtab.ops.exact_sum.Reduce` for each of several threads, and a count of the calls."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=20)
        self._given: list[Tensor | None] = [None] * size
        self.calls = 0
        self.entries = 0

    def reduce(self, rank: int) -> Callable[[Tensor], None]:
        def summed(counts: Tensor) -> None:
            self._given[rank] = counts.clone()
            self._barrier.wait()
            counts.zero_()
            for given in self._given:
                assert given is not None
                counts.add_(given)
            if rank == 0:
                self.calls += 1
                self.entries += counts.numel()
            self._barrier.wait()

        return summed


def run(work: Sequence[Callable[[Callable[[Tensor], None]], Any]]) -> tuple[list[Any], Ring]:
    """Call each function with its own reduce, at the same time. Returns their results and the ring."""
    ring, results = Ring(len(work)), [None] * len(work)
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work[rank](ring.reduce(rank))
        except BaseException as error:
            errors.append(error)
            ring._barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results, ring
