"""Whether the prompts that a policy is to answer are enough, and leave it room."""

from __future__ import annotations

from typing import Any

from trimtab.data import PreparedData
from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder
from trimtab.recipe import SampledLoss
from trimtab.rewards import find_rewards


def check_sampling(loss: SampledLoss, arguments: Any, policy: ModelFolder, *parts: PreparedData) -> None:
    """Check what methods need that learn from the policy's own answers; no weights are loaded.

    Args:
        loss: the recipe's section.
        arguments: the trainer's.
        policy: where the policy starts.
        *parts: training prompts, and held-out ones where there are any.

    Raises:
        UserError: if a reward is not there, GRPO or RLOO have fewer prompts than one generation takes, or a
            prompt and its answer are longer than the model's positions.
    """
    find_rewards(loss.rewards, key="loss.rewards")
    _require_enough(parts[0], arguments)
    room = _positions(policy)
    for data in parts:
        longest = max(map(len, data.dataset["prompt_ids"]))
        if room is not None and longest + loss.max_new_tokens > room:
            raise UserError(
                f"a prompt of data.{data.report.part} has {longest:,} tokens, and with loss.max_new_tokens "
                f"{loss.max_new_tokens:,} more it does not fit into the {room:,} positions of "
                f"{policy.label!r}; lower data.max_length or loss.max_new_tokens"
            )


def _require_enough(data: PreparedData, arguments: Any) -> None:
    """TRL would train no step."""
    generated = getattr(arguments, "generation_batch_size", 0)
    if not generated:  # PPO, which goes through the prompts again
        return
    needed, rows = generated // arguments.num_generations, data.report.rows or 0
    if rows < needed:
        raise UserError(
            f"data.train has {rows:,} prompts and one generation takes {needed:,} ({generated:,} responses, "
            f"{arguments.num_generations} to each); give more prompts, or lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )


def _positions(policy: ModelFolder) -> int | None:
    """The model's longest input in tokens, where it says so and is no adapter."""
    from transformers import AutoConfig

    if policy.is_adapter:
        return None
    config = AutoConfig.from_pretrained(policy.folder, trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
