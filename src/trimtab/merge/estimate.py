"""How long a merge takes: a sample of it is computed, and nothing written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from trimtab.merge.arithmetic import BLOCK, compute_into, decided
from trimtab.merge.plan import Plan

SAMPLE = 1 << 20
"""Entries that are computed to see how long all take."""


@dataclass(frozen=True)
class Estimate:
    """What a merge takes.

    Args:
        seconds: for all of it.
        rate: entries of the output a second.
    """

    seconds: float
    rate: float


def estimated(plan: Plan) -> Estimate:
    """Compute the beginning of the largest tensor, and tell from it what all take."""
    weights = [output for output in plan.outputs if not output.copied]
    total = sum(output.entry.count for output in plan.outputs)
    if not weights or not total:
        return Estimate(0.0, 0.0)
    output = max(weights, key=lambda one: one.entry.count)
    task = plan.task(output)
    count = min(task.count, SAMPLE)
    part = replace(task, count=count)
    out = torch.empty(BLOCK, dtype=output.entry.dtype)
    began = time.perf_counter()
    ready = decided([part])[0]  # with all threads
    middle = time.perf_counter()
    for low, high in part.ranges():
        compute_into(ready, low, high, out[: high - low])
    computing = (time.perf_counter() - middle) / max(1, torch.get_num_threads())
    rate = count / (middle - began + computing)
    return Estimate(total / rate, rate)
