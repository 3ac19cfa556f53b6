"""Supervised fine-tuning: TRL's trainer with our optimizer."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from trimtab.model_folder import load_model
from trimtab.train.guard import GuardedTrainer
from trimtab.train.models import lora_config
from trimtab.train.parts import Parts


class MergingSFTTrainer(GuardedTrainer, SFTTrainer):
    """TRL's SFT trainer with an optimizer built from named parameters; arguments of both."""


def make_trainer(parts: Parts) -> MergingSFTTrainer:
    """Load the policy and put the trainer together."""
    return MergingSFTTrainer(
        model=load_model(parts.policy, parts.model_settings, trainable=True), **trainer_arguments(parts)
    )


def trainer_arguments(parts: Parts) -> dict[str, Any]:
    """The arguments that every TRL trainer takes from a run."""
    adapter = parts.recipe.adapter
    return {
        "args": parts.arguments,
        "train_dataset": parts.train,
        "eval_dataset": parts.held_out,
        "processing_class": parts.tokenizer,
        "optimizer_plan": parts.plan,
        "peft_config": None if adapter is None else lora_config(adapter, parts.recipe.method),
    }
