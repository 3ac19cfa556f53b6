"""The training section against a config class: names, types, and keys that are written elsewhere."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

import pytest

from tests.unit.recipe.conftest import DPO, changed
from trimtab.errors import UserError
from trimtab.recipe import OWNED, cast_training_arguments, make_recipe
from trimtab.recipe.training_fields import REFUSED


class Strategy(enum.StrEnum):
    NO = "no"
    STEPS = "steps"


@dataclasses.dataclass
class Config:
    learning_rate: float = 1e-6
    max_steps: int = -1
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    save_steps: float = 500
    warm: float = 0.0
    bf16: bool | None = None
    flag: bool = False
    save_strategy: Strategy | str = "steps"
    report_to: str | list[str] | None = "none"
    sizes: list[int] | None = None
    kwargs: dict[str, Any] | str | None = None
    run_name: str | None = None
    fsdp: str | None = None
    which: Literal["a", "b"] = "a"
    made: int = dataclasses.field(default=0, init=False)


@pytest.mark.parametrize(
    ("name", "value", "cast"),
    [
        ("max_steps", "1e2", 100),
        ("max_steps", 5.0, 5),
        ("max_steps", -1, -1),
        ("max_grad_norm", 0, 0),
        ("warm", "1e-6", 1e-6),
        ("save_steps", 10, 10),
        ("save_steps", "0.5", 0.5),
        ("bf16", True, True),
        ("bf16", None, None),
        ("save_strategy", "no", "no"),
        ("report_to", "wandb", "wandb"),
        ("report_to", ["wandb", "trackio"], ["wandb", "trackio"]),
        ("report_to", None, None),
        ("sizes", ["8", 16], [8, 16]),
        ("kwargs", {"a": [1]}, {"a": [1]}),
        ("run_name", "x", "x"),
        ("fsdp", True, True),
        ("which", "b", "b"),
    ],
)
def test_values_are_cast(name, value, cast):
    result = cast_training_arguments({name: value}, Config)[name]
    assert result == cast
    assert type(result) is type(cast)
    Config(**{name: result})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_stps", 5, "training.max_stps is not a field of Config; did you mean training.max_steps?"),
        ("lerning_rate", 5, "training.lerning_rate is not a field of Config; did you mean optimizer.lr?"),
        ("zzz", 5, "training.zzz is not a field of Config"),
        ("made", 5, "training.made is not a field of Config"),
        ("learning_rate", 5, "training.learning_rate is written as optimizer.lr"),
        ("max_steps", "many", "training.max_steps must be a whole number, not 'many'"),
        ("max_steps", 1.5, "training.max_steps must be a whole number, not 1.5"),
        ("max_steps", True, "training.max_steps must be a whole number, not true"),
        ("max_steps", None, "training.max_steps must be a whole number, not null"),
        ("flag", "yes", "training.flag must be true or false, not 'yes'"),
        ("flag", 1, "training.flag must be true or false, not 1"),
        ("warm", [1], "training.warm must be a number, not a list"),
        (
            "save_strategy",
            "stepz",
            "training.save_strategy must be one of Strategy's words, not 'stepz'; did you mean 'steps'?",
        ),
        ("sizes", ["a"], "training.sizes must be a list or null, not a list"),
        ("run_name", 5, "training.run_name must be null or text, not 5"),
        ("which", "c", "training.which must be 'a' or 'b', not 'c'"),
        ("max_steps", 0, "training.max_steps must be above 0, not 0"),
        ("max_steps", -5, "training.max_steps must be above 0, not -5"),
        ("save_steps", 0, "training.save_steps must be above 0, not 0"),
        ("max_grad_norm", -1, "training.max_grad_norm must be at least 0, not -1"),
        (
            "per_device_train_batch_size",
            "0",
            "training.per_device_train_batch_size must be at least 1, not 0",
        ),
        ("deepspeed", "x.json", "training.deepspeed is not supported"),
    ],
)
def test_values_are_refused(name, value, message):
    with pytest.raises(UserError) as caught:
        cast_training_arguments({name: value}, Config)
    assert str(caught.value) == f"recipe: {message}" or str(caught.value).startswith(f"recipe: {message}")


def test_a_pair_of_numbers_is_a_list():
    rloo = pytest.importorskip("trl").RLOOConfig
    assert cast_training_arguments({"reward_clip_range": ["-1e0", 2]}, rloo) == {
        "reward_clip_range": [-1.0, 2]
    }
    for wrong in ([1], "1,2", [1, "x"]):
        with pytest.raises(UserError, match="reward_clip_range must be a list of 2 or null"):
            cast_training_arguments({"reward_clip_range": wrong}, rloo)


def test_all_wrong_fields_are_named():
    with pytest.raises(UserError, match="4 problems"):
        cast_training_arguments({"max_stps": 1, "flag": 5, "learning_rate": 1, "local_rank": 2}, Config)


def test_a_recipe_is_checked_against_the_class_of_its_method():
    asked = []

    def config_class(method: str) -> type:
        asked.append(method)
        return Config

    recipe = make_recipe(changed(DPO, {"training.warm": "1e-3"}), config_class=config_class)
    assert (asked, recipe.training) == (["dpo"], {"warm": 1e-3})
    with pytest.raises(UserError, match="2 problems"):
        make_recipe(changed(DPO, {"training.max_stps": 1, "seed": -1}), config_class=config_class)
    asked.clear()
    make_recipe(DPO, config_class=config_class)
    assert asked == [], "without a training section there is no need for the trainer"


@pytest.mark.parametrize(
    "config", ["DPOConfig", "GRPOConfig", "KTOConfig", "RLOOConfig", "RewardConfig", "SFTConfig"]
)
def test_against_trl(config):
    config_class = getattr(pytest.importorskip("trl"), config)
    fields = {field.name for field in dataclasses.fields(config_class)}
    only = dict.fromkeys(["label_smoothing", "loss_weights", "truncation_mode"], "DPOConfig")
    only |= dict.fromkeys(["desirable_weight", "undesirable_weight"], "KTOConfig")
    only |= dict.fromkeys(["completion_only_loss", "packing"], "SFTConfig")
    sampling = ["max_completion_length", "temperature", "top_p", "top_k", "reward_weights"]
    learning = ["num_generations", "num_iterations", "epsilon", "epsilon_high"]
    only |= dict.fromkeys([*sampling, *learning], "GRPOConfig RLOOConfig")
    only |= {"scale_rewards": "GRPOConfig", "normalize_advantages": "RLOOConfig"}
    only["max_length"] = "DPOConfig KTOConfig RewardConfig SFTConfig"
    only["beta"] = "DPOConfig KTOConfig GRPOConfig RLOOConfig"
    only["loss_type"] = "DPOConfig KTOConfig SFTConfig GRPOConfig"
    only |= {"center_rewards_coefficient": "RewardConfig"}
    gone = {"warmup_ratio"}  # what people remember from transformers 4
    expected = {name for name in (*OWNED, *REFUSED) if config in only.get(name, config).split()} - gone
    assert expected <= fields | {"truncation_mode"}
    usable = {
        "per_device_train_batch_size": "8",
        "gradient_accumulation_steps": 2,
        "max_steps": "1e2",
        "max_grad_norm": "1e-1",
        "bf16": False,
        "report_to": "none",
        "save_steps": 50,
        "logging_steps": 0.1,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        **({"dataset_num_proc": None} if "dataset_num_proc" in fields else {}),
    }
    cast = cast_training_arguments(usable, config_class)
    assert (cast["max_steps"], cast["max_grad_norm"], cast["per_device_train_batch_size"]) == (100, 0.1, 8)
