#!/usr/bin/env python
"""Measures on the lab's tiny models where drift begins to do harm: the warning's threshold follows from it.

    OMP_NUM_THREADS=1 python scripts/measure_drift.py

writes benchmarks/results/drift.json (about 10 CPU minutes). For each of the lab's SFT models:

* extrapolation: θ_sft + x·τ without any training, against θ_sft;
* training: DPO with OnDARE (paper form, p = 0.5) with α chosen so that the drift is x at the end, against the
  run with α = 0 that sees the same pairs in the same order and drops the same entries of every update.

Losses of capability are paired, question by question. The rule by which harm begins was fixed before any
number was seen: at the smallest measured x from which on the mean loss over the seeds is at least one point
and its paired interval excludes 0. (Two values of x were added after a first look, to see more: 0.3 in
training and 1.2 in extrapolation.)
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.evaluate.intervals import Interval, paired_bootstrap
from trimtab.files import write_json
from trimtab.lab import checkpoints
from trimtab.lab.answers import capability, reward
from trimtab.lab.dpo import tune
from trimtab.lab.measure import capability_tasks, greedy_answers, reward_tasks
from trimtab.lab.methods import Plan, prepare
from trimtab.optim import OnDARE
from trimtab.optim.diagnostics import drift

OUT = Path(__file__).parent.parent / "benchmarks" / "results" / "drift.json"
AWAY = (-0.1, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)
TRAINED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
ONE_POINT = 1.0


@dataclass(frozen=True)
class Outcome:
    """Per question: 1 where the answer was right; and the rewards, each on questions that never change."""

    right: tuple[float, ...]
    rewards: tuple[float, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Outcome:
        able, liked = capability_tasks(), reward_tasks()
        model.eval()
        answers = greedy_answers(model, [*able, *liked])
        right = [capability(task, answer) for task, answer in zip(able, answers[: len(able)], strict=True)]
        rewards = [reward(task, answer) for task, answer in zip(liked, answers[len(able) :], strict=True)]
        return cls(tuple(right), tuple(rewards))


def extrapolated(seed: int, shares: Sequence[float]) -> dict[float, Outcome]:
    """Outcomes at θ_sft + x·τ, x = 0 included."""
    start = prepare(seed)
    found = {}
    for x in (0.0, *shares):
        model = copy.deepcopy(start.sft)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(start.delta.tensor(name), alpha=x)
        found[x] = Outcome.of(model)
    return found


def trained(seed: int, x: float, plan: Plan) -> tuple[Outcome, float]:
    """Outcome of a DPO run with OnDARE whose merges add up to x, and the drift as the optimizer has it."""
    start = prepare(seed)
    model = copy.deepcopy(start.sft)
    optimizer = OnDARE(
        model.named_parameters(),
        start.delta,
        lr=plan.ondare_lr,
        reserve_rate=plan.reserve_rate,
        merge_weight=x / (plan.reserve_rate * plan.steps),
    )
    run = tune(
        model,
        optimizer,
        start.pairs,
        start.reference_logps,
        steps=plan.steps,
        beta=plan.beta,
        seed=seed,
    )
    for _ in run:
        pass
    return Outcome.of(model), drift(optimizer.param_groups)


def compared(x: float, ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, Any]:
    """Loss of capability in points and gain of reward at ``x``, per seed and over all seeds' questions."""
    return {
        "x": x,
        "loss": shown(_losses(ours, theirs)),
        "reward_gain": shown(_gains(ours, theirs)),
        "capability": [round(fmean(own.right), 4) for own in ours],
        "reward": [round(fmean(own.rewards), 4) for own in ours],
        "loss_per_seed": [shown(_losses([a], [b])) for a, b in zip(ours, theirs, strict=True)],
        "reward_gain_per_seed": [shown(_gains([a], [b])) for a, b in zip(ours, theirs, strict=True)],
    }


def _losses(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Interval:
    after, before = ([100 * v for one in side for v in one.right] for side in (ours, theirs))
    return paired_bootstrap(after, before)


def _gains(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Interval:
    after, before = ([v for one in side for v in one.rewards] for side in (ours, theirs))
    return paired_bootstrap(before, after)


def shown(interval: Interval) -> list[float]:
    """[estimate, low, high], rounded to what the questions can resolve."""
    return [round(value, 4) for value in (interval.estimate, interval.low, interval.high)]


def harm_begins(rows: Sequence[dict[str, Any]]) -> float | None:
    """The smallest x > 0 from which on every mean loss is at least a point and its interval excludes 0.

    >>> rows = [{"x": x, "loss": [m, m - 1, m + 1]} for x, m in ((.1, 3.0), (.2, .5), (.3, 4.0), (.4, 9.0))]
    >>> harm_begins(rows), harm_begins(rows[:2])
    (0.3, None)
    """
    begins = None
    for row in sorted((row for row in rows if row["x"] > 0), key=lambda row: -row["x"]):
        mean, low, _ = row["loss"]
        if mean < ONE_POINT or low <= 0:
            break
        begins = row["x"]
    return begins


def last_harmless(rows: Sequence[dict[str, Any]]) -> float:
    """The largest measured x below where harm begins: 0 where it begins with the first."""
    begins = harm_begins(rows)
    return max(
        (row["x"] for row in rows if row["x"] > 0 and (begins is None or row["x"] < begins)), default=0.0
    )


def measure(seeds: Sequence[int], plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    """Everything that drift.json holds."""
    began = time.process_time()
    away = {seed: extrapolated(seed, AWAY) for seed in seeds}
    report(f"extrapolation measured, {time.process_time() - began:.0f} CPU s")
    runs: dict[float, list[Outcome]] = {}
    drifts: dict[float, float] = {}
    for x in (0.0, *TRAINED):
        found = [trained(seed, x, plan) for seed in seeds]
        runs[x], drifts[x] = [outcome for outcome, _ in found], fmean(far for _, far in found)
        report(f"trained to a drift of {x}, {time.process_time() - began:.0f} CPU s")
    extrapolation = [
        compared(x, [away[s][x] for s in seeds], [away[s][0.0] for s in seeds]) for x in (0.0, *AWAY)
    ]
    training = [compared(x, runs[x], runs[0.0]) | {"drift": round(drifts[x], 4)} for x in (0.0, *TRAINED)]
    return {
        "what": "where drift begins to do harm, on the lab's models",
        "seeds": list(seeds),
        "questions": {"capability": len(capability_tasks()), "reward": len(reward_tasks())},
        "units": {"loss": "points of capability, [mean, 95 % paired interval]", "reward_gain": "0 to 1"},
        "start_tax": [shown(_losses([runs[0.0][i]], [away[seed][0.0]])) for i, seed in enumerate(seeds)],
        "settings": {
            "steps": plan.steps,
            "lr": plan.ondare_lr,
            "beta": plan.beta,
            "reserve_rate": plan.reserve_rate,
        },
        "extrapolation": extrapolation,
        "training": training,
        "harm_begins": {"extrapolation": harm_begins(extrapolation), "training": harm_begins(training)},
        "last_harmless": {"extrapolation": last_harmless(extrapolation), "training": last_harmless(training)},
        "environment": checkpoints.environment(),
        "cpu_seconds": round(time.process_time() - began),
    }


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown, as docs/diagnostics.md shows them."""
    for what in ("extrapolation", "training"):
        yield f"{what}: harm begins at {results['harm_begins'][what]}"
        yield "| x | capability lost, points | per seed | reward gained, hundredths | per seed |"
        yield "|---|---|---|---|---|"
        for row in results[what]:
            mean, low, high = row["loss"]
            gain, least, most = (100 * value for value in row["reward_gain"])
            seeds = " / ".join(f"{one[0]:+.1f}" for one in row["loss_per_seed"])
            gains = " / ".join(f"{100 * one[0]:+.1f}" for one in row["reward_gain_per_seed"])
            yield (
                f"| {row['x']:g} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {seeds} "
                f"| {gain:+.1f} ({least:+.1f} to {most:+.1f}) | {gains} |"
            )


def main(argv: list[str] | None = None) -> int:
    """Measure and write, or show what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where the results go")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(checkpoints.SEEDS))
    parser.add_argument("--steps", type=int, default=Plan().steps, help="DPO steps")
    parser.add_argument("--show", action="store_true", help="measure nothing: print the tables of --out")
    options = parser.parse_args(argv)
    if not options.show:
        torch.set_num_threads(1)
        results = measure(options.seeds, Plan(steps=options.steps), lambda line: print(line, file=sys.stderr))
        write_json(options.out, results)
    print("\n".join(table(json.loads(options.out.read_text(encoding="utf-8")))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
