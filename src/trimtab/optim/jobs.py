"""From an optimizer's parameters and state to the jobs that engines run, kept from step to step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import UserError, unknown
from trimtab.ops import Operator, top_count
from trimtab.ops.kernels.engine import Engine, engines_for
from trimtab.ops.kernels.job import Job, Stored
from trimtab.ops.kernels.sampling import step_and_sample
from trimtab.ops.kernels.torch_engine import TorchEngine
from trimtab.ops.sparsify import Counting
from trimtab.optim.settling import needs_others, step_shards

Kernel = Literal["auto", "native", "triton", "torch"]
KERNELS: tuple[Kernel, ...] = ("auto", "native", "triton", "torch")


@dataclass(slots=True, eq=False)
class Slot:
    """One parameter as its optimizer steps it.

    Args:
        name: canonical name.
        job: its job.
        pointer: address of the parameter's storage when the job was made.
        count: the state's step count, a tensor.
        made_from: the state that the job holds; where the state has another tensor now, the job is stale.
        steps: the value of ``count`` after the last step, so that it need not be read back.
        merges: whether the parameter has a delta.
        group: index of its param group.
        rate: p at which ``job.tau`` was made; None before.
        engine: what runs the job.
    """

    name: str
    job: Job
    pointer: int
    count: Any = None
    made_from: tuple[Any, ...] = ()
    steps: int = 0
    merges: bool = False
    group: int = 0
    rate: float | None = None
    engine: Engine | None = None


class Runner:
    """Gives every job to the fastest engine that takes it.

    Args:
        kernel: ``auto`` takes the fastest; a name takes that engine and refuses what it cannot run.
        operator: F and ⊕ of all jobs.

    Raises:
        UserError: an unknown name, or an engine that is not available here.
    """

    def __init__(self, kernel: Kernel, operator: Operator) -> None:
        if kernel not in KERNELS:
            raise unknown("kernel", kernel, KERNELS)
        self.kernel, self.operator = kernel, operator
        self._torch = TorchEngine()

    def __getstate__(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "operator": self.operator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def engine_for(self, job: Job) -> Engine:
        """The first engine that takes the job."""
        if self.kernel == "torch":
            return self._torch
        reasons = []
        for name, engine, missing in engines_for(job.param.device.type):
            if self.kernel not in ("auto", name):
                continue
            reason = missing if engine is None else engine.refuses(job, self.operator)
            if engine is None and self.kernel == "auto":
                _say_once(name, str(missing))
            if engine is not None and reason is None:
                return engine
            reasons.append(str(reason))
        if self.kernel != "auto":
            what = "; ".join(reasons) or f"it does not run on {job.param.device.type}"
            raise UserError(f"kernel {self.kernel!r} cannot step {job.name}: {what}; use kernel='auto'")
        return self._torch

    def run(self, slots: Sequence[Slot], *, sums: Tensor | None = None) -> None:
        """Take the step of every slot's job.

        Args:
            slots: what to step, with all per-step fields of their jobs set.
            sums: float64 (slots, SUMS) to be filled with what is measured, by the engine or, where it does
                not measure, of a sample of the entries; None measures nothing.
        """
        for slot in slots:
            if slot.engine is None:
                slot.engine = self.engine_for(slot.job)
        together = [i for i, slot in enumerate(slots) if needs_others(slot.job, self.operator)]
        if together:
            pairs = [(slots[i].job, _engine_of(slots[i])) for i in together]
            measured = None if sums is None else sums[together]
            step_shards(pairs, self.operator, measured)
            if sums is not None and measured is not None:
                sums[together] = measured
        apart = set(together)
        by_engine: dict[int, tuple[Engine, list[int]]] = {}
        for i, slot in enumerate(slots):
            if i not in apart:
                engine = _engine_of(slot)
                by_engine.setdefault(id(engine), (engine, []))[1].append(i)
        for engine, rows in by_engine.values():
            jobs = [slots[i].job for i in rows]
            if sums is None:
                engine.step(jobs, self.operator)
            elif engine.measures:
                part = torch.zeros(len(jobs), sums.shape[1], dtype=torch.float64, device=sums.device)
                engine.step(jobs, self.operator, part)
                sums[rows] = part
            else:
                sums[rows] = step_and_sample(engine, jobs, self.operator).to(sums.device)


def _engine_of(slot: Slot) -> Engine:
    assert slot.engine is not None
    return slot.engine


class KernelWarning(UserWarning):
    """The step's fast kernel is not available here, and plain torch takes its place."""


@lru_cache(maxsize=8)
def _say_once(name: str, reason: str) -> None:
    warnings.warn(
        f"the {name} kernel is not available ({reason}): steps run in plain torch, which gives the same "
        "numbers and takes several times as long; kernel='torch' says that this is meant",
        KernelWarning,
        stacklevel=2,
    )


@lru_cache(maxsize=4096)
def kept_count(total: int, rate: float, counting: Counting) -> int:
    """K of the top sparsifier, computed once for each size."""
    return top_count(total, rate, counting)


def stored_as(rounding: str) -> Stored:
    """The job's word for a resolved rounding mode."""
    assert rounding in ("nearest", "residual", "stochastic")
    return rounding  # type: ignore[return-value]
