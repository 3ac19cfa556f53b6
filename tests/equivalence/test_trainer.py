"""A recipe's training against others that must give the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trimtab.terminal import plain_libraries

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

ADAMW = {**tiny.ADAMW, "weight_decay": 0.1}


@pytest.fixture
def train(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> Any:
    """Train a recipe with the given sections for six steps; return the weights."""

    def make(name: str, **sections: Any) -> dict[str, torch.Tensor]:
        defaults = {"max_steps": 6, "save_strategy": "no"}
        sections["training"] = {**defaults, **sections.get("training", {})}
        sections.setdefault("evaluation", {"at_start": False})
        return tiny.weights(
            tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / name, **sections)) / "model"
        )

    return make


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def moved(weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    return max(float((weights[name] - start[name]).abs().max()) for name in weights)


def test_an_adamw_recipe_is_trl_with_torch_s_adamw_bit_for_bit(
    train: Any, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    ours = train("ours", base=None, optimizer=ADAMW, loss={"beta": 0.3}, seed=11)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "optim": "adamw_torch", "beta": 0.3, "seed": 11}
    settings |= {"max_steps": 6, "per_device_train_batch_size": 2, "max_length": 64, "data_seed": 11}
    settings |= {"bf16": False, "activation_checkpointing": False, "use_cpu": True, "save_strategy": "no"}
    quiet = {"dataloader_pin_memory": False, "disable_tqdm": True}
    arguments = DPOConfig(str(tmp_path / "theirs"), **settings, **quiet)
    rows = [json.loads(line) for line in tiny_pairs[0].read_text().splitlines()]
    with plain_libraries():
        policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_models[1]) for _ in range(2))
        trainer = DPOTrainer(
            policy,
            reference,
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
        )
        trainer.train()
    theirs = dict(policy.named_parameters())
    assert_equal(ours, {name: parameter.detach() for name, parameter in theirs.items()})
    assert moved(ours, tiny.weights(tiny_models[1])) > 1e-3


@pytest.mark.parametrize("name", ["ondare", "onties", "online_merging"])
def test_merging_nothing_is_adamw_bit_for_bit(name: str, train: Any, tiny_models: Any) -> None:
    section = {"name": name, "weight_decay": 0.1, "reserve_rate": 1.0, "merge_weight": 0.0}
    if name == "online_merging":
        section |= {"sparsify": "bernoulli", "consensus": "linear"}
    plain = train("plain", base=None, optimizer=ADAMW)
    assert_equal(train(name, optimizer=section), plain)
    assert moved(plain, tiny.weights(tiny_models[1])) > 1e-3


def test_a_group_of_its_own_changes_that_group_only(train: Any) -> None:
    """Decoupled groups: with lr 0 for one pattern those weights stay, bit for bit, and only those."""
    groups = [{"pattern": "^model.layers.0.", "lr": 0.0}]
    weights = train("frozen", base=None, optimizer={**ADAMW, "groups": groups})
    start = train("start", base=None, optimizer={**ADAMW, "lr": 0.0})
    still = {name for name in weights if torch.equal(weights[name], start[name])}
    assert still == {name for name in weights if name.startswith("model.layers.0.")}
    assert len(still) == 9


def test_accumulating_two_halves_is_one_whole(train: Any, tiny_models: Any) -> None:
    """Same pairs in one step of 4 or two of 2: equal up to the rounding of sums, far below the steps taken.

    ε is large because Adam's first steps are g/|g|, which makes a whole step of a rounding error.
    """
    section = {**ADAMW, "eps": 1e-3}
    whole = train("whole", base=None, optimizer=section, training={"per_device_train_batch_size": 4})
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    split = train("split", base=None, optimizer=section, training=halves)
    assert moved(whole, tiny.weights(tiny_models[1])) > 1e-3
    assert moved(whole, split) < 2e-6


def test_sft_accumulation_weighs_tokens_not_batches(tiny_models: Any, tmp_path: Path) -> None:
    """The mean over tokens must not depend on how rows of different lengths are dealt into micro-batches."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.instruction_rows(16))
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        values = {
            "method": "sft",
            "model": str(tiny_models[0]),
            "data": {"train": str(rows), "max_length": 64},
            "optimizer": {"lr": 1e-3, "eps": 1e-3},
            "training": {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": batch}
            | {"gradient_accumulation_steps": accumulation},
            "output": str(tmp_path / f"sft-{batch}"),
        }
        results.append(tiny.weights(tiny.train(values) / "model"))
    assert moved(results[0], tiny.weights(tiny_models[0])) > 1e-3
    assert moved(*results) < 2e-6


def test_the_learning_rate_schedule_is_transformers_own(train: Any, tiny_models: Any) -> None:
    """Spelling the linear schedule out with an end near 0 comes to the same, up to rounding."""
    given = train("given", base=None, optimizer=ADAMW, schedule={"lr": {"type": "linear", "warmup_steps": 2}})
    ends = {"type": "linear", "warmup_steps": 2, "end": 1e-12}
    spelled = train("spelled", base=None, optimizer=ADAMW, schedule={"lr": ends})
    assert moved(given, tiny.weights(tiny_models[1])) > 1e-3
    assert moved(given, spelled) < 1e-6
