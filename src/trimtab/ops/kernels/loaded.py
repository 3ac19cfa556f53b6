"""The compiled CPU kernels as this process has them, and the threads that run them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch

from trimtab.ops.kernels.build import BuildError, library

T = TypeVar("T")


def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, compiled where that has not been done (1 to 3 seconds), or why there is none."""
    try:
        return ctypes.CDLL(str(library(defines()))), None
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled CPU kernels cannot be loaded ({error})"


def defines() -> list[str]:
    """What the kernels have to know of this torch: whether its square root is rounded correctly."""
    x = torch.arange(1, 4097, dtype=torch.float32)
    correct = torch.equal(x.sqrt(), x.to(torch.float64).sqrt().to(torch.float32))
    return [] if correct else ["TRIMTAB_SQRT_NEWTON=1"]


def together(work: Callable[[T], Any], given: T, threads: int) -> None:
    """Let so many threads, this one included, call ``work``; it returns when all of them have."""
    others = [_pool().submit(work, given) for _ in range(threads - 1)]
    try:
        work(given)
    finally:
        wait(others)
    for other in others:
        other.result()


def each(work: Callable[[T], None], items: Iterable[T], threads: int) -> None:
    """Call ``work`` with every item, on so many threads, this one included."""

    def run(left: Any) -> None:
        for item in left:  # a list's iterator gives each item to one thread
            work(item)

    left = list(items)
    together(run, iter(left), max(1, min(threads, len(left))))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="trimtab")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
