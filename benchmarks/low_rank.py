"""What GaLore's, Adafactor's and 8-bit states take beside AdamW's, and what decompositions cost.

    python benchmarks/low_rank.py [--layers 30] [--steps 5] [--out benchmarks/results/low_rank.json]

Parameters have the shapes of SmolLM2-135M (30 layers of width 576, 49,152 tokens, tied head), gradients are
random with a decaying spectrum. Bytes are those of the tensors in each optimizer's state after its steps.
Step times are CPU seconds of one thread: medians over steps after the first, in which no projector is
renewed. The SVD's share is what the optimizer of a training with T = 200 spends on it: for each matrix one
decomposition in T steps, whose time is measured, against T of the other steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.ops import moments
from trimtab.optim import GaLoreAdamW
from trimtab.optim.galore import is_projected
from trimtab.optim.subspace import leading_vectors

WIDTH, INNER, KEYS, TOKENS = 576, 1536, 192, 49_152
GAP = 200
Named = list[tuple[str, nn.Parameter]]


def parameters(layers: int) -> Named:
    """A 135M Llama's parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    named = [("model.embed_tokens.weight", (TOKENS, WIDTH)), ("model.norm.weight", (WIDTH,))]
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (KEYS, WIDTH),
            "self_attn.v_proj": (KEYS, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        named += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    made = []
    for name, shape in named:
        p = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        p.grad = gradient(p, generator)
        made.append((name, p))
    return made


def gradient(p: Tensor, generator: torch.Generator) -> Tensor:
    """Random entries; columns of a matrix shrink as 1/i, so that its spectrum decays."""
    values = torch.randn(p.shape, generator=generator)
    return values / torch.arange(1, p.shape[-1] + 1) if p.dim() == 2 else values


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(moments.nbytes(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def optimizers(named: Named) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "AdamW": lambda: torch.optim.AdamW(named, lr=1e-6, weight_decay=0.0),
        "Adafactor": lambda: torch.optim.Adafactor(named, lr=1e-6),
        "GaLore r=128": lambda: GaLoreAdamW(named, lr=1e-6, rank=128, update_proj_gap=GAP),
        "GaLore r=32": lambda: GaLoreAdamW(named, lr=1e-6, rank=32, update_proj_gap=GAP),
    }
    try:
        moments.torchao_state()
    except ValueError as error:
        print(f"AdamW 8-bit is left out: {error}")
    else:
        from torchao.optim import AdamW8bit

        kinds["AdamW 8-bit"] = lambda: AdamW8bit(named, lr=1e-6, weight_decay=0.0)
    return kinds


def measured(make: Callable[[], torch.optim.Optimizer], steps: int) -> dict[str, float]:
    optimizer = make()
    first = timed(optimizer.step)
    if isinstance(optimizer, GaLoreAdamW):  # a step between two renewals of every projector
        for group in optimizer.param_groups:
            group["update_proj_gap"] = 1 << 30
        for state in optimizer.state.values():
            state.update({"projector_offset": 0} if "projector_offset" in state else {})
    rest = [timed(optimizer.step) for _ in range(steps)]
    return {"bytes": state_bytes(optimizer), "first": first, "step": statistics.median(rest)}


def decomposition_seconds(named: Named, rank: int) -> float:
    """CPU seconds of one decomposition of every matrix that is projected; each shape is timed once."""
    total, known = 0.0, dict[torch.Size, float]()
    for name, p in named:
        if is_projected(name, p.shape):
            assert p.grad is not None
            if p.shape not in known:
                known[p.shape] = min(timed(partial(leading_vectors, p.grad, rank)) for _ in range(3))
            total += known[p.shape]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = parameters(options.layers)
    count = sum(p.numel() for _, p in named)
    found = {name: measured(make, options.steps) for name, make in optimizers(named).items()}
    seconds = decomposition_seconds(named, 128)
    plain = found["AdamW"]
    print(f"{count:,} parameters, torch {torch.__version__}, one thread of {platform.processor() or 'a CPU'}")
    print("| optimizer | state, MB | bytes per parameter | to AdamW's | step to AdamW's | SVD's share |")
    print("|---|---|---|---|---|---|")
    for name, one in found.items():
        share = seconds / (seconds + GAP * one["step"]) if "GaLore" in name else None
        one["svd_share"] = share if share is not None else 0.0
        print(
            f"| {name} | {one['bytes'] / 1e6:.1f} | {one['bytes'] / count:.2f} "
            f"| {one['bytes'] / plain['bytes']:.1%} | {one['step'] / plain['step']:.2f} "
            f"| {'–' if share is None else f'{share:.1%}'} |"
        )
    print(f"one decomposition of all matrices: {seconds:.1f} CPU seconds, {seconds / GAP:.3f} a step")
    if options.out is not None:
        result = {"parameters": count, "gap": GAP, "decompositions": seconds, "optimizers": found}
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
