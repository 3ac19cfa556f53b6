"""Check and time the GPU kernels against ``torch.optim.AdamW(fused=True)``, on a machine that has a GPU.

    python benchmarks/gpu_step.py [--models 135M 1B] [--repeat 20] [--out FILE.json]

First it checks that masks are the CPU's bit for bit, that values are the CPU's within 2 units in the
last place, that top cuts where it should, and that a captured CUDA graph steps on. Then it measures the
bandwidth of a copy, and of each configuration the GPU's time for a step as a ratio to AdamW's, the
share of the copy's bandwidth, and what the host needs to prepare a step. It needs torch, triton and
this repository, nothing installed; a few minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from trimtab.ops.combine import Operator
from trimtab.ops.formats import hold_dense, hold_int8, hold_sparse
from trimtab.ops.kernels.job import Job, Settings
from trimtab.ops.kernels.torch_engine import TorchEngine, master_dtype
from trimtab.ops.layout import Layout
from trimtab.ops.masks import DELTA, UPDATE, MaskKey, Place, bernoulli_mask
from trimtab.ops.rounding import join_master, split_master
from trimtab.ops.sparsify import top_count, top_cut

DARE, TIES = Operator("bernoulli", "none", "linear"), Operator("top", "none", "sign")
TENSORS = ("param", "residual", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad", "anchor", "update")
SHARES = {"bernoulli": (0.5, 0.01), "top": (0.5, 0.01)}


# -- models


def llama(vocabulary: int, width: int, inner: int, keys: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocabulary, width), "norm": (width,)}
    for i in range(layers):
        shapes |= {f"{i}.{n}": (m, width) for n, m in (("q", width), ("k", keys), ("v", keys), ("o", width))}
        shapes |= {f"{i}.gate": (inner, width), f"{i}.up": (inner, width), f"{i}.down": (width, inner)}
        shapes |= {f"{i}.first": (width,), f"{i}.second": (width,)}
    return shapes


MODELS = {
    "135M": llama(49152, 576, 1536, 192, 30),
    "1B": llama(128256, 2048, 8192, 512, 16),
}


def make_job(
    name: str,
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype = torch.float32,
    stored: str = "nearest",
    moment: torch.dtype = torch.float32,
    layout: Layout | None = None,
    anchored: bool = False,
    **settings: Any,
) -> Job:
    layout = layout or Layout.whole(shape)
    size = layout.local
    master = (torch.randn(size, device=device) * 0.02).to(master_dtype(dtype, stored))  # type: ignore[arg-type]
    weight, rest = split_master(master, dtype) if stored == "residual" else (master.to(dtype), None)
    defaults = {"merge": True, "weights": (0.999, 0.001), "rate": 0.5, "step": 10, "lr": 1e-5}
    return Job(
        name,
        11,
        layout,
        weight,
        stored,  # type: ignore[arg-type]
        rest,
        (torch.randn(size, device=device) * 1e-3).to(moment),
        (torch.rand(size, device=device) * 1e-5).to(moment),
        settings=Settings(**(defaults | settings)),
        grad=(torch.randn(size, device=device) * 1e-2).to(dtype),
        anchor=master + torch.randn(size, device=device).to(master) * 1e-4 if anchored else None,
        tau=hold_dense(torch.randn(size, device=device) * 1e-3),
        count=top_count(layout.total, settings.get("rate", 0.5)),
    )


def on_cpu(job: Job) -> Job:
    twin = copy.copy(job)
    for name in TENSORS:
        tensor = getattr(job, name)
        setattr(twin, name, None if tensor is None else tensor.detach().to("cpu", copy=True))
    twin.tau, twin.cache = job.tau.to("cpu"), None  # type: ignore[union-attr]
    return twin


# -- checks


def check_masks(engine: Any, device: str) -> int:
    """Both masks of shards of every kind, read off a step with θ = 0, Δ = 1, τ = 1. Returns their number."""
    checked = 0
    for layout in (
        Layout.whole((1021, 1013)),
        Layout((3000, 400), (1300, 0), (700, 400)),
        Layout((3000, 400), (0, 130), (3000, 40)),
        Layout((60, 70, 80), (10, 20, 30), (40, 30, 50)),
        Layout((1 << 34,), ((1 << 32) - 5000,), (10_000,)),
        Layout((700, 1 << 31), (0, 50), (700, 60)),
    ):
        for rate, step, seed in ((0.5, 1, 0), (0.01, 977, 3), (1 / 3, 2**40 + 1, 2**64 - 1)):
            job = make_job(
                "mask", layout.shape, device, layout=layout, rate=rate, step=step, weights=(1.0, 2.0)
            )
            job.seed = seed
            job.param.zero_()
            job.update = torch.ones(layout.numel, device=device)
            job.tau = hold_dense(torch.ones(layout.numel, device=device))
            engine.step([job], DARE)
            keys = [MaskKey(seed, stream, step, "mask") for stream in (UPDATE, DELTA)]
            drawn = [bernoulli_mask(layout.local, rate, key, place=Place(layout)) for key in keys]
            if not torch.equal(job.param.cpu(), drawn[0] * 1.0 + drawn[1] * 2.0):
                raise SystemExit(
                    f"masks differ from the CPU's: {layout}, p = {rate}, step {step}, seed {seed}"
                )
            checked += 2 * layout.numel
    return checked


def units_apart(a: Tensor, b: Tensor, before: Tensor) -> float:
    """The largest difference in fp32 units in the last place of the larger of the entry and what it was."""
    if a.dtype in (torch.bfloat16, torch.float16):  # in its own units
        return float((a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max())
    a, b, before = a.double(), b.double(), before.double()
    scale = torch.maximum(b.abs(), before.abs()).float().clamp_min(1e-30)
    unit = torch.nextafter(scale, torch.full_like(scale, torch.inf)).double() - scale.double()
    return float(((a - b).abs() / unit).max())


def check_values(engine: Any, device: str) -> dict[str, float]:
    """The largest difference to the CPU of whole steps, by configuration; more than 2 units are refused."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    jobs = {
        "fp32": make_job("a", (301, 1000), device),
        "fp32, p = 0.01, decay": make_job("b", (300, 1000), device, rate=0.01, decay=0.999),
        "fp32, first step": make_job("c", (300, 1000), device, step=1, maximize=True),
        "fp32, plain": make_job("d", (300, 1000), device, merge=False),
        "fp32, anchored": make_job("e", (300, 1000), device, anchored=True, reopen=True),
        "fp32 with a residual": make_job("f", (300, 1000), device, fp32, "residual"),
        "bf16 with a residual": make_job("g", (300, 1000), device, bf16, "residual"),
        "bf16 stochastic, bf16 moments": make_job("h", (300, 1000), device, bf16, "stochastic", bf16),
        "fp16 with a residual": make_job("i", (300, 1000), device, fp16, "residual"),
    }
    found: dict[str, float] = {}
    for name, job in jobs.items():
        twin, before = on_cpu(job), on_cpu(job)
        engine.step([job], DARE)
        TorchEngine().step([twin], DARE)
        here = on_cpu(job)
        for field in ("param", "exp_avg", "exp_avg_sq", "anchor"):
            a, b, start = (getattr(one, field) for one in (here, twin, before))
            if a is None:
                continue
            if field == "param" and job.residual is not None:
                a, b, start = (join_master(one.param, one.residual) for one in (here, twin, before))
            found[name] = max(found.get(name, 0.0), units_apart(a, b, start))
        if found[name] > 2:
            raise SystemExit(f"{name}: {found[name]:.1f} units in the last place from the CPU")
    return found


def check_top(engine: Any, device: str) -> int:
    """Steps with top, given the Δ formed here, are the CPU's bit for bit. Returns their number."""
    ties = make_job("ties", (400, 1000), device)
    ties.grad = torch.randint(-3, 4, (400, 1000), device=device).float()
    zeros = make_job("zeros", (900, 1000), device)
    for tensor in (zeros.grad, zeros.exp_avg, zeros.exp_avg_sq):
        tensor[:800] = 0  # type: ignore[index]
    first = make_job("first", (3_000_000,), device, step=1)
    first.exp_avg.zero_(), first.exp_avg_sq.zero_(), first.grad.sign_()  # type: ignore[union-attr]
    jobs = [
        *(
            make_job(f"n{n}", (n,), device, rate=rate)
            for n in (7, 5000, 3_000_017)
            for rate in (0.5, 0.01, 1e-4)
        ),
        make_job("bf16", (3000, 100), device, torch.bfloat16, "residual", torch.bfloat16, rate=0.1),
        ties,
        zeros,
        first,
    ]
    twins = [copy.copy(job) for job in jobs]
    for twin in twins:
        for name in TENSORS:
            tensor = getattr(twin, name)
            setattr(twin, name, None if tensor is None else tensor.clone())
    engine.step(jobs, TIES)
    engine.update(twins)
    for job, twin in zip(jobs, twins, strict=True):
        there = on_cpu(twin)
        there.cuts = top_cut(there.update, there.count), None  # type: ignore[arg-type]
        TorchEngine().step([there], TIES)
        here = on_cpu(job)
        if not torch.equal(here.param, there.param) or not torch.equal(here.exp_avg, there.exp_avg):
            raise SystemExit(f"top of {job.name}: {int((here.param != there.param).sum())} entries differ")
    return len(jobs)


@dataclass(slots=True, eq=False)
class ClockedJob(Job):
    device_step: Tensor | None = None
    device_lr: Tensor | None = None


def check_graph(engine: Any, device: str) -> int:
    """A captured step, replayed with the step count on the device, is the CPU's. Returns steps replayed."""
    plain = make_job("graph", (300, 1000), device, step=1, rate=0.3)
    fields = {name: getattr(plain, name) for name in Job.__slots__}
    job = ClockedJob(**fields)
    job.device_step, job.device_lr = torch.zeros(1, device=device), torch.full((1,), 1e-5, device=device)
    twin = on_cpu(plain)

    def once() -> None:
        job.device_step.add_(1)  # type: ignore[union-attr]
        engine.step([job], DARE)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        once()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    rate = float(job.device_lr)
    before = on_cpu(plain)
    for step in (1, 2, 3, 4):
        twin.settings = replace(twin.settings, step=step, lr=rate)
        TorchEngine().step([twin], DARE)
    if units_apart(on_cpu(plain).param, twin.param, before.param) > 8:  # 2 for each of 4 steps
        raise SystemExit("a replayed graph does not step on as the CPU does")
    return 3


# -- times


def gpu_milliseconds(once: Callable[[], None], repeat: int) -> tuple[float, float]:
    """(GPU time, host time) of a call in ms. The GPU is kept busy until the host has queued all calls, so
    that what is measured is the GPU's own time.
    """
    once()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(3):
        once()
    host = (time.perf_counter() - begin) / 3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first time round, pinned memory is set aside
        torch.cuda._sleep(int(2e9 * min(3 * host * repeat + 0.01, 2.0)))  # cycles, at up to 2 GHz
        start.record()
        for _ in range(repeat):
            once()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat, host * 1e3


def copy_bandwidth(repeat: int) -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    milliseconds = statistics.median(gpu_milliseconds(lambda: y.copy_(x), repeat)[0] for _ in range(3))
    return 2 * x.nbytes / milliseconds * 1e3


@dataclass
class Row:
    """A configuration: its operator, what its jobs are, and the bytes that each entry must move at least."""

    name: str
    operator: Operator
    least: float
    rate: float = 0.5
    merge: bool = True
    tau: str = "dense"
    dtype: torch.dtype = torch.float32
    stored: str = "nearest"
    moment: torch.dtype = torch.float32


def touched(rate: float) -> float:
    """Share of 32-byte sectors of fp32 in which something is kept."""
    return 1 - (1 - rate) ** 8


ROWS = [
    Row("plain step", DARE, 28, merge=False),
    Row("OnDARE, p = 0.5", DARE, 32),
    Row("OnDARE, p = 0.01", DARE, 28 + 4 * touched(0.01), rate=0.01),
    Row("OnDARE, p = 0.01, τ masked once, sparse", DARE, 28 + 1 / 8 + 0.04, rate=0.01, tau="sparse"),
    Row("OnDARE, p = 0.5, τ in bf16", DARE, 30, tau="bf16"),
    Row("OnDARE, p = 0.5, τ in int8", DARE, 29 + 4 / 128, tau="int8"),
    Row("OnTIES, p = 0.5", TIES, 40, tau="masked"),
    Row("OnTIES, p = 0.01, sparse τ", TIES, 36 + 1 / 8 + 0.04, rate=0.01, tau="sparse"),
    Row("OnDARE, p = 0.5, bf16 with residual", DARE, 30, dtype=torch.bfloat16, stored="residual"),
    Row(
        "OnDARE, p = 0.5, bf16 with residual, bf16 moments",
        DARE,
        22,
        dtype=torch.bfloat16,
        stored="residual",
        moment=torch.bfloat16,
    ),
]


def held(row: Row, job: Job) -> Any:
    values = job.tau.dense(0, job.layout.numel)  # type: ignore[union-attr]
    if row.tau == "bf16":
        return hold_dense(values, torch.bfloat16)
    if row.tau == "int8":
        return hold_int8(values, job.layout)
    if row.tau in ("masked", "sparse"):
        if row.operator.sparsify == "top":
            threshold = values.abs().kthvalue(values.numel() - job.count + 1).values
            kept = torch.where(values.abs() >= threshold, values, 0.0)
        else:
            kept = torch.where(torch.rand_like(values) < row.rate, values, 0.0)
        return hold_sparse(kept) if row.tau == "sparse" else hold_dense(kept, masked=True)
    return job.tau


def jobs_of(row: Row, shapes: dict[str, tuple[int, ...]]) -> list[Job]:
    jobs = []
    for name, shape in shapes.items():
        job = make_job(name, shape, "cuda", row.dtype, row.stored, row.moment, rate=row.rate, merge=row.merge)
        job.tau = held(row, job)
        jobs.append(job)
    return jobs


def stepper(engine: Any, jobs: Sequence[Job], operator: Operator) -> Callable[[], None]:
    settings = jobs[0].settings
    steps = iter(range(10, 1 << 30))

    def once() -> None:
        now = replace(settings, step=next(steps))
        for job in jobs:
            job.settings = now
        engine.step(jobs, operator)

    return once


def fused_adamw(shapes: dict[str, tuple[int, ...]]) -> Callable[[], None]:
    parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes.values()]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-2
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True).step


def time_model(name: str, bandwidth: float, repeat: int) -> dict[str, Any]:
    from trimtab.ops.kernels.triton_engine import TritonEngine

    shapes = MODELS[name]
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    baseline = fused_adamw(shapes)
    print(f"\n{name}: {count:,} parameters in {len(shapes)} tensors; the baseline is AdamW(fused=True), fp32")
    print(f"{'':50s} {'GPU ms':>8s} {'ratio':>6s} {'(spread)':>14s} {'of copy':>8s} {'host ms':>8s}")
    found: dict[str, Any] = {"parameters": count, "tensors": len(shapes), "rows": {}}
    for row in ROWS:
        jobs = jobs_of(row, shapes)
        once = stepper(TritonEngine(), jobs, row.operator)
        pairs = [(gpu_milliseconds(once, repeat), gpu_milliseconds(baseline, repeat)) for _ in range(3)]
        ratios = [ours[0] / theirs[0] for ours, theirs in pairs]
        gpu, host = (statistics.median(ours[i] for ours, _ in pairs) for i in (0, 1))
        share = count * row.least / (gpu * 1e-3) / bandwidth
        result = {
            "gpu_ms": round(gpu, 4),
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
            "least_bytes_per_entry": round(row.least, 3),
            "share_of_copy_bandwidth": round(share, 3),
            "host_ms": round(host, 3),
            "adamw_ms": round(statistics.median(theirs[0] for _, theirs in pairs), 4),
        }
        found["rows"][row.name] = result
        spread = f"({result['lowest']} to {result['highest']})"
        print(
            f"{row.name:50s} {gpu:8.3f} {result['ratio']:6.2f} {spread:>14s} {share:8.0%} {host:8.2f}",
            flush=True,
        )
        del jobs, once
        torch.cuda.empty_cache()
    return found


def time_shapes(repeat: int) -> dict[str, float]:
    """GPU ms of OnDARE, p = 0.5, on the 135M model, for ways to cut the work: where defaults come from."""
    from trimtab.ops.kernels.triton_engine import TritonEngine
    from trimtab.ops.kernels.triton_search import Shape

    jobs = jobs_of(ROWS[1], MODELS["135M"])
    found = {}
    for block, warps in ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16)):
        for job in jobs:
            job.cache = None
        once = stepper(TritonEngine(Shape(block=block, warps=warps)), jobs, DARE)
        found[f"{block} entries, {warps} warps"] = round(gpu_milliseconds(once, repeat)[0], 4)
    print("\nOnDARE, p = 0.5, 135M, GPU ms by program: " + "; ".join(f"{k}: {v}" for k, v in found.items()))
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=20, help="steps between two readings of the clock")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_step.json"))
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        print(
            "gpu_step.py needs a CUDA GPU, and torch finds none here; run it on a machine that has one",
            file=sys.stderr,
        )
        return 2
    from trimtab.ops.kernels.triton_engine import TritonEngine

    torch.manual_seed(0)
    engine, device = TritonEngine(), torch.cuda.get_device_properties(0)
    print(f"{device.name}, torch {torch.__version__}")
    print(f"masks: {check_masks(engine, 'cuda'):,} entries are the CPU's, bit for bit")
    values = check_values(engine, "cuda")
    print("values, largest distance to the CPU in units in the last place: " + str(values))
    print(f"top: {check_top(engine, 'cuda')} tensors are cut as on the CPU")
    print(f"graph: {check_graph(engine, 'cuda')} replayed steps are the CPU's", flush=True)
    bandwidth = copy_bandwidth(arguments.repeat)
    print(f"a copy moves {bandwidth / 1e12:.2f} TB/s")
    result: dict[str, Any] = {
        "gpu": device.name,
        "torch": torch.__version__,
        "copy_bytes_per_second": round(bandwidth),
        "largest_distance_to_the_cpu_in_ulp": values,
        "shapes_135M_gpu_ms": time_shapes(arguments.repeat),
        "models": {},
    }
    for name in arguments.models:
        count = sum(torch.Size(shape).numel() for shape in MODELS[name].values())
        free = torch.cuda.mem_get_info()[0]
        if free < 50 * count:
            print(
                f"\n{name}: left out, it needs {50 * count / 1e9:.0f} GB of the GPU's memory, "
                f"and {free / 1e9:.0f} are free"
            )
            continue
        result["models"][name] = time_model(name, bandwidth, arguments.repeat)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
