"""From a recipe to the arguments of TRL's trainers, with the defaults that differ from TRL's said here."""

from __future__ import annotations

import sys
from typing import Any

import torch

from trimtab.errors import UserError, unknown
from trimtab.recipe import (
    DPOLoss,
    GRPOLoss,
    IPOLoss,
    KTOLoss,
    LearningRateSchedule,
    PPOLoss,
    Recipe,
    RewardLoss,
    RLOOLoss,
    RRHFLoss,
    SFTLoss,
)
from trimtab.train.group_arguments import group_fields

OURS = ("save_total_limit", "model_init_kwargs", "precompute_ref_log_probs")
"""Fields of the ``training`` section that we act on ourselves (the last one together with TRL)."""


NOT_YET = {
    "fsdp": "is not supported yet; several processes train with DDP (torchrun)",
    "push_to_hub": "is not supported yet; upload the finished model/ with hf upload",
    "save_only_model": "would leave nothing that a resume could go on from; leave it out",
    "ignore_data_skip": "would give a resumed run other rows than it would have had; leave it out",
    "auto_find_batch_size": "would change the batches while training; give per_device_train_batch_size",
    "sync_ref_model": "would move the reference, which a resume could not bring back; leave it out",
}
"""Fields that a run cannot honour, and why."""


def config_class(method: str) -> type:
    """Return the config class of a method's trainer, against which its ``training`` section is checked."""
    import trl

    from trimtab.train.trainer_config import TrainerConfig

    classes = {
        "sft": trl.SFTConfig,
        "dpo": trl.DPOConfig,
        "ipo": trl.DPOConfig,
        "kto": trl.KTOConfig,
        "reward": trl.RewardConfig,
        "rrhf": TrainerConfig,
        "ppo": TrainerConfig,
        "grpo": trl.GRPOConfig,
        "rloo": trl.RLOOConfig,
    }
    if method not in classes:
        raise UserError(f"method {method!r} is not available yet; available: {', '.join(classes)}")
    return classes[method]


def training_arguments(recipe: Recipe, *, evaluates: bool, resumes: bool) -> Any:
    """Build the trainer's arguments from a recipe.

    Where a recipe does not say, these differ from TRL's defaults:

    * ``bf16`` and ``activation_checkpointing`` are off on a CPU and on (as in TRL) on an accelerator; the
      weights are kept in fp32 either way, and bf16 means autocast;
    * ``ddp_find_unused_parameters`` is off: every parameter takes part in every step;
    * ``disable_tqdm`` and ``dataloader_pin_memory`` follow whether there is a terminal and an accelerator;
    * ``save_total_limit`` is kept from the Trainer: we delete old checkpoints ourselves, after the new one
      counts.

    Args:
        recipe: a checked recipe.
        evaluates: whether there are held-out rows.
        resumes: whether training continues; the evaluation before the first step is then over.

    Raises:
        UserError: if the trainer refuses the arguments.
    """
    refused = [name for name in NOT_YET if recipe.training.get(name)]
    if refused:
        raise UserError("; ".join(f"training.{name} {NOT_YET[name]}" for name in refused))
    fields = _defaults(recipe.training) | _renamed(recipe.training)
    for name in OURS[:2]:
        fields.pop(name, None)
    fields |= {
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "learning_rate": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "eval_strategy": "steps" if evaluates and recipe.evaluation.every else "no",
        "eval_on_start": evaluates and recipe.evaluation.at_start and not resumes,
        **_schedule(recipe.schedule.lr),
        **_loss(recipe),
    }
    if recipe.evaluation.every:
        fields["eval_steps"] = recipe.evaluation.every
    if fields.get("report_to", "none") is None:
        fields["report_to"] = "none"
    try:
        arguments = config_class(recipe.method)(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    _check_trackers(arguments.report_to)
    return arguments


def _check_trackers(names: list[str]) -> None:
    """Refuse trackers that are unknown or not installed, on which the Trainer would fail later."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise unknown("tracker", name, ["none", "all", *known], "training.report_to")
        if name not in integration_utils.get_available_reporting_integrations() and name != "flyte":
            raise UserError(
                f"training.report_to names {name}, which is not installed; install it or remove it"
            )


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    accelerated = torch.accelerator.is_available() and not given.get("use_cpu", False)
    half = accelerated and not given.get("fp16", False)
    return {
        "bf16": half and torch.cuda.is_bf16_supported() if torch.cuda.is_available() else half,
        # Said outright where there is nothing else: transformers refuses a recipe's bf16 on a CPU otherwise.
        "use_cpu": not torch.accelerator.is_available(),
        "activation_checkpointing": accelerated,
        "dataloader_pin_memory": accelerated,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": not sys.stderr.isatty(),
        "log_level": "warning",
    }


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    """Pass ``gradient_checkpointing``, the name everyone knows, by the name that is not deprecated."""
    names = {
        "gradient_checkpointing": "activation_checkpointing",
        "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    }
    return {names.get(name, name): value for name, value in given.items()}


def _schedule(schedule: LearningRateSchedule) -> dict[str, Any]:
    """The learning rate's schedule by transformers' names; one with an ``end`` is made by the mixin."""
    warmup = schedule.warmup_ratio if schedule.warmup_ratio is not None else schedule.warmup_steps
    kind = "constant_with_warmup" if schedule.type == "constant" and warmup else schedule.type
    return {"lr_scheduler_type": kind, "warmup_steps": warmup or 0}


def _loss(recipe: Recipe) -> dict[str, Any]:
    loss = recipe.loss
    if isinstance(loss, RRHFLoss | PPOLoss):
        return {}  # the trainer takes it as its settings, and the rows come with their lengths checked
    if isinstance(loss, GRPOLoss | RLOOLoss):
        return group_fields(recipe)  # prompts come cut to their room
    return {"max_length": recipe.data.max_length, **_loss_of_trl(loss)}


def _loss_of_trl(loss: Any) -> dict[str, Any]:
    if isinstance(loss, SFTLoss):
        return {"completion_only_loss": loss.completion_only, "packing": loss.packing}
    if isinstance(loss, RewardLoss):
        return {"center_rewards_coefficient": loss.center_rewards or None}
    if isinstance(loss, KTOLoss):
        # The mismatched pairs are made within batches of rows in the order of the dataset, which is random.
        return {"loss_type": "kto", "train_sampling_strategy": "sequential", **loss.model_dump()}
    assert isinstance(loss, DPOLoss | IPOLoss)
    both = loss.sft_weight > 0
    kind = "ipo" if isinstance(loss, IPOLoss) else loss.type
    return {
        "loss_type": [kind, "sft"] if both else [kind],
        "loss_weights": [1.0, loss.sft_weight] if both else None,
        "beta": loss.beta,
        "label_smoothing": 0.0 if isinstance(loss, IPOLoss) else loss.label_smoothing,
    }
