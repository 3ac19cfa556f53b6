"""Loading what a run trains and what it compares with: tokenizer, models, adapter, reference delta."""

from __future__ import annotations

from typing import Any

from trimtab.delta import ReferenceDelta
from trimtab.delta.checkpoint import open_checkpoint
from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder, find_model, load_model, load_tokenizer
from trimtab.recipe import Adapter, Recipe

__all__ = [
    "ModelFolder",
    "find_model",
    "load_delta",
    "load_model",
    "load_tokenizer",
    "lora_config",
    "refuse_other_shape",
]


def refuse_other_shape(policy: ModelFolder, reference: ModelFolder) -> None:
    """Refuse a reference whose tensors differ in shape from the policy's, by the headers of their files.

    Only whole models are compared: an adapter has no tensors in common with a model.

    Raises:
        UserError: naming the first tensor that differs.
    """
    if policy.is_adapter or reference.is_adapter or policy == reference:
        return
    ours, theirs = (open_checkpoint(model.folder) for model in (policy, reference))
    for name in sorted({*ours.keys(), *theirs.keys()} - {"lm_head.weight"}):  # absent where it is tied
        there = [list(one.shape(name)) if name in one else "absent" for one in (ours, theirs)]
        if there[0] != there[1]:
            raise UserError(
                f"reference {reference.label!r} is not of the shape of model {policy.label!r}: {name} is "
                f"{there[1]} in the reference and {there[0]} in the model; take two versions of one model"
            )


def lora_config(adapter: Adapter, method: str) -> Any:
    """The recipe's ``adapter`` section as PEFT's configuration; a reward model's head is trained whole."""
    from peft import LoraConfig

    targets = adapter.target_modules
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if method == "reward" else "CAUSAL_LM",
    )


def load_delta(recipe: Recipe) -> ReferenceDelta | None:
    """The reference delta of a merging optimizer, from its folder or from two models; None without one."""
    if not recipe.optimizer.merges:
        return None
    if recipe.delta is not None:
        return ReferenceDelta.load(recipe.delta)
    return ReferenceDelta.between(reference=recipe.reference, base=recipe.base)
