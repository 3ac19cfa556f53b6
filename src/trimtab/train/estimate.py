"""How large a training is, before any weights are loaded: parameters, steps, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.delta.checkpoint import open_checkpoint
from trimtab.delta.held import SPARSE_SHARE
from trimtab.model_folder import ModelFolder, find_model
from trimtab.recipe import GRPOLoss, Optimizer, PPOLoss, Recipe, RLOOLoss, SampledLoss
from trimtab.train.models import lora_config
from trimtab.train.parts import Parts
from trimtab.train.ppo_model import add_value_head
from trimtab.train.state_sizes import FP32, STORED, state_sizes

SPARSE_ENTRY = 6
"""Bytes per kept entry of a sparse τ: two for where it is, four for its value."""


@dataclass(frozen=True)
class Size:
    """How large a training is.

    Args:
        parameters: of the model, adapter included.
        trainable: of these, how many are trained.
        rows: training rows after dropping; None when they are streamed.
        batch: rows (of methods that sample: responses) in one optimizer step, over all processes.
        steps: optimizer steps.
        memory: bytes per process by what they are for, activations not included.
    """

    parameters: int
    trainable: int
    rows: int | None
    batch: int
    steps: int
    memory: dict[str, int]

    @property
    def total_memory(self) -> int:
        """Bytes per process, activations not included."""
        return sum(self.memory.values())


def measure(parts: Parts) -> Size:
    """Size up a training from configurations, headers and rows."""
    recipe, arguments = parts.recipe, parts.arguments
    model = empty_model(parts.policy, recipe)
    parameters = sum(p.numel() for p in model.parameters())
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    rows = None if recipe.data.streaming else len(parts.train)
    batch = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    return Size(
        parameters=parameters,
        trainable=sum(map(math.prod, trained.values())),
        rows=rows,
        batch=batch,
        steps=count_steps(rows, arguments, recipe.loss),
        memory=memory(parts, parameters, trained),
    )


def empty_model(model: ModelFolder, recipe: Recipe) -> Any:
    """Return the model that will be trained, adapter included, without storage."""
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    source: Any = model.folder
    adapter = None if recipe.adapter is None else lora_config(recipe.adapter, recipe.method)
    if model.base is not None:
        adapter = PeftConfig.from_pretrained(model.folder)
        adapter.inference_mode = False
        source = model.base.folder
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        if recipe.method == "reward":
            config.num_labels = 1
            empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        else:
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if adapter is not None:
            adapter.base_model_name_or_path = empty.name_or_path  # PEFT warns of any other
            empty = get_peft_model(empty, adapter)
        if isinstance(recipe.loss, PPOLoss):
            add_value_head(empty)
    return empty


def count_steps(rows: int | None, arguments: Any, loss: Any = None) -> int:
    """Return the optimizer steps of a training, as the Trainer counts them.

    Args:
        rows: training rows; None when they are streamed, and ``max_steps`` decides.
        arguments: the trainer's arguments.
        loss: the recipe's section; PPO takes several steps with the same rows.
    """
    if arguments.max_steps > 0 or rows is None:
        return int(arguments.max_steps)
    if isinstance(loss, PPOLoss):
        responses = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        rollouts = math.ceil(rows / (loss.minibatches * responses * arguments.world_size))
        return math.ceil(rollouts * loss.minibatches * loss.epochs * arguments.num_train_epochs)
    per_epoch = max(1, math.ceil(_micro_batches(rows, arguments) / arguments.gradient_accumulation_steps))
    return math.ceil(per_epoch * arguments.num_train_epochs)


def _micro_batches(rows: int, arguments: Any) -> int:
    """Micro-batches in one epoch, in each process."""
    if hasattr(arguments, "generation_batch_size"):  # rows are prompts; those of no whole generation wait
        generations = rows // (arguments.generation_batch_size // arguments.num_generations)
        return int(generations * arguments.steps_per_generation * arguments.num_iterations)
    batches = rows / (arguments.per_device_train_batch_size * arguments.world_size)
    return math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)


def memory(parts: Parts, parameters: int, trained: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Estimate the bytes that stay allocated in each process, by what they are for.

    Weights and gradients in fp32; moments and τ as the optimizer holds them, and τ itself beside F(τ) where
    that changes with p alone; one more copy for step-K's anchor, or for what OnlineMerging tells its update
    by. What depends on the batch (activations, logits) is not in it.

    Args:
        parts: what is trained.
        parameters: how many the model has.
        trained: shapes of the trained ones by name.
    """
    optimizer, gap = parts.recipe.optimizer, _gap(parts.recipe)
    trainable = sum(map(math.prod, trained.values()))
    keeps_both = _is_fixed(parts) and parts.recipe.schedule.reserve_rate is not None
    sizes = {
        "weights": FP32 * parameters,
        "gradients": FP32 * trainable,
        **state_sizes(optimizer, trained),
        "reference delta": int(_delta_bytes(parts) * trainable * optimizer.merges),
        "delta before F": FP32 * trainable * keeps_both,
        "anchor of step-K": FP32 * trainable * (optimizer.merges and gap > 1),
        "weights before the step": FP32 * trainable * (optimizer.name == "online_merging" and gap == 1),
        "reference model": FP32 * parameters * _loads_reference(parts),
        "reward models": FP32 * _reward_parameters(parts),
        **_regularisers(parts.recipe.optimizer, trainable),
    }
    return {name: size for name, size in sizes.items() if size}


def _regularisers(optimizer: Optimizer, trainable: int) -> dict[str, int]:
    """What the regularisers keep: the start is shared by those that need it."""
    start = optimizer.pull is not None or optimizer.elastic_reset is not None
    fisher = optimizer.child_tuning is not None and optimizer.child_tuning.variant == "D"
    directions = 0 if optimizer.projection is None else len(optimizer.projection.data)
    return {
        "average of the weights": FP32 * trainable * (optimizer.ema is not None),
        "average of elastic reset": FP32 * trainable * (optimizer.elastic_reset is not None),
        "weights at the start": FP32 * trainable * start,
        "Fisher mask": trainable * fisher,
        "capability gradients": FP32 * trainable * directions,
    }


def _delta_bytes(parts: Parts) -> float:
    """Bytes per parameter of τ, or of F(τ), as it is held."""
    optimizer = parts.recipe.optimizer
    rate, storage = optimizer.reserve_rate or 1.0, optimizer.delta_storage or "auto"
    if _is_fixed(parts) and (storage == "sparse" or (storage == "auto" and rate <= SPARSE_SHARE)):
        return SPARSE_ENTRY * rate
    return STORED["float32" if storage in ("auto", "sparse") else storage]


def _gap(recipe: Recipe) -> int:
    gaps = [group.merge_every for group in recipe.optimizer.groups if group.merge_every]
    return max([recipe.optimizer.merge_every or 1, *gaps])


def _is_fixed(parts: Parts) -> bool:
    """Whether F(τ) is the same at every merge, so that it is what is held."""
    optimizer = parts.recipe.optimizer
    once = optimizer.redraw is False or optimizer.fidelity == "released"
    return optimizer.merges and (once or optimizer.name == "onties" or optimizer.sparsify == "top")


def _loads_reference(parts: Parts) -> bool:
    # PPO shares the model under a new adapter; TRL also keeps a trained adapter's start beside it.
    kept_beside = parts.policy.is_adapter and parts.recipe.method != "ppo"
    shared = (parts.recipe.adapter is not None or kept_beside) and parts.reference == parts.policy
    precomputed = getattr(parts.arguments, "precompute_ref_log_probs", False)
    loss = parts.recipe.loss
    unused = isinstance(loss, GRPOLoss | RLOOLoss) and loss.beta == 0
    return parts.reference is not None and not shared and not precomputed and not unused


def _reward_parameters(parts: Parts) -> int:
    """Parameters of the models that score responses, by the headers of their files."""
    loss = parts.recipe.loss
    sources = loss.rewards if isinstance(loss, SampledLoss) else ()
    models = [find_model(one.source, "loss.rewards") for one in sources if one.rule is None]
    checkpoints = [open_checkpoint(model.folder, adapter=model.is_adapter) for model in models]
    shapes = [one.shape(name) for one in checkpoints for name in sorted(one.keys())]
    return sum(map(math.prod, shapes))
