"""The methods the quickstart compares, and one training run of each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.delta import ReferenceDelta
from trimtab.lab import checkpoints
from trimtab.lab.dpo import PairTensors, all_logps, tune
from trimtab.lab.measure import Score, greedy_answers, measure
from trimtab.lab.preferences import draw_pairs
from trimtab.lab.world import Task
from trimtab.optim import OnDARE, OnlineMergingAdamW, OnTIES

ADAMW, REPEAT, ONDARE, ONTIES = "AdamW", "AdamW, other data order", "OnDARE", "OnTIES"
EMA, AVERAGE = "EMA", "averaging"
TRAINED = (ADAMW, REPEAT, ONDARE, ONTIES)


@dataclass(frozen=True)
class Plan:
    """What is the same for all methods, and the few numbers that are not.

    Attributes:
        steps: DPO steps, 48 pairs each.
        measured: The steps after which reward and capability are measured.
        lr: Learning rate of AdamW and OnTIES.
        beta: DPO's β.
        reserve_rate: p of OnDARE and OnTIES.
        merge_weight: α of OnDARE and OnTIES.
        ema: The share of the current weights in the moving average, per step.
        ema_measured: The steps after which the moving average is measured; it starts late.
        weights: w of the averages SFT + w·(AdamW − SFT), formed after the last step.
    """

    steps: int = 120
    measured: tuple[int, ...] = (5, 10, 20, 30, 40, 50, 60, 80, 100, 120)
    lr: float = 3e-5
    beta: float = 0.1
    reserve_rate: float = 0.5
    merge_weight: float = 1e-3
    ema: float = 0.03
    ema_measured: tuple[int, ...] = (30, 40, 50, 60, 70, 80, 100, 120)
    weights: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75)

    @property
    def ondare_lr(self) -> float:
        """OnDARE's learning rate: the paper keeps a share p of the update, unscaled; lr / p makes up."""
        return self.lr / self.reserve_rate

    def drift(self, method: str) -> float:
        """Return what α·F(τ) has added up to at the end, in units of τ (an upper bound for OnTIES)."""
        total = self.merge_weight * self.steps
        return {ONDARE: self.reserve_rate * total, ONTIES: total}.get(method, 0.0)


@dataclass(frozen=True)
class Measured:
    """One measured model: which method and seed, where along the run, and its scores."""

    method: str
    seed: int
    label: str
    score: Score


@dataclass
class RunResult:
    """What one training run brought back.

    Attributes:
        method: The method that was trained.
        seed: Its seed.
        points: The measured models, also those that ride along (EMA, averages).
        answers: Method -> answers to the example questions after the last step.
        cpu_seconds: Training and measuring.
        step_seconds: Training alone, per step.
        arrived: Share of α·F(τ) that reached the weights after rounding, or None.
    """

    method: str
    seed: int
    points: list[Measured] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    step_seconds: float = 0.0
    arrived: float | None = None


@dataclass(frozen=True)
class Start:
    """Where the runs of a seed start from; shared, never changed."""

    sft: PreTrainedModel
    base: PreTrainedModel
    delta: ReferenceDelta
    pairs: PairTensors
    reference_logps: Tensor


@lru_cache(maxsize=3)
def prepare(seed: int) -> Start:
    """Load the models of a seed and score its pairs with the reference once (about 3 CPU seconds)."""
    sft, base = checkpoints.load(seed, "sft"), checkpoints.load(seed, "base")
    pairs = PairTensors.of(draw_pairs(seed))
    delta = ReferenceDelta.between(reference=sft, base=base)
    return Start(sft, base, delta, pairs, all_logps(sft, pairs))


def build_optimizer(
    method: str, model: PreTrainedModel, delta: ReferenceDelta, plan: Plan
) -> torch.optim.Optimizer:
    """Return the optimizer of a method over the model's parameters; decay 0, betas (0.9, 0.999) for all."""
    named = list(model.named_parameters())
    merge: dict[str, Any] = {
        "reserve_rate": plan.reserve_rate,
        "merge_weight": plan.merge_weight,
        "fidelity": "paper",
    }
    if method == ONDARE:
        return OnDARE(named, delta, lr=plan.ondare_lr, **merge)
    if method == ONTIES:
        return OnTIES(named, delta, lr=plan.lr, **merge)
    return torch.optim.AdamW(named, lr=plan.lr, weight_decay=0.0)


@torch.no_grad()
def interpolate(into: PreTrainedModel, start: PreTrainedModel, end: PreTrainedModel, weight: float) -> None:
    """Set ``into`` to start + weight·(end − start), parameter by parameter."""
    triples = zip(into.parameters(), start.parameters(), end.parameters(), strict=True)
    for target, first, last in triples:
        target.copy_(torch.lerp(first, last, weight))


def train_run(
    method: str,
    seed: int,
    plan: Plan,
    *,
    examples: Sequence[Task] = (),
    report: Callable[[int], None] | None = None,
) -> RunResult:
    """Train one method from a seed's SFT model and measure along the way.

    The AdamW run carries the moving average and, after its last step, the averages with SFT: neither costs
    training.

    Args:
        method: One of ``TRAINED``.
        seed: Seed of the shipped models, the pairs and the data order.
        plan: The settings.
        examples: Questions to be answered after the last step.
        report: Called with the step after every step.
    """
    start, began = prepare(seed), time.process_time()
    result = RunResult(method, seed)
    model = copy.deepcopy(start.sft)
    optimizer = build_optimizer(method, model, start.delta, plan)
    average = copy.deepcopy(start.sft) if method == ADAMW else None
    training = 0.0
    clock = time.process_time()
    for step in tune(
        model,
        optimizer,
        start.pairs,
        start.reference_logps,
        steps=plan.steps,
        beta=plan.beta,
        seed=seed,
        order=int(method == REPEAT),
    ):
        training += time.process_time() - clock
        if average is not None:
            interpolate(average, average, model, plan.ema)
            if step in plan.ema_measured:
                result.points.append(Measured(EMA, seed, f"step {step}", measure(average)))
        if step in plan.measured:
            result.points.append(Measured(method, seed, f"step {step}", measure(model)))
        if report is not None:
            report(step)
        clock = time.process_time()
    _answer(result, method, model, examples)
    if average is not None:
        _answer(result, EMA, average, examples)
        _averages(result, start.sft, model, plan, examples)
    if isinstance(optimizer, OnlineMergingAdamW) and optimizer.arrival is not None:
        result.arrived = optimizer.arrival.delta
    result.step_seconds = training / plan.steps
    result.cpu_seconds = time.process_time() - began
    return result


def _averages(
    result: RunResult, sft: PreTrainedModel, tuned: PreTrainedModel, plan: Plan, examples: Sequence[Task]
) -> None:
    """Measure the averages between the SFT model and the tuned one, from near to far."""
    mixed = copy.deepcopy(sft)
    for weight in plan.weights:
        interpolate(mixed, sft, tuned, weight)
        result.points.append(Measured(AVERAGE, result.seed, f"w = {weight:g}", measure(mixed)))
        if weight == EXAMPLE_WEIGHT:
            _answer(result, AVERAGE, mixed, examples)
    last = next(p for p in reversed(result.points) if p.method == ADAMW)
    result.points.append(Measured(AVERAGE, result.seed, "w = 1", last.score))


EXAMPLE_WEIGHT = 0.25
"""The average whose answers are shown as examples."""


def _answer(result: RunResult, method: str, model: PreTrainedModel, examples: Sequence[Task]) -> None:
    result.answers[method] = answer_texts(model, examples)


def answer_texts(model: PreTrainedModel, examples: Sequence[Task]) -> list[str]:
    """Return the model's answers as text; an answer that never ended says so."""
    model.eval()
    return ["(no end)" if words is None else " ".join(words) for words in greedy_answers(model, examples)]
