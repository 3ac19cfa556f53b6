"""Time a step that measures its merges against one that does not: the same optimizer, in turns.

    python benchmarks/diagnostics_overhead.py [--layers 4] [--repeat 7] [--out FILE.json]

Parameters have the shapes of a Llama's layers (30 of them and the embedding are 135M); one thread, CPU time,
medians of the ratios of neighbouring steps, and the ratio of the fastest of each, which a busy machine spoils
least. With a measurement every 100 steps the diagnostics cost a
hundredth of what a measuring step costs more, and what every step does for the drift.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from optimizer_step import SyntheticDelta, llama_shapes, parameters

from trimtab import OnDARE, OnTIES

EVERY = 100
OUT = Path(__file__).parent / "results" / "diagnostics_overhead.json"


class Measurable(SyntheticDelta):
    """τ with its norms, which the drift is a share of."""

    @property
    def statistics(self) -> dict[str, Any]:
        return {name: SimpleNamespace(norm=float(tau.norm())) for name, tau in self._tau.items()}


def cpu_seconds(call: Any) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def compared(kind: type, kernel: str, delta: Any, shapes: dict[str, Any], repeat: int) -> dict[str, Any]:
    optimizer = kind(
        parameters(shapes).items(), delta, lr=1e-6, reserve_rate=0.5, policy_differs=True, kernel=kernel
    )
    meter, pairs = optimizer._meter, []
    for _ in range(repeat + 1):  # the first makes state
        meter.every = 1
        measuring = cpu_seconds(optimizer.step)
        meter.every = 0
        pairs.append((measuring, cpu_seconds(optimizer.step)))
    ratios = [a / b for a, b in pairs[1:]]
    plain = min(b for _, b in pairs[1:])
    notes = min(notes_of(optimizer) for _ in range(20))
    ratio = min(a for a, _ in pairs[1:]) / plain
    return {
        "engine": next(iter(optimizer._slots.values())).engine.name,
        "measuring_step_ratio": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "ratio_of_fastest": round(ratio, 2),
        "plain_step_ms": round(1e3 * plain, 3),
        "drift_every_step_us": round(1e6 * notes, 1),
        "overhead_percent": round(100 * ((ratio - 1) / EVERY + notes / plain), 2),
    }


def notes_of(optimizer: Any) -> float:
    """CPU seconds that a step spends on following the drift."""
    slots = [slot for slot in optimizer._slots.values() if slot.job.settings.merge]

    def follow() -> None:
        optimizer._meter.begin(optimizer.param_groups, 1)
        optimizer._note_merges(slots)
        optimizer._meter.end(optimizer.param_groups)

    return cpu_seconds(follow)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--kernels", nargs="+", default=["auto", "torch"])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    llama = {name: shape for name, shape in llama_shapes(arguments.layers).items() if "embed" not in name}
    small = {f"layers.{i}.weight": (50, 100) for i in range(200)}
    rows = [row for shapes in (llama, small) for row in measured(shapes, arguments.kernels, arguments.repeat)]
    result = {
        "measure_every": EVERY,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measured(shapes: dict[str, tuple[int, ...]], kernels: list[str], repeat: int) -> list[dict[str, Any]]:
    """A row for each optimizer and kernel."""
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    delta = Measurable(parameters(shapes))
    print(f"{count:,} parameters in {len(shapes)} tensors, fp32, p = 0.5, one thread, CPU time")
    rows = []
    for kind in (OnDARE, OnTIES):
        for kernel in kernels:
            about = {"parameters": count, "tensors": len(shapes), "optimizer": kind.__name__}
            rows.append(about | compared(kind, kernel, delta, shapes, repeat))
            print(f"{kind.__name__:8s} {rows[-1]}", flush=True)
    return rows


if __name__ == "__main__":
    main()
