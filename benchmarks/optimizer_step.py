"""Time one optimizer step as a ratio to ``torch.optim.AdamW(fused=True)``, paired in one process.

    python benchmarks/optimizer_step.py [--tables cpu,fallback,small,threads,scaling,memory,gpu] [--layers 30]
        [--repeat 9] [--out FILE.json] [--picture FILE.png]

Parameters have the shapes of a 135M Llama (30 layers) or of fewer layers of it, fp32. One thread, CPU
time; the median over pairs of neighbouring steps, with the lowest and the highest. Gradients are other
numbers in every step, as in training (constant ones would make all of Adam's updates tie).

* ``cpu``: every optimizer with the engine that is chosen by itself.
* ``fallback``: the same with ``kernel="torch"``, which runs where there is no C compiler.
* ``small``: one million parameters in 200 tensors: what calls cost.
* ``threads``: wall time with two threads.
* ``scaling``: step time against the number of parameters, with a picture.
* ``memory``: bytes per parameter of every storage (``delta_storage.py``).
* ``gpu``: ``gpu_step.py``, where there is a CUDA GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trimtab import OnDARE, OnlineMerging, OnTIES

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "step-scaling.png"
SMALL = 1_000_000
TABLES = ("cpu", "fallback", "small", "threads", "memory", "gpu")


class SyntheticDelta:
    """τ of random normal entries, as large as an SFT delta: building a real one is not what is timed."""

    fingerprint = "synthetic"

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._tau = {name: torch.randn_like(p) * 1e-3 for name, p in parameters.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tau

    def check_policy(self, parameters: Any) -> None:
        pass  # the policy is random: there is no reference to compare it with

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tau[name].shape)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._tau[name] if dtype is None else self._tau[name].to(dtype)


class PassingDelta(SyntheticDelta):
    """The same, made when it is asked for: at a billion parameters there is no room for it twice."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._tau = {name: torch.empty(p.shape, device="meta") for name, p in parameters.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(self._tau[name].shape).mul_(1e-3)


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (49152, 576),
        "model.norm.weight": (576,),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + f"self_attn.{n}_proj.weight": (m, 576)
            for n, m in (("q", 576), ("k", 192), ("v", 192), ("o", 576))
        }
        shapes |= {at + f"mlp.{n}_proj.weight": (1536, 576) for n in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (576, 1536)}
        shapes |= {at + f"{n}_layernorm.weight": (576,) for n in ("input", "post_attention")}
    return shapes


def small_shapes() -> dict[str, tuple[int, ...]]:
    return {f"layers.{i}.weight": (50, 100) for i in range(200)}


def square_shapes(count: int) -> dict[str, tuple[int, ...]]:
    """About ``count`` parameters in tensors of at most 2048 × 2048."""
    side = min(2048, max(256, int((count / 4) ** 0.5)))
    return {f"layers.{i}.weight": (side, side) for i in range(max(1, round(count / side**2)))}


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.nn.Parameter]:
    made = {name: torch.nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes.items()}
    for p in made.values():
        p.grad = torch.randn_like(p) * 1e-3
    return made


class Gradients:
    """Gives parameters other gradients in every step: windows that move over one pool of random numbers."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self._parameters, self._steps = list(parameters.values()), 0
        self._pool = torch.randn(sum(p.numel() for p in self._parameters) + 16 * 4096) * 1e-3

    def change(self) -> None:
        self._steps += 1
        at = self._steps * 1009 % 4096 * 16  # aligned as an allocation is
        for p in self._parameters:
            p.grad = self._pool[at : at + p.numel()].view(p.shape)
            at += p.numel()


Make = Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]


def online(cls: Any, delta: SyntheticDelta, **settings: Any) -> Make:
    return lambda ps: cls(ps.items(), delta, lr=1e-6, policy_differs=True, measure_every=0, **settings)


def adamw(**settings: Any) -> Make:
    return lambda ps: torch.optim.AdamW(ps.items(), lr=1e-6, weight_decay=0.0, **settings)


def wrapped(delta: SyntheticDelta, **settings: Any) -> Make:
    def make(ps: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        inner = adamw(fused=True)(ps)
        return OnlineMerging(inner, delta, policy_differs=True, measure_every=0, **settings)

    return make


def contenders(delta: SyntheticDelta, **settings: Any) -> dict[str, Make]:
    return {
        "OnDARE p=0.5, τ masked once": online(OnDARE, delta, reserve_rate=0.5, redraw=False, **settings),
        "OnDARE p=0.01, τ masked once": online(OnDARE, delta, reserve_rate=0.01, redraw=False, **settings),
        "OnDARE p=0.5, redrawn": online(OnDARE, delta, reserve_rate=0.5, **settings),
        "OnDARE p=0.01, redrawn": online(OnDARE, delta, reserve_rate=0.01, **settings),
        "OnTIES p=0.01": online(OnTIES, delta, reserve_rate=0.01, **settings),
        "OnTIES p=0.5": online(OnTIES, delta, reserve_rate=0.5, **settings),
        "OnDARE K=∞, between merges": online(
            OnDARE, delta, reserve_rate=0.5, merge_every=1_000_000, **settings
        ),
        "OnlineMerging around fused AdamW, p=0.5": wrapped(delta, reserve_rate=0.5, **settings),
    }


def cpu_seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def wall_seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def ratio_to_fused(
    make: Make,
    shapes: dict[str, tuple[int, ...]],
    repeat: int,
    clock: Callable[[torch.optim.Optimizer], float] = cpu_seconds,
) -> dict[str, float]:
    ours, fused = parameters(shapes), parameters(shapes)
    gradients = Gradients(ours), Gradients(fused)
    candidate, baseline = make(ours), adamw(fused=True)(fused)
    pairs = []
    for i in range(repeat + 2):  # first steps make state, and find the memory's pages
        for each in gradients:
            each.change()
        pair = clock(candidate), clock(baseline)
        pairs += [pair] if i >= 2 else []
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "milliseconds": round(1e3 * statistics.median(a for a, _ in pairs), 3),
    }


def table(title: str, makers: dict[str, Make], measure: Callable[[Make], dict[str, float]]) -> dict[str, Any]:
    print(f"\n{title}")
    rows = {}
    for name, make in makers.items():
        row = rows[name] = measure(make)
        print(
            f"{name:42s} {row['ratio']:6.2f}  ({row['lowest']} to {row['highest']}) "
            f"{row['milliseconds']:10.3f} ms",
            flush=True,
        )
    return rows


def scaling(repeat: int, largest: int) -> dict[str, Any]:
    """Milliseconds of a step against the number of parameters, each optimizer alone in memory."""
    rows: dict[str, Any] = {}
    for count in (2**20, 2**22, 2**24, 2**26, 2**28, 2**30):
        if count > largest:
            continue
        shapes = square_shapes(count)
        made: dict[str, Make] = {
            "AdamW(fused=True)": adamw(fused=True),
            "OnDARE p=0.5, redrawn": lambda ps: online(OnDARE, PassingDelta(ps), reserve_rate=0.5)(ps),
            "OnTIES p=0.01": lambda ps: online(OnTIES, PassingDelta(ps), reserve_rate=0.01)(ps),
        }
        for name, make in made.items():
            rows.setdefault(name, {})[str(count)] = alone(make, shapes, repeat)
        print(f"{count:>13,} " + "  ".join(f"{name} {rows[name][str(count)]:.2f} ms" for name in made))
    return rows


def alone(make: Make, shapes: dict[str, tuple[int, ...]], repeat: int) -> float:
    gc.collect()  # the last one's optimizer, which hooks hold in cycles
    ps = parameters(shapes)
    count = sum(p.numel() for p in ps.values())
    changing = Gradients(ps) if count < 2**29 else None  # at a billion there is no room for a pool
    optimizer = make(ps)
    times = []
    for _ in range(max(3, repeat) + 1):
        if changing is not None:
            changing.change()
        times.append(1e3 * cpu_seconds(optimizer))
    return round(statistics.median(times[1:]), 3)


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, points in rows.items():
        axes.plot([int(n) for n in points], list(points.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="CPU milliseconds a step, one thread")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def cpu_tables(wanted: set[str], layers: int, repeat: int, largest: int, picture: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    shapes = llama_shapes(layers)
    delta = SyntheticDelta(parameters(shapes)) if wanted & {"cpu", "fallback", "threads"} else None
    if "cpu" in wanted:
        rows = {"AdamW, foreach": adamw(foreach=True), **contenders(delta)}
        found["cpu"] = table("one thread, CPU time", rows, lambda m: ratio_to_fused(m, shapes, repeat))
    if "fallback" in wanted:
        rows = contenders(delta, kernel="torch")
        found["fallback"] = table("without a compiler", rows, lambda m: ratio_to_fused(m, shapes, 3))
    if "small" in wanted:
        small = small_shapes()
        rows = contenders(SyntheticDelta(parameters(small)))
        found["small"] = table(
            "one million in 200 tensors", rows, lambda m: ratio_to_fused(m, small, 20 * repeat)
        )
    if "threads" in wanted:
        torch.set_num_threads(2)
        rows = contenders(delta)
        found["threads"] = table(
            "two threads, wall time", rows, lambda m: ratio_to_fused(m, shapes, repeat, wall_seconds)
        )
        torch.set_num_threads(1)
    if "scaling" in wanted:
        print("\nstep against size, one thread, CPU time")
        found["scaling"] = scaling(repeat // 2, largest)
        draw(found["scaling"], picture)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default=",".join(TABLES), help="see the top of the file")
    parser.add_argument("--layers", type=int, default=30, help="30 is the 135M model")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--largest", type=int, default=2**30, help="of the scaling; a billion takes 21 GB")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizer_step.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    wanted = set(arguments.tables.split(","))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result |= {
        "parameters": sum(torch.Size(shape).numel() for shape in llama_shapes(arguments.layers).values()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    result |= cpu_tables(wanted, arguments.layers, arguments.repeat, arguments.largest, arguments.picture)
    if "memory" in wanted:
        import delta_storage

        memory = delta_storage.memory_table(arguments.layers, 3)
        delta_storage.print_memory(memory)
        result["memory"] = memory
    if "gpu" in wanted:
        import gpu_step

        gpu_step.main([])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
