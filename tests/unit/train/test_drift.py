"""The drift of a recipe against a simulation: what real optimizers add when no gradient moves anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab import ReferenceDelta
from trimtab.recipe import make_recipe
from trimtab.train.drift import Drift
from trimtab.train.optimizers import OptimizerPlan

STEPS = 40
VALUES = {
    "method": "dpo",
    "reference": "org/sft",
    "base": "org/base",
    "data": {"train": "org/pairs"},
    "output": "o",
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ({"name": "ondare"}, {}),
        ({"name": "ondare", "rescale": "expected", "merge_every": 3}, {}),
        ({"name": "ondare", "redraw": False}, {}),
        ({"name": "ondare", "fidelity": "released"}, {"merge_weight": {"type": "cosine"}}),
        ({"name": "onties", "merge_every": 7}, {"reserve_rate": {"type": "linear", "end": 0.5}}),
        ({"name": "online_merging", "sparsify": "none", "consensus": "linear", "reserve_rate": None}, {}),
        ({"name": "ondare"}, {"lr": {"warmup_steps": 10}, "reserve_rate": {"type": "cosine", "end": 0.2}}),
        ({"name": "ondare", "merge_weight_follows_lr": True}, {"lr": {"type": "cosine"}}),
    ],
)  # fmt: skip
def test_expected_drift_is_what_the_merges_add_up_to(
    optimizer: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """Without gradients Δ = 0 and all that moves is α·F(τ). For top, the most that it can be is what the
    entries move that it always keeps."""
    section = {"lr": 1e-3, "merge_weight": 1e-3, "reserve_rate": 0.5, **optimizer}
    section = {key: value for key, value in section.items() if value is not None}
    recipe = make_recipe({**VALUES, "optimizer": section, "schedule": schedule})
    base, reference = torch.nn.Linear(200, 500, bias=False), torch.nn.Linear(200, 500, bias=False)
    reference.weight.data = base.weight.data + 0.5
    delta = ReferenceDelta.between(reference=reference, base=base)
    plan = OptimizerPlan.from_recipe(recipe, delta)
    assert plan.drift is not None
    made = plan.build(reference, set())
    plan.schedule(made, STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: recipe.schedule.lr.factor(step, STEPS))
    start = reference.weight.detach().double().clone()
    gap = recipe.optimizer.merge_every or 1
    for step in range(1, STEPS + 1):
        reference.weight.grad = torch.zeros_like(reference.weight)
        made.step()
        if step == STEPS:
            made.merge_now()
        scheduler.step()
        if step == STEPS or step == 2 * gap:
            moved = (reference.weight.detach().double() - start) / 0.5
            expected = Drift(recipe).after(step, of=STEPS)
            drift = float(moved.square().mean().sqrt())
            if recipe.optimizer.name == "onties":
                assert drift < 0.8 * expected, step
                drift = float(moved.max())
            assert drift == pytest.approx(expected, rel=0.005), step
