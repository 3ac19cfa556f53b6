"""What an engine is, and which there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from trimtab.ops.combine import Operator
from trimtab.ops.kernels.job import Job


class Engine(Protocol):
    """Runs lists of jobs. All engines give the same numbers (see :class:`Job`)."""

    name: str
    measures: bool
    """Whether :meth:`step` can fill ``sums``."""

    def refuses(self, job: Job, operator: Operator) -> str | None:
        """Why the engine cannot run this job; None where it can."""

    def update(self, jobs: Sequence[Job]) -> None:
        """Advance Adam's moments and form Δ in full, in ``job.update``."""

    def step(self, jobs: Sequence[Job], operator: Operator, sums: Tensor | None = None) -> None:
        """Take the jobs' step; add to ``sums`` (jobs, SUMS) what is measured."""


@lru_cache(maxsize=8)
def engines_for(device: str) -> tuple[tuple[str, Engine | None, str | None], ...]:
    """(name, engine, why there is none) for a type of device, fastest first.

    The torch engine, which runs everywhere, is not among them.
    """
    if device == "cpu":
        return (("native", *_native()),)
    if device == "cuda":
        return (("triton", *_triton()),)
    return ()


def _native() -> tuple[Engine | None, str | None]:
    from trimtab.ops.kernels import native

    return (native.NativeEngine(), None) if native.available() else (None, native.reason())


def _triton() -> tuple[Engine | None, str | None]:
    try:
        from trimtab.ops.kernels.triton_engine import TritonEngine
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    return TritonEngine(), None
