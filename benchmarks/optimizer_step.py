"""Time one optimizer step as a ratio to ``torch.optim.AdamW(fused=True)``, paired in one process.

    python benchmarks/optimizer_step.py [--layers 30] [--repeat 5] [--out FILE.json]

Parameters have the shapes of a 135M Llama (30 layers) or of fewer layers of it; one thread, CPU time, the
median of the ratios of neighbouring steps. Wall times are not reported: machines are shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from trimtab import OnDARE, OnlineMerging, OnTIES


class SyntheticDelta:
    """τ of random normal entries, as large as an SFT delta: building a real one is not what is timed."""

    fingerprint = "synthetic"

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._tau = {name: torch.randn_like(p) * 1e-3 for name, p in parameters.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tau

    def check_policy(self, parameters: list[tuple[str, torch.Tensor]]) -> None:
        pass  # the policy is random: there is no reference to compare it with

    def shape(self, name: str) -> torch.Size:
        return self._tau[name].shape

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._tau[name] if dtype is None else self._tau[name].to(dtype)


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


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.nn.Parameter]:
    made = {name: torch.nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes.items()}
    for p in made.values():
        p.grad = torch.randn_like(p) * 1e-3
    return made


def contenders(delta: SyntheticDelta, shapes: dict[str, tuple[int, ...]]):
    def online(cls, **settings):
        return lambda ps: cls(ps.items(), delta, lr=1e-6, policy_differs=True, measure_every=0, **settings)

    def around(ps):
        inner = torch.optim.AdamW(ps.items(), lr=1e-6, weight_decay=0.0, fused=True)
        return OnlineMerging(inner, delta, reserve_rate=0.5, policy_differs=True, measure_every=0)

    return {
        "AdamW, foreach": lambda ps: torch.optim.AdamW(ps.items(), lr=1e-6, weight_decay=0.0, foreach=True),
        "OnDARE p=0.5, redrawn": online(OnDARE, reserve_rate=0.5),
        "OnDARE p=0.01, redrawn": online(OnDARE, reserve_rate=0.01),
        "OnDARE p=0.5, τ masked once": online(OnDARE, reserve_rate=0.5, redraw=False),
        "OnTIES p=0.5": online(OnTIES, reserve_rate=0.5),
        "OnTIES p=0.01": online(OnTIES, reserve_rate=0.01),
        "OnDARE K=5 between merges": online(OnDARE, reserve_rate=0.5, merge_every=1_000_000),
        "OnlineMerging around fused AdamW, p=0.5": around,
    }


def cpu_seconds(optimizer) -> float:
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def ratio_to_fused(make, shapes, repeat: int) -> dict[str, float]:
    ours, fused = parameters(shapes), parameters(shapes)
    candidate, baseline = make(ours), torch.optim.AdamW(fused.items(), lr=1e-6, weight_decay=0.0, fused=True)
    cpu_seconds(candidate), cpu_seconds(baseline)  # first steps make state
    pairs = [(cpu_seconds(candidate), cpu_seconds(baseline)) for _ in range(repeat)]
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "seconds": round(statistics.median(a for a, _ in pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="30 is the 135M model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/optimizer_step.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = llama_shapes(arguments.layers)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    delta = SyntheticDelta(parameters(shapes))
    print(f"{count:,} parameters in {len(shapes)} tensors, fp32, one thread; CPU time / AdamW(fused=True)'s")
    rows = {}
    for name, make in contenders(delta, shapes).items():
        rows[name] = ratio_to_fused(make, shapes, arguments.repeat)
        row = rows[name]
        print(f"{name:42s} {row['ratio']:6.2f}  ({row['lowest']} to {row['highest']})", flush=True)
    result = {
        "parameters": count,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
