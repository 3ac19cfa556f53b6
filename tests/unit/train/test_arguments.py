"""From recipes to the trainer's arguments and to the reference that DPO compares with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trimtab import UserError
from trimtab.recipe import make_recipe
from trimtab.terminal import plain_libraries
from trimtab.train import config_class
from trimtab.train.arguments import training_arguments

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL


@pytest.fixture
def arguments(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> Any:
    """Arguments for a recipe with the given sections."""

    def make(evaluates: bool = True, resumes: bool = False, **sections: Any) -> Any:
        values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **sections)
        recipe = make_recipe(values, config_class=config_class)
        return training_arguments(recipe, evaluates=evaluates, resumes=resumes)

    return make


def test_defaults_on_a_cpu(arguments: Any) -> None:
    made = arguments()
    assert (made.bf16, made.fp16, made.activation_checkpointing) == (False, False, False)
    assert (made.lr_scheduler_type, made.warmup_steps, made.learning_rate) == ("linear", 0, 1e-3)
    assert (made.seed, made.data_seed, made.max_length, made.report_to) == (0, 0, 64, [])
    assert (made.eval_strategy, made.eval_on_start) == ("no", True)


def test_what_the_recipe_says_wins(arguments: Any) -> None:
    made = arguments(
        training={"bf16": True, "gradient_checkpointing": True, "save_total_limit": 2},
        schedule={"lr": {"type": "cosine", "warmup_ratio": 0.25}},
        evaluation={"every": 3},
        loss={"type": "hinge", "beta": 0.5, "label_smoothing": 0.1, "sft_weight": 0.2},
        seed=5,
    )
    assert made.bf16
    assert made.activation_checkpointing
    assert made.save_total_limit is None  # old checkpoints are deleted after the new one counts, by us
    assert (made.lr_scheduler_type, made.get_warmup_steps(100)) == ("cosine", 25)
    assert (made.eval_strategy, made.eval_steps, made.seed, made.data_seed) == ("steps", 3, 5, 5)
    assert (made.loss_type, made.loss_weights, made.beta) == (["hinge", "sft"], [1.0, 0.2], 0.5)
    assert made.label_smoothing == 0.1


def test_a_constant_schedule_keeps_its_warmup(arguments: Any) -> None:
    assert arguments(schedule={"lr": {"type": "constant"}}).lr_scheduler_type == "constant"
    warmed = arguments(schedule={"lr": {"type": "constant", "warmup_steps": 7}})
    assert (warmed.lr_scheduler_type, warmed.warmup_steps) == ("constant_with_warmup", 7)


def test_a_resumed_run_is_not_evaluated_at_its_start(arguments: Any) -> None:
    assert not arguments(resumes=True).eval_on_start
    assert not arguments(evaluates=False).eval_on_start


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="'raft' is not available yet; available: sft, dpo, ipo, kto, reward"):
        config_class("raft")


def test_the_learning_rate_ends_where_the_schedule_says(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    schedule = {"lr": {"type": "linear", "end": 0.5}}
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", schedule=schedule)
    lines = [json.loads(line) for line in (tiny.train(values) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([1e-3, 8.75e-4, 7.5e-4, 6.25e-4], rel=1e-12)


def first_margin(folder: Path) -> float:
    line = (folder / "metrics.jsonl").read_text().splitlines()[0]
    return float(json.loads(line)["eval_rewards/margins"])


@pytest.mark.parametrize("adapter", [None, {"r": 2}], ids=["weights", "adapter"])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_is_the_one_that_is_named(
    adapter: Any, precompute: bool, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    base, reference = (str(path) for path in tiny_models)
    margins = {}
    for policy in (reference, base):
        values = tiny.recipe(
            tiny_models, tiny_pairs, tmp_path / Path(policy).name, model=policy, adapter=adapter, base=None,
            optimizer=tiny.ADAMW,
            training={"max_steps": 1, "precompute_ref_log_probs": precompute, "save_strategy": "no"},
        )  # fmt: skip
        margins[policy] = first_margin(tiny.train(values))
    assert margins[reference] == 0.0
    assert margins[base] == pytest.approx(expected_margin(tiny_models, tiny_pairs[1]), rel=1e-4)


def expected_margin(models: tuple[Path, Path], rows: Path) -> float:
    """The mean of β·(log-ratio of chosen − of rejected) of base against reference, by transformers alone."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny.tokenizer()
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in models)

    def logp(model: Any, prompt: Any, answer: Any) -> float:
        before = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = torch.tensor([tokenizer.apply_chat_template(prompt + answer)["input_ids"]])
        with torch.no_grad():
            table = model(ids).logits.log_softmax(-1)[0, before - 1 : -1]
        return float(table.gather(1, ids[0, before:, None]).sum())

    margins = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        ratio = [logp(policy, row["prompt"], row[side]) - logp(reference, row["prompt"], row[side])
                 for side in ("chosen", "rejected")]  # fmt: skip
        margins.append(0.1 * (ratio[0] - ratio[1]))
    return sum(margins) / len(margins)


def test_an_adapter_is_saved_as_one_and_can_be_trained_further(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    common = {"base": None, "optimizer": {**tiny.ADAMW, "lr": 0.1}}
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "first", adapter={"r": 2}, **common)
    first = tiny.train(values) / "model"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in first.iterdir()}
    with plain_libraries():
        model = AutoPeftModelForCausalLM.from_pretrained(first)
    assert any(p.abs().max() > 0.05 for name, p in model.named_parameters() if "lora_B" in name)
    again = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "second", reference=str(first), **common)
    second = tiny.train(again)
    assert first_margin(second) == 0.0  # the reference is the adapter as it was, not the model without it
    with pytest.raises(UserError, match="is an adapter already"):
        tiny.train({**again, "adapter": {"r": 2}, "output": str(tmp_path / "third")})
