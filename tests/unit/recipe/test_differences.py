"""What a resumed run may set otherwise."""

from __future__ import annotations

import pytest

from tests.unit.recipe.conftest import DPO, changed
from trimtab.errors import IncompatibleState
from trimtab.recipe import make_recipe, recipe_differences, refuse_differences


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"optimizer.lr": 1e-3}, "optimizer.lr", False),
        ({"optimizer.merge_weight": 0.5}, "optimizer.merge_weight", False),
        ({"optimizer.reserve_rate": 0.5}, "optimizer.reserve_rate", False),
        ({"optimizer.groups": [{"pattern": "a"}]}, "optimizer.groups.0.pattern", False),
        ({"seed": 1}, "seed", False),
        ({"data.max_length": 5}, "data.max_length", False),
        ({"training.max_steps": 5}, "training.max_steps", False),
        ({"training.per_device_train_batch_size": 5}, "training.per_device_train_batch_size", False),
        ({"schedule.lr.type": "cosine"}, "schedule.lr.type", False),
        ({"output": "elsewhere"}, "output", True),
        ({"training.save_steps": 5}, "training.save_steps", True),
        ({"training.logging_steps": 5}, "training.logging_steps", True),
        ({"training.report_to": ["wandb"]}, "training.report_to.0", True),
        ({"evaluation.max_new_tokens": 5}, "evaluation.max_new_tokens", True),
    ],
)
def test_differences(changes, key, allowed):
    before, after = make_recipe(DPO), make_recipe(changed(DPO, changes))
    assert [(difference.key, difference.allowed) for difference in recipe_differences(before, after)] == [
        (key, allowed)
    ]
    if allowed:
        refuse_differences(before, after)
    else:
        with pytest.raises(IncompatibleState, match="cannot be resumed with another recipe") as caught:
            refuse_differences(before, after)
        assert key in str(caught.value)


def test_equal_recipes_do_not_differ():
    assert recipe_differences(make_recipe(DPO), make_recipe(make_recipe(DPO).resolved())) == []


def test_all_refused_differences_are_named():
    after = make_recipe(changed(DPO, {"seed": 4, "optimizer.lr": 1e-3, "output": "x"}))
    with pytest.raises(IncompatibleState) as caught:
        refuse_differences(make_recipe(DPO), after)
    assert "optimizer.lr (was 1e-06, now 0.001), seed (was 0, now 4)" in str(caught.value)
    assert "output" not in str(caught.value)


def test_the_evaluation_cadence_is_kept():
    """Each pass over the held-out rows draws from the random state that dropout uses."""
    held_out = changed(DPO, {"data.eval": "org/held-out"})
    before, after = make_recipe(held_out), make_recipe(changed(held_out, {"evaluation.every": 5}))
    assert [(d.key, d.allowed) for d in recipe_differences(before, after)] == [("evaluation.every", False)]


@pytest.mark.parametrize(
    ("method", "allowed"), [("grpo", False), ("rloo", False), ("ppo", True), ("dpo", True)]
)
def test_batches_of_measuring_matter_where_answers_are_drawn_in_them(method, allowed):
    loss = {} if method == "dpo" else {"rewards": "operator:concat"}
    values = {
        "method": method,
        "model": "org/sft",
        "data": {"train": "org/rows"},
        "output": "out",
        "loss": loss,
    }
    other = {**values, "training": {"per_device_eval_batch_size": 16}}
    (difference,) = recipe_differences(make_recipe(values), make_recipe(other))
    assert difference.allowed is allowed
