"""Time RRHF's forward and backward pass: each prompt read once, against once for every response.

    python benchmarks/rrhf.py [--layers 30] [--prompt 256] [--responses 6] [--length 64] [--prompts 1]
        [--threads 1,2] [--repeat 3] [--device cpu] [--out FILE.json]

A Llama of the 135M shape (30 layers of width 576, vocabulary 49,152, tied) with random weights, fp32. Both
sides run the same code but for the layout: the output embedding is applied to response tokens only, in
chunks. They take turns in one process; the ratio is the median over neighbouring pairs, with the lowest and
the highest, and beside it that of the fastest steps, which a busy machine disturbs least. Before the clock
starts, both must have given the same log-probabilities and the same gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.losses import rrhf_loss, rrhf_terms
from trimtab.rewards.ranked_batches import Batch, RRHFCollator, plain_head, response_log_probabilities

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LAYOUTS = ("repeated", "shared_prefix")


def batches(options: argparse.Namespace) -> dict[str, Batch]:
    """The same random prompts and responses in both layouts."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(SHAPE["vocab_size"], (count,), generator=draw).tolist()

    rows = [
        {
            "prompt_ids": ids(options.prompt),
            "response_ids": [ids(options.length) for _ in range(options.responses)],
            "scores": [float(score) for score in range(options.responses)],
        }
        for _ in range(options.prompts)
    ]
    made = {layout: RRHFCollator(0, layout)(rows) for layout in LAYOUTS}  # type: ignore[arg-type]
    return {
        layout: {name: value.to(options.device) for name, value in batch.items()}
        for layout, batch in made.items()
    }


def step(model: Any, head: Any, batch: Batch) -> torch.Tensor:
    """Forward and backward; returns the log-probabilities."""
    model.zero_grad()
    logps = response_log_probabilities(model, batch, head=head)
    prompts = batch["group_sizes"].shape[0]
    rrhf_loss(
        rrhf_terms(logps, batch["lengths"], batch["ranks"], batch["groups"], prompts=prompts)
    ).backward()
    return logps.detach()


def differences(model: Any, head: Any, data: dict[str, Batch]) -> dict[str, float]:
    """How far the layouts are apart: per token, and in gradients relative to the largest."""
    found = {}
    for layout in LAYOUTS:
        logps = step(model, head, data[layout])
        found[layout] = (logps, {name: p.grad.clone() for name, p in model.named_parameters()})
    (one, slopes), (two, others) = (found[layout] for layout in LAYOUTS)
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    apart = max(float((slopes[name] - others[name]).abs().max()) for name in slopes)
    lengths = data["repeated"]["lengths"]
    return {"per_token": float(((one - two) / lengths).abs().max()), "gradient": apart / largest}


def clock(run: Callable[[], Any], device: str) -> float:
    """Wall seconds of one run."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(model: Any, head: Any, data: dict[str, Batch], options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the layouts; which one goes first alternates too."""
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for turn in range(options.repeat):
        for layout in LAYOUTS if turn % 2 else LAYOUTS[::-1]:
            batch = data[layout]
            seconds[layout].append(clock(lambda batch=batch: step(model, head, batch), options.device))
    ratios = [slow / fast for slow, fast in zip(*(seconds[layout] for layout in LAYOUTS), strict=True)]
    return {
        **{layout: statistics.median(values) for layout, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "fastest": min(seconds["repeated"]) / min(seconds["shared_prefix"]),
        "seconds": seconds,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"layers": 30, "prompt": 256, "responses": 6, "length": 64, "prompts": 1, "repeat": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, each measured")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=options.layers)).float()
    model = model.to(options.device).train()
    head, data = plain_head(model), batches(options)
    assert head is not None
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "tokens": {layout: data[layout]["input_ids"].numel() for layout in LAYOUTS},
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "torch": torch.__version__,
        "apart": differences(model, head, data),
    }
    assert result["apart"]["per_token"] < 1e-4, result["apart"]
    assert result["apart"]["gradient"] < 1e-3, result["apart"]
    result["threads"] = {}
    print(f"{result['parameters']:,} parameters, tokens {result['tokens']}, apart {result['apart']}")
    for count in [int(text) for text in options.threads.split(",")]:
        torch.set_num_threads(count)
        found = result["threads"][count] = measure(model, head, data, options)
        print(
            f"{count} thread(s): repeated {found['repeated']:.2f} s, shared prefix "
            f"{found['shared_prefix']:.2f} s, {found['ratio']:.2f} times as fast "
            f"(lowest {found['lowest']:.2f}, highest {found['highest']:.2f} of {options.repeat}; "
            f"fastest steps {found['fastest']:.2f})",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
