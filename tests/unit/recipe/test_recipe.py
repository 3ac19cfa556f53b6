"""What a recipe means when nothing is wrong with it: defaults, resolution, the round trip."""

from __future__ import annotations

import sys
from subprocess import run

import pytest
import yaml
from pydantic import ValidationError

from tests.unit.recipe.conftest import DPO, SFT, changed
from trimtab.recipe import METHODS, DPORecipe, Schedule, load_recipe, make_recipe
from trimtab.recipe.sections import LearningRateSchedule

TOP_LEVEL = (
    "method model reference base delta adapter data loss optimizer schedule training evaluation output seed"
)


@pytest.mark.parametrize("method", METHODS)
def test_the_top_level_keys_are_the_contract(method):
    assert list(METHODS[method].model_fields) == TOP_LEVEL.split()


@pytest.mark.parametrize(
    "values",
    [
        DPO,
        SFT,
        changed(DPO, {"optimizer.name": "adamw"}),
        changed(DPO, {"optimizer": {"name": "onties", "fidelity": "released", "merge_every": 5}}),
        changed(
            DPO,
            {
                "optimizer": {
                    "name": "online_merging",
                    "sparsify": "top",
                    "consensus": "linear",
                    "groups": [{"pattern": "embed", "lr": 0, "merge_weight": 0.5}],
                },
                "schedule.reserve_rate": {"type": "linear", "end": 2},
                "data": {"train": [{"path": "org/a", "weight": "1e-1"}, "org/b"], "eval": "org/c"},
                "evaluation": {"every": 5, "prompts": "Hello"},
            },
        ),
        changed(SFT, {"adapter": {"target_modules": ["q_proj", "v_proj"]}, "training.num_train_epochs": 2}),
    ],
)
def test_a_resolved_recipe_reads_back_equal(values, written):
    recipe = make_recipe(values)
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False)
    assert load_recipe(written(text)) == recipe
    assert list(recipe.resolved()) == TOP_LEVEL.split()


def test_defaults_that_depend_on_the_method_are_spelled_out():
    dpo, sft = make_recipe(DPO), make_recipe(SFT)
    assert (dpo.model, dpo.reference) == ("org/sft", "org/sft")
    assert (sft.model, sft.reference) == ("org/base", None)
    assert (dpo.optimizer.lr, make_recipe(changed(DPO, {"optimizer.lr": None})).optimizer.lr) == (1e-6, 1e-6)
    assert sft.optimizer.lr == 2e-5
    started_elsewhere = make_recipe(changed(DPO, {"model": "org/other"}))
    assert (started_elsewhere.model, started_elsewhere.reference) == ("org/other", "org/sft")
    only_a_model = make_recipe(changed(DPO, {"reference": ..., "model": "org/sft"}))
    assert only_a_model.reference == "org/sft"


def test_merging_defaults_are_there_for_merging_optimizers_only():
    merging = make_recipe(DPO).optimizer
    assert (merging.merge_weight, merging.reserve_rate, merging.merge_every) == (1e-7, 0.01, 1)
    assert (merging.fidelity, merging.rounding, merging.policy_differs) == ("paper", "auto", False)
    plain = make_recipe(SFT)
    assert plain.optimizer.merge_weight is None
    assert set(plain.resolved()["optimizer"]) == {"name", "lr", "betas", "weight_decay", "groups"}


def test_sources_are_always_a_tuple_of_sources():
    one = make_recipe(changed(SFT, {"data.train": "org/a"})).data.train
    same = make_recipe(changed(SFT, {"data.train": {"path": "org/a", "limit": 5}})).data.train
    several = make_recipe(changed(SFT, {"data.train": ["org/a", {"path": "org/b", "weight": 2}]})).data.train
    assert [source.path for source in one] == ["org/a"]
    assert (same[0].limit, same[0].weight, same[0].split) == (5, 1.0, None)
    assert [source.weight for source in several] == [1.0, 2.0]


def test_a_recipe_is_frozen():
    recipe = make_recipe(SFT)
    with pytest.raises(ValidationError):
        recipe.seed = 1
    with pytest.raises(ValidationError):
        recipe.optimizer.lr = 1.0


@pytest.mark.parametrize(
    ("written_as", "value"), [("1e-6", 1e-6), ("'1e-6'", 1e-6), ("1.0e-6", 1e-6), ("2", 2.0), ("0.5", 0.5)]
)
def test_numbers_are_read_however_yaml_spells_them(written_as, value, written):
    text = yaml.safe_dump(changed(SFT, {"optimizer.lr": "HERE"})).replace("HERE", written_as)
    assert load_recipe(written(text)).optimizer.lr == value


def test_the_schedules_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    for ours, theirs in names.items():
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=3, num_training_steps=10)
        schedule = Schedule(type=ours, warmup_steps=3)
        for step in range(10):
            assert schedule.factor(step, 10) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            scheduler.step()


def test_a_schedule_ends_where_it_says():
    for kind in ("linear", "cosine"):
        rising = Schedule(type=kind, end=3.0, warmup_ratio=0.25)
        assert rising.warmup(10) == 3
        assert rising.factor(0, 10) == 0.0
        assert rising.factor(3, 10) == 1.0
        assert rising.factor(10, 10) == pytest.approx(3.0)
        assert rising.factor(12, 10) == pytest.approx(3.0)
    assert LearningRateSchedule().type == "linear"


def test_reading_a_recipe_loads_no_torch():
    code = (
        "import sys; from trimtab.recipe import make_recipe; "
        f"make_recipe({SFT!r}); "
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_validating_in_python_gives_the_same_recipe():
    assert DPORecipe.model_validate(DPO) == make_recipe(DPO)
