"""The trade of reward against tax on the lab's models, with one setting of each regulariser beside AdamW.

    python benchmarks/regularisers.py [--seeds 0,1,2] [--out FILE.json]

What the quickstart does for AdamW (DPO from each seed's SFT model, measured along the way, compared at equal
tax) with the regularisers of ``trimtab.optim``. No setting was tuned; the EMA's is the quickstart's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trimtab.lab.dpo import dpo_loss, logps_of_rows, tune
from trimtab.lab.measure import Score, measure
from trimtab.lab.methods import ADAMW, Plan, Start, build_optimizer, prepare
from trimtab.lab.pretrain import sft_batches
from trimtab.optim import (
    EMA,
    ChildTuning,
    ElasticReset,
    FisherChildTuning,
    GradientProjection,
    PullToReference,
    averaged_weights,
)
from trimtab.report.curves import Curve, Point, Spread, by_method, rewards_at_tax

PLAN = Plan()
TAXES = (1, 3, 6, 12)
Attach = Callable[[Any, torch.optim.Optimizer, Start, int], Any]


def pair_losses(model: Any, start: Start, count: int) -> Callable[[], Iterator[torch.Tensor]]:
    """DPO's loss of each of the first pairs."""

    def losses() -> Iterator[torch.Tensor]:
        for pair in range(count):
            rows = torch.tensor([2 * pair, 2 * pair + 1])
            logps = logps_of_rows(model, start.pairs, rows, 1)
            yield dpo_loss(logps, start.reference_logps[rows], PLAN.beta)

    return losses


def chat_losses(model: Any, seed: int) -> Callable[[], Iterator[torch.Tensor]]:
    """The SFT loss of 96 conversations, drawn as those that the SFT model was trained on."""
    ids, labels = next(sft_batches(seed))

    def losses() -> Iterator[torch.Tensor]:
        logits = model(input_ids=ids).logits[:, :-1]
        yield torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    return losses


SETTINGS: dict[str, Attach] = {
    "AdamW": lambda model, optimizer, start, seed: None,
    f"KL penalty (β = {3 * PLAN.beta:g})": lambda model, optimizer, start, seed: None,
    f"EMA (c = {PLAN.ema})": lambda model, optimizer, start, seed: EMA(optimizer, PLAN.ema),
    "ChildTuning-F (p = 0.3)": lambda model, optimizer, start, seed: ChildTuning(optimizer, 0.3, seed=seed),
    "ChildTuning-D (p = 0.3, 64 pairs)": lambda model, optimizer, start, seed: FisherChildTuning(
        optimizer, pair_losses(model, start, 64), 0.3
    ),
    "pull (η = 0.01)": lambda model, optimizer, start, seed: PullToReference(optimizer, 0.01),
    "Elastic Reset (c = 0.05, N = 30)": lambda model, optimizer, start, seed: ElasticReset(
        optimizer, 0.05, every=30
    ),
    "OGPSA (96 chats, every 5)": lambda model, optimizer, start, seed: GradientProjection(
        optimizer, [chat_losses(model, seed)], every=5
    ),
}


def train(method: str, seed: int) -> list[tuple[int, Score]]:
    """Train one method from a seed's SFT model; what was measured, by step."""
    start = prepare(seed)
    model = copy.deepcopy(start.sft)
    optimizer = build_optimizer(ADAMW, model, start.delta, PLAN)
    SETTINGS[method](model, optimizer, start, seed)
    beta = 3 * PLAN.beta if method.startswith("KL") else PLAN.beta
    found = [(0, measure(model))]
    for step in tune(
        model, optimizer, start.pairs, start.reference_logps, steps=PLAN.steps, beta=beta, seed=seed
    ):
        if step in PLAN.measured:
            with averaged_weights(optimizer):
                found.append((step, measure(model)))
    return found


def curve(method: str, seed: int, found: list[tuple[int, Score]]) -> Curve:
    reference = found[0][1]
    points = tuple(Point(score.reward, score.tax(reference), f"step {step}") for step, score in found)
    return Curve(method, seed, points)


def spelled(cell: dict[str, Any] | None) -> str:
    """A mean over seeds, its range, and how many seeds got there."""
    if cell is None:
        return "–"
    return f"{cell['mean']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}; {cell['count']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves, seconds = [], {}
    for method in SETTINGS:
        for seed in map(int, options.seeds.split(",")):
            began = time.process_time()
            curves.append(curve(method, seed, train(method, seed)))
            seconds[f"{method}, seed {seed}"] = round(time.process_time() - began, 1)
            last = curves[-1].points[-1]
            print(f"{method}, seed {seed}: reward {last.reward:.3f}, tax {last.tax:.1f}", flush=True)
    table = {
        method: {
            str(tax): None if spread is None else vars(spread)
            for tax in TAXES
            for spread in [Spread.of(rewards_at_tax(own, tax).values())]
        }
        for method, own in by_method(curves).items()
    }
    for method, row in table.items():
        print(f"| {method} | " + " | ".join(map(spelled, row.values())) + " |")
    if options.out is not None:
        made = {
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
            "plan": {"steps": PLAN.steps, "lr": PLAN.lr, "beta": PLAN.beta, "measured": PLAN.measured},
            "reward_at_tax": table,
            "curves": [
                {"method": one.method, "seed": one.seed, "points": [vars(point) for point in one.points]}
                for one in curves
            ],
            "cpu_seconds": seconds,
        }
        options.out.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
