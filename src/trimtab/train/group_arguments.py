"""The arguments of TRL's GRPO and RLOO trainers: from the loss section, and what is refused beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trimtab.errors import UserError
from trimtab.recipe import GRPOLoss, Recipe, RLOOLoss

BATCH_SIZE = 8
"""Rows of a micro-batch where the recipe does not say; transformers'."""

REFUSED = {
    "use_vllm": "needs vLLM, which cannot be installed beside this transformers; leave it out",
    "use_transformers_continuous_batching": "would cast the weights that are trained to bf16; leave it out",
    "use_transformers_paged": "would cast the weights that are trained to bf16; leave it out",
    "cast_lm_head_to_fp32": "has no effect on weights that are kept in fp32; leave it out",
    "chat_template_kwargs": "has no effect: prompts are tokenized while the data is read; leave it out",
    "generation_kwargs": "could contradict the loss section, where responses are described; leave it out",
    "remove_unused_columns": "would take the columns away that rewards are given; leave it out",
    "log_completions_hub_repo": "is not supported; log_completions writes them into the run folder",
}
"""Fields that these trainers have and a run cannot honour, and why."""

SILENT = {
    "vllm_": "use_vllm, which is not supported",
    "transformers_continuous_batching_config": "continuous batching, which is not supported",
    "ref_model_": "sync_ref_model, which is not supported",
    "sapo_": "the loss sapo, which is not one of loss.type",
    "vespo_": "the loss vespo, which is not one of loss.type",
    "max_tool_calling_iterations": "tools, which a recipe does not have",
    "ds3_gather_for_generation": "DeepSpeed, which is not supported",
}
"""How fields begin that would be without effect, and what they would belong to."""


def refuse_without_effect(given: Mapping[str, Any]) -> None:
    """Refuse fields of a recipe's ``training`` section that these trainers ignore or a run cannot honour.

    Raises:
        UserError: naming all of them.
    """
    problems = [f"training.{name} {why}" for name, why in REFUSED.items() if given.get(name)]
    for start, what in SILENT.items():
        names = [f"training.{name}" for name in given if name.startswith(start)]
        if names:
            problems.append(f"{', '.join(names)} would have no effect without {what}; leave it out")
    if problems:
        raise UserError("; ".join(problems))


def group_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of TRL's config that the loss section gives.

    ``use_bias_correction_kl`` is off unless the recipe's ``training`` section says otherwise: the paper's KL
    term is not weighted by the probability ratio.

    Args:
        recipe: of method ``grpo`` or ``rloo``.

    Raises:
        UserError: if responses do not come in whole groups.
    """
    refuse_without_effect(recipe.training)
    loss = recipe.loss
    assert isinstance(loss, GRPOLoss | RLOOLoss)
    fields = loss.model_dump(exclude={"rewards", "max_new_tokens", "type"})
    fields["reward_weights"] = [source.weight for source in loss.rewards]
    fields["max_completion_length"] = loss.max_new_tokens
    # A logit that is no number becomes 0, so that the loss tells of it and not an assertion of the GPU.
    fields["generation_kwargs"] = {"remove_invalid_values": True}
    if isinstance(loss, GRPOLoss):
        fields["loss_type"] = loss.type
        fields["use_bias_correction_kl"] = recipe.training.get("use_bias_correction_kl", False)
    _require_whole_groups(recipe, loss.num_generations)
    return fields


def _require_whole_groups(recipe: Recipe, size: int) -> None:
    given, processes = recipe.training, int(os.environ.get("WORLD_SIZE", "1"))
    batch = given.get("per_device_train_batch_size", BATCH_SIZE) * processes
    steps = given.get("steps_per_generation") or given.get("gradient_accumulation_steps", 1)
    generated = given.get("generation_batch_size") or batch * steps
    if generated % size:
        raise UserError(
            f"loss.num_generations is {size}, and {generated:,} responses are generated at once "
            f"({_how(given, processes)}), which is not a multiple of it; change one of them"
        )
    asked = given.get("num_generations_eval") or size
    held_out = given.get("per_device_eval_batch_size", BATCH_SIZE) * processes
    if recipe.data.eval is not None and held_out % asked:
        raise UserError(
            f"each held-out prompt is answered {asked} times, and {held_out} responses are measured at once "
            "(training.per_device_eval_batch_size × processes), which is not a multiple of it; change "
            "training.per_device_eval_batch_size or training.num_generations_eval"
        )


def _how(given: Mapping[str, Any], processes: int) -> str:
    if given.get("generation_batch_size"):
        return "training.generation_batch_size"
    steps = "steps_per_generation" if given.get("steps_per_generation") else "gradient_accumulation_steps"
    several = f" × {processes} processes" if processes > 1 else ""
    return f"training.per_device_train_batch_size × training.{steps}{several}"
