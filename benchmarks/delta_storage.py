"""What each way of holding τ and Adam's moments costs in precision and in memory.

    python benchmarks/delta_storage.py [--layers 10] [--pair NAME REFERENCE BASE]... [--only precision|memory]

Precision: the embedded lab models' τ (three seeds), and that of further pairs of model folders, held by
``HeldDelta`` and compared with fp32. Memory: bytes per parameter of real parameters, gradients, optimizer
states and held deltas, and the most that two steps took beside them (the larger of what torch allocated and
how far the process grew, which sees a compiled kernel's buffers too); beside ``torch.optim.AdamW`` and an
optimizer that holds what the authors' code holds. Parameters have the shapes of a third of a 135M Llama
(--layers 30 is all of it). Times are CPU time of one thread, as medians of ratios to a neighbouring step of
``AdamW(fused=True)``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab import OnDARE, OnTIES, ReferenceDelta
from trimtab.delta.held import HeldDelta
from trimtab.lab import checkpoints
from trimtab.ops import MaskKey, bernoulli_mask, moments, top_count, top_mask
from trimtab.ops.layout import Layout

ALPHAS = (1e-7, 5e-7)
RATES = (0.01, 0.5)
FP32 = torch.float32
PROCESS = Path("/proc/self")
MMAP_THRESHOLD = -3  # of mallopt


# -- precision


@dataclass
class Errors:
    """Sums over a model's entries, of which the measures are made."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    most: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, tau: Tensor, held: Tensor, weights: Tensor) -> None:
        exact, error = tau.double(), held.double() - tau.double()
        self.sums["n"] += tau.numel()
        self.sums["error²"] += float(error.square().sum())
        self.sums["τ²"] += float(exact.square().sum())
        self.sums["held²"] += float(held.double().square().sum())
        self.sums["τ·held"] += float((exact * held.double()).sum())
        moved = tau != 0
        self.sums["moved"] += int(moved.sum())
        self.sums["became 0"] += int((moved & (held == 0)).sum())
        self._max("relative", (error / exact)[moved].abs())
        self._max("of the largest", error.abs() / exact.abs().max().clamp_min(1e-300))
        ulp = ulps(weights)
        for alpha in ALPHAS:
            self.sums[f"half {alpha}"] += int((alpha * error.abs() >= ulp / 2).sum())
            self.sums[f"differ {alpha}"] += int((weights + tau * alpha != weights + held * alpha).sum())

    def result(self) -> dict[str, Any]:
        s, n = self.sums, self.sums["n"]
        return {
            "relative_l2": (s["error²"] / s["τ²"]) ** 0.5,
            "cosine": s["τ·held"] / (s["τ²"] * s["held²"]) ** 0.5,
            "largest_relative": self.most["relative"],
            "largest_of_tensors_largest": self.most["of the largest"],
            "share_that_became_0": s["became 0"] / s["moved"],
            "one_addition": {
                str(alpha): {
                    "share_of_errors_above_half_an_ulp_of_the_weight": s[f"half {alpha}"] / n,
                    "share_of_weights_that_differ": s[f"differ {alpha}"] / n,
                }
                for alpha in ALPHAS
            },
        }

    def _max(self, name: str, values: Tensor) -> None:
        if values.numel():
            self.most[name] = max(self.most[name], float(values.max()))


def ulps(weights: Tensor) -> Tensor:
    """The distance from each fp32 weight to the next larger magnitude."""
    size = weights.abs()
    return (torch.nextafter(size, torch.tensor(torch.inf)) - size).double()


def precision(delta: ReferenceDelta, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Errors of each storage: of τ, of F(τ̂) where masks are redrawn, of F(τ) trimmed before it is held."""
    storages = ("float32", "bfloat16", "int8")
    errors, after = {s: Errors() for s in storages}, {s: defaultdict[Any, float](float) for s in storages}
    sparse_differs = 0
    for name in delta.names():
        tau = delta.tensor(name, FP32).reshape(-1)
        top = {p: top_mask(tau, top_count(tau.numel(), p)) for p in RATES}
        drawn = {p: bernoulli_mask(tau.shape, p, MaskKey(0, 1, 1, name)) for p in RATES}
        for storage in storages:
            dense = as_held(tau, storage)
            errors[storage].add(tau, dense, weights[name].detach().reshape(-1))
            for p in RATES:
                after[storage]["redrawn", p] += squares(dense - tau, drawn[p])
                after[storage]["of redrawn", p] += squares(tau, drawn[p])
                after[storage]["top", p] += squares(as_held(tau, storage, top[p]) - tau, top[p])
                after[storage]["of top", p] += squares(tau, top[p])
        for p in RATES:
            one, other = (as_held(tau, s, top[p]).view(torch.int32) for s in ("sparse", "float32"))
            sparse_differs += int((one != other).sum())
    rows = {s: errors[s].result() | {"relative_l2_after_F": relative(after[s])} for s in storages}
    return rows | {"sparse": {"entries_that_differ_from_fp32": sparse_differs}}


def squares(x: Tensor, kept: Tensor) -> float:
    return float(x[kept].double().square().sum())


def relative(sums: dict[Any, float]) -> dict[str, float]:
    kinds = ("redrawn", "top")
    return {f"{k} p={p}": (sums[k, p] / sums[f"of {k}", p]) ** 0.5 for k in kinds for p in RATES}


@dataclass(frozen=True)
class OneTensor:
    """A delta of one parameter."""

    values: Tensor

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.to(dtype or self.values.dtype)

    def slice(self, name: str, slices: tuple[slice, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor(name, dtype)[slices]


def as_held(tau: Tensor, storage: str, kept: Tensor | None = None) -> Tensor:
    """τ as an optimizer holds it, or F(τ) where a mask is given, in fp32 again."""
    held = HeldDelta(OneTensor(tau), storage)
    mask = None if kept is None else lambda x: torch.where(kept, x, 0.0)
    return held.get("", Layout.whole(tau.shape), device="cpu", dtype=FP32, mask=mask).dense(0, tau.numel())


def lab_pairs() -> Iterator[tuple[str, Path, Path]]:
    for seed in checkpoints.SEEDS:
        yield (
            f"lab, seed {seed}",
            checkpoints.model_folder(seed, "sft"),
            checkpoints.model_folder(seed, "base"),
        )


def reference_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
    found = dict(model.named_parameters())
    return {name: found[name] for name in names}


# -- memory


class Transient(TorchDispatchMode):
    """The most bytes of tensors that were made, and alive at once, within the block."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen = {t.untyped_storage().data_ptr() for t in known}
        self._alive = 0
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and not moments.is_8bit(leaf):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._seen or size == 0:
            return
        self._seen.add(at)
        self._alive += size
        self.most = max(self.most, self._alive)
        weakref.finalize(storage, self._gone, at, size)

    def _gone(self, at: int, size: int) -> None:
        self._seen.discard(at)
        self._alive -= size


class Grown:
    """How far the process's resident memory rose above where it was, within the block; 0 beside Linux."""

    most = 0

    def __enter__(self) -> Grown:
        if PROCESS.is_dir():
            (PROCESS / "clear_refs").write_text("5")  # the high-water mark begins anew
            self._before = kilobytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if PROCESS.is_dir():
            self.most = max(0, kilobytes("VmHWM") - self._before) * 1024


def kilobytes(key: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def return_freed_memory(above: int) -> None:
    """Let the C library give back blocks above a size at once, so that what is freed is seen to be freed."""
    if PROCESS.is_dir():
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, above)


class AsTheAuthors(torch.optim.Optimizer):
    """Holds and allocates what the authors' OnDARE does: τ masked once, dense, in the state; temporaries.

    It stands for their memory and about their time; the arithmetic is theirs without its rescaling.
    """

    def __init__(self, params: Iterable[Tensor], tau: dict[Tensor, Tensor], rate: float = 0.5) -> None:
        super().__init__(params, {"lr": 1e-6})
        self.rate = rate
        for p, values in tau.items():
            keep = torch.empty_like(values).bernoulli_(rate)
            self.state[p] = {key: torch.zeros_like(p) for key in ("first", "second")}
            self.state[p]["tau"] = values * keep

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["first"].mul_(0.9).add_(p.grad, alpha=0.1)
            state["second"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            denominator = state["second"].sqrt().add_(1e-6)
            update = (state["first"] / denominator) * -1e-6
            update.abs().sum()
            torch.nn.functional.dropout(update, 1 - self.rate, training=True, inplace=True)
            update.abs().sum()
            p.add_(state["tau"], alpha=1e-7)
            p.add_(update, alpha=1 - 1e-7)


class RandomDelta:
    """τ of normal entries; its values are made when they are asked for, so that only what is held is held."""

    fingerprint = "random"

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def check_policy(self, parameters: Any) -> None:
        pass  # the policy is random: there is no reference to compare it with

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        seed = int.from_bytes(name.encode()[-4:], "little")
        values = torch.randn(self._shapes[name], generator=torch.Generator().manual_seed(seed))
        return values.mul_(1e-3).to(dtype or FP32)


def shapes(layers: int, vocabulary: int = 49152, width: int = 576, inner: int = 1536) -> dict[str, Any]:
    """Those of a 135M Llama; of fewer layers with as much smaller a vocabulary."""
    made: dict[str, Any] = {"embed.weight": (vocabulary * layers // 30, width), "norm.weight": (width,)}
    for i in range(layers):
        made |= {
            f"{i}.{n}.weight": (m, width) for n, m in (("q", width), ("k", 192), ("v", 192), ("o", width))
        }
        made |= {f"{i}.gate.weight": (inner, width), f"{i}.up.weight": (inner, width)}
        made |= {
            f"{i}.down.weight": (width, inner),
            f"{i}.first.weight": (width,),
            f"{i}.last.weight": (width,),
        }
    return made


def parameters(layers: int, dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes(layers).items():
        p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(dtype)
        made[name] = p
    return made


Make = Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]


def bytes_per_parameter(make: Make, layers: int, dtype: torch.dtype = FP32) -> dict[str, float]:
    """Bytes per parameter of what lives between steps, and of the most that one step adds.

    Args:
        make: builds the optimizer from named parameters.
        layers: how much of the 135M model.
        dtype: the parameters' and the gradients' dtype.

    Returns:
        ``parameter``, ``gradient``, ``moments``, ``residual``, ``anchor``, ``delta``, ``other``, their sum
        ``resident``, ``transient``, and ``peak``, the sum of the two.
    """
    named = parameters(layers, dtype)
    optimizer = make(named)
    optimizer.step()
    optimizer.step()
    with Grown() as grown, Transient(everything(optimizer, named)) as transient:
        optimizer.step()
        optimizer.step()  # of two steps one merges also where merge_every is 2
    sizes: dict[str, float] = defaultdict(float)
    for p in named.values():
        sizes["parameter"] += p.nbytes
        sizes["gradient"] += p.grad.nbytes if p.grad is not None else 0
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                sizes[kind_of_state(key)] += moments.nbytes(value)
    merging = getattr(optimizer, "merging", None)
    sizes["delta"] += 0 if merging is None else merging.held_bytes()
    count = sum(p.numel() for p in named.values())
    kinds = ("parameter", "gradient", "moments", "residual", "anchor", "delta", "other")
    result = {kind: sizes[kind] / count for kind in kinds}
    result["resident"] = sum(result.values())
    result["transient"] = max(transient.most, grown.most) / count
    result["peak"] = result["resident"] + result["transient"]
    return result


def kind_of_state(key: str) -> str:
    kinds = {
        "exp_avg": "moments",
        "exp_avg_sq": "moments",
        "first": "moments",
        "second": "moments",
        "merge_residual": "residual",
        "merge_anchor": "anchor",
        "tau": "delta",
    }
    return kinds.get(key, "other")


def everything(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> Iterator[Tensor]:
    """All tensors that live between steps."""
    for p in named.values():
        yield p
        if p.grad is not None:
            yield p.grad
        for value in optimizer.state[p].values():
            if moments.is_8bit(value):
                yield from (value.codes, value.scale, value.qmap)
            elif isinstance(value, Tensor):
                yield value
    merging = getattr(optimizer, "merging", None)
    if merging is not None:
        yield from merging._held.tensors()


def online(cls: Any, **settings: Any) -> Make:
    def make(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        fixed = {"lr": 1e-6, "policy_differs": True, "measure_every": 0}
        return cls(named.items(), RandomDelta(named), **fixed | settings)

    return make


def adamw(**settings: Any) -> Make:
    return lambda named: torch.optim.AdamW(named.values(), lr=1e-6, weight_decay=0.0, **settings)


def as_the_authors(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    delta = RandomDelta(named)
    return AsTheAuthors(named.values(), {p: delta.tensor(name, p.dtype) for name, p in named.items()})


def contenders() -> dict[str, tuple[Make, torch.dtype]]:
    bf16 = torch.bfloat16
    rows: dict[str, tuple[Make, torch.dtype]] = {
        "AdamW, fused": (adamw(fused=True), FP32),
        "AdamW, foreach": (adamw(foreach=True), FP32),
        "as the authors' OnDARE": (as_the_authors, FP32),
    }
    for storage in ("float32", "bfloat16", "int8"):
        rows[f"OnDARE redrawn, τ {storage}"] = (online(OnDARE, delta_storage=storage), FP32)
    rows |= {
        "OnDARE masked once p=0.01, τ sparse": (online(OnDARE, redraw=False), FP32),
        "OnDARE masked once p=0.5, τ int8": (
            online(OnDARE, redraw=False, reserve_rate=0.5, delta_storage="int8"),
            FP32,
        ),
        "OnTIES p=0.01, τ sparse": (online(OnTIES), FP32),
        "OnTIES p=0.5, τ float32": (online(OnTIES, reserve_rate=0.5), FP32),
        "OnDARE K=2, redrawn, τ float32": (online(OnDARE, merge_every=2), FP32),
    }
    for state in ("bfloat16", "int8"):
        rows[f"OnDARE redrawn, τ int8, moments {state}"] = (
            online(OnDARE, delta_storage="int8", state_dtype=state),
            FP32,
        )
        rows[f"OnDARE masked once p=0.01, τ sparse, moments {state}"] = (
            online(OnDARE, redraw=False, state_dtype=state),
            FP32,
        )
    rows |= {
        "bf16 AdamW, fused (rounds to nearest)": (adamw(fused=True), bf16),
        "bf16 + residual, OnDARE redrawn, τ float32": (online(OnDARE), bf16),
        "bf16 + residual, OnDARE redrawn, τ bfloat16": (online(OnDARE, delta_storage="bfloat16"), bf16),
        "bf16 + residual, OnDARE masked once p=0.01, τ sparse": (online(OnDARE, redraw=False), bf16),
        "bf16 + residual, the same, moments int8": (online(OnDARE, redraw=False, state_dtype="int8"), bf16),
        "bf16 stochastic, the same, moments int8": (
            online(OnDARE, redraw=False, state_dtype="int8", rounding="stochastic"),
            bf16,
        ),
    }
    return rows


def engine_of(optimizer: torch.optim.Optimizer) -> str:
    """The engine that runs the largest parameter; torch's own optimizers have none."""
    slots = getattr(optimizer, "_slots", None)
    if not slots:
        return ""
    largest = max(slots.values(), key=lambda slot: slot.job.layout.numel)
    return "" if largest.engine is None else largest.engine.name


def step_ratio(make: Make, layers: int, dtype: torch.dtype, repeat: int) -> tuple[float, str]:
    """(median of CPU time / that of a neighbouring fused fp32 AdamW step, the engine that ran)."""
    optimizer, baseline = make(parameters(layers, dtype)), adamw(fused=True)(parameters(layers, FP32))
    ratios = []
    for _ in range(repeat + 2):
        change_gradients(optimizer)
        ratios.append(seconds(optimizer) / seconds(baseline))
    return statistics.median(ratios[2:]), engine_of(optimizer)  # first steps make state


def change_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Other numbers, as in training: equal ones in every step would make all of Adam's updates tie."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.copy_(p.grad.flatten().roll(1009).view_as(p.grad)).mul_(1.1)


def seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


# -- tables


def print_precision(rows: dict[str, Any]) -> None:
    for pair, storages in rows.items():
        for storage, row in storages.items():
            if storage == "sparse":
                print(f"{pair:24} sparse    {row['entries_that_differ_from_fp32']} entries of F(τ) differ")
                continue
            one = row["one_addition"][str(ALPHAS[-1])]
            print(
                f"{pair:24} {storage:9} {row['relative_l2']:10.2e} {1 - row['cosine']:10.1e} "
                f"{row['largest_relative']:10.1e} {row['share_that_became_0']:10.2%} "
                f"{row['relative_l2_after_F']['top p=0.01']:10.2e} "
                f"{one['share_of_errors_above_half_an_ulp_of_the_weight']:10.3%} "
                f"{one['share_of_weights_that_differ']:10.3%}"
            )


def print_header() -> None:
    header = ("rel. L2", "1 − cosine", "max rel.", "became 0", "top 1 %", "> ½ ulp", "differ")
    print(f"{'τ of':24} {'held in':9} " + " ".join(f"{title:>10}" for title in header))


def print_legend() -> None:
    print(
        f"> ½ ulp: entries whose error times α = {ALPHAS[-1]} is above half an ulp of their weight; differ:"
    )
    print("weights that differ after one addition of α·τ; top 1 %: relative L2 of F(τ), trimmed, then held")


def print_memory(rows: dict[str, Any]) -> None:
    columns = ("parameter", "gradient", "moments", "residual", "anchor", "delta", "transient", "peak")
    print(f"\nbytes per parameter{'':35}" + "".join(f"{c:>10}" for c in columns) + "  to AdamW   time")
    for name, row in rows.items():
        cells = "".join(f"{row[c]:10.3f}" for c in columns)
        print(f"{name:54}{cells}{row['peak_to_adamw']:9.1%} {row['time_to_adamw']:7.2f}  {row['engine']}")


def runnable() -> dict[str, tuple[Make, torch.dtype]]:
    """The contenders that this installation can run."""
    try:
        moments.check_state_dtype("int8")
    except ValueError as error:
        print(f"without 8-bit moments: {error}")
        return {name: row for name, row in contenders().items() if "moments int8" not in name}
    return contenders()


def memory_table(layers: int, repeat: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    made = runnable()
    return_freed_memory(above=1 << 16)
    for name, (make, dtype) in made.items():
        rows[name] = {k: round(v, 4) for k, v in bytes_per_parameter(make, layers, dtype).items()}
    return_freed_memory(above=1 << 25)  # what the C library would come to by itself
    for name, (make, dtype) in made.items():
        ratio, rows[name]["engine"] = step_ratio(make, layers, dtype, repeat)
        rows[name]["time_to_adamw"] = round(ratio, 2)
    plain = rows["AdamW, fused"]["peak"]
    for row in rows.values():
        row["peak_to_adamw"] = round(row["peak"] / plain, 4)
    return rows


def rounded(value: Any) -> Any:
    """Three significant digits, but all of those of a cosine near 1."""
    if isinstance(value, dict):
        return {key: v if key == "cosine" else rounded(v) for key, v in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", nargs=3, action="append", default=[], metavar=("NAME", "REFERENCE", "BASE"))
    parser.add_argument("--layers", type=int, default=10, help="of the memory table; 30 is the 135M model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=("precision", "memory"), help="default both")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/delta_storage.json"))
    arguments = parser.parse_args()
    pairs = [*lab_pairs(), *((name, Path(a), Path(b)) for name, a, b in arguments.pair)]
    with one_thread():
        if arguments.only in (None, "precision"):
            print_header()
            for name, reference, base in pairs:
                delta = ReferenceDelta.between(reference=reference, base=base, check_tokenizers=False)
                row = rounded(precision(delta, reference_weights(reference, delta.names())))
                print_precision({name: row})
                write(arguments.out, "precision", {name: row})
            print_legend()
        if arguments.only in (None, "memory"):
            memory = memory_table(arguments.layers, arguments.repeat)
            print_memory(memory)
            sizes = [torch.Size(shape).numel() for shape in shapes(arguments.layers).values()]
            write(arguments.out, "memory", memory | {"parameters": sum(sizes)})


def write(path: Path, section: str, rows: dict[str, Any]) -> None:
    """Put rows into a section of the results, beside what other runs have put there."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found[section] = found.get(section, {}) | rows
    found |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
