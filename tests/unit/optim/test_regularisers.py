"""EMA, pull, elastic reset and ChildTuning-F beside every optimizer: held to the oracle, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.oracle import reference
from tests.oracle import regularisers as oracle
from tests.property.runs import Policy, Twin, normal_grads
from trimtab import OnDARE, OnlineMerging, OnTIES
from trimtab.ops import GRADIENT, MaskKey, bernoulli_mask
from trimtab.optim import EMA, ChildTuning, ElasticReset, PullToReference

SHAPES = {"up": (5, 3), "bias": (5,), "head": (2, 5)}
LR, DECAY, RATE, WEIGHT = 0.01, 0.1, 0.5, 0.05
MERGE = {"reserve_rate": RATE, "merge_weight": WEIGHT}
STEPS = 7


def adamw(policy: Policy, _: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.named(), lr=LR, weight_decay=DECAY)


def ondare(policy: Policy, gap: int) -> torch.optim.Optimizer:
    return OnDARE(policy.named(), policy.delta, lr=LR, weight_decay=DECAY, merge_every=gap, **MERGE)


def onties(policy: Policy, gap: int) -> torch.optim.Optimizer:
    return OnTIES(policy.named(), policy.delta, lr=LR, weight_decay=DECAY, merge_every=gap, **MERGE)


def around(policy: Policy, gap: int) -> torch.optim.Optimizer:
    return OnlineMerging(adamw(policy, gap), policy.delta, merge_every=gap, **MERGE)


METHODS = {
    adamw: reference.Method("none", "linear"),
    ondare: reference.PAPER["ondare"],
    onties: reference.PAPER["onties"],
    around: reference.PAPER["ondare"],
}
CASES = [(adamw, 1), (ondare, 1), (onties, 1), (around, 1), (ondare, 3), (around, 3)]
every_optimizer = pytest.mark.parametrize(
    ("make", "gap"), CASES, ids=[f"{make.__name__}-{gap}" for make, gap in CASES]
)
Make = Callable[[Policy, int], torch.optim.Optimizer]


def sides(make: Make, gap: int) -> tuple[Policy, torch.optim.Optimizer, Twin]:
    """A policy with its optimizer, and the oracle's twin of both."""
    policy = Policy.make(SHAPES)
    settings = {"lr": LR, "decay": DECAY, "merge_every": gap, **MERGE}
    if make is adamw:
        settings |= {"merge_weight": 0.0, "reserve_rate": 1.0}
    twin = Twin(policy, METHODS[make], lambda _: reference.Adam(), lambda _: settings)
    return policy, make(policy, gap), twin


def step(policy: Policy, optimizer: torch.optim.Optimizer, t: int) -> dict[str, Any]:
    """Take a step of the optimizer; return the gradients it was given."""
    gradients = normal_grads(policy, seed=t)
    policy.set_grads({name: gradient.clone() for name, gradient in gradients.items() if gradient is not None})
    optimizer.step()
    return gradients


@every_optimizer
@pytest.mark.parametrize("every", [1, 2])
def test_the_average_follows_the_weights_and_leaves_them_alone(make: Make, gap: int, every: int) -> None:
    policy, optimizer, twin = sides(make, gap)
    ema = EMA(optimizer, 0.25, every=every)
    expected = {name: list(run.theta) for name, run in twin.runs.items()}
    for t in range(1, STEPS + 1):
        twin.step(step(policy, optimizer, t))
        twin.check(1e-12)
        for name, p in policy.named():
            if t % every == 0:
                expected[name] = oracle.moved(expected[name], twin.runs[name].theta, 0.25)
            average = ema.average(p)
            assert average is not None
            assert average.flatten().tolist() == pytest.approx(expected[name], abs=1e-12)


@every_optimizer
def test_the_pull_is_decay_towards_the_start(make: Make, gap: int) -> None:
    policy, optimizer, twin = sides(make, gap)
    PullToReference(optimizer, 0.125)
    start = {name: list(run.theta) for name, run in twin.runs.items()}
    for t in range(1, STEPS + 1):
        for name, run in twin.runs.items():
            before, run.theta = run.theta, oracle.moved(run.theta, start[name], 0.125)
            if run.since > 0:  # the anchor of step-K is pulled along, as it decays along
                moves = [(b - a) / run.decayed for a, b in zip(before, run.theta, strict=True)]
                run.anchor = [a + move for a, move in zip(run.anchor, moves, strict=True)]
        twin.step(step(policy, optimizer, t))
        twin.check(1e-12)


@every_optimizer
def test_elastic_reset_sets_weights_and_average_back(make: Make, gap: int) -> None:
    policy, optimizer, twin = sides(make, gap)
    ElasticReset(optimizer, 0.25, every=2)
    start = {name: list(run.theta) for name, run in twin.runs.items()}
    average = dict(start)
    for t in range(1, STEPS + 1):
        twin.step(step(policy, optimizer, t))
        for name, run in twin.runs.items():
            average[name] = oracle.moved(average[name], run.theta, 0.25)
            if t % 2 == 0:
                run.theta, run.since, average[name] = list(average[name]), 0, start[name]
        twin.check(1e-12)


@every_optimizer
def test_child_tuning_masks_the_gradient_before_the_moments(make: Make, gap: int) -> None:
    policy, optimizer, twin = sides(make, gap)
    ChildTuning(optimizer, 0.25, seed=3)
    for t in range(1, STEPS + 1):
        gradients = step(policy, optimizer, t)
        thinned = {}
        for name, gradient in gradients.items():
            kept = bernoulli_mask(gradient.shape, 0.25, MaskKey(3, GRADIENT, t, name)).flatten().tolist()
            values = oracle.masked(gradient.flatten().tolist(), kept, 0.25)
            thinned[name] = torch.tensor(values, dtype=torch.float64).view(gradient.shape)
        twin.step(thinned)
        twin.check(1e-12)


def test_a_mask_goes_by_the_steps_of_its_own_parameter() -> None:
    policy, optimizer, _ = sides(adamw, 1)
    ChildTuning(optimizer, 0.5, seed=3)
    weight = dict(policy.named())["up"]
    seen = []
    for t, skipped in ((1, False), (2, True), (3, False)):
        gradients: dict[str, Any] = dict(normal_grads(policy, seed=t))
        if skipped:
            gradients["up"] = None
        policy.set_grads(gradients)
        optimizer.step()
        if weight.grad is not None:
            seen.append(weight.grad != 0)
    for count, kept in enumerate(seen, 1):
        assert torch.equal(kept, bernoulli_mask((5, 3), 0.5, MaskKey(3, GRADIENT, count, "up")))


def test_all_of_them_together_act_in_the_order_in_which_they_were_attached() -> None:
    policy, optimizer, twin = sides(ondare, 1)
    ChildTuning(optimizer, 0.5, seed=3)
    PullToReference(optimizer, 0.125)
    ElasticReset(optimizer, 0.5, every=3)
    ema = EMA(optimizer, 0.25)
    start = {name: list(run.theta) for name, run in twin.runs.items()}
    elastic, average = dict(start), dict(start)
    for t in range(1, STEPS + 1):
        gradients = step(policy, optimizer, t)
        for name, run in twin.runs.items():
            run.theta = oracle.moved(run.theta, start[name], 0.125)
            kept = bernoulli_mask(SHAPES[name], 0.5, MaskKey(3, GRADIENT, t, name))
            gradients[name] = gradients[name] * kept / 0.5
        twin.step(gradients)
        for name, run in twin.runs.items():
            elastic[name] = oracle.moved(elastic[name], run.theta, 0.5)
            if t % 3 == 0:
                run.theta, run.since, elastic[name] = list(elastic[name]), 0, start[name]
            average[name] = oracle.moved(average[name], run.theta, 0.25)
        twin.check(1e-12)
    for name, p in policy.named():
        found = ema.average(p)
        assert found is not None
        assert found.flatten().tolist() == pytest.approx(average[name], abs=1e-12)
