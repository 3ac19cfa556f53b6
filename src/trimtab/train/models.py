"""What a run makes of its recipe's models: whether they fit each other, an adapter, the reference delta."""

from __future__ import annotations

from typing import Any

from trimtab.delta import ReferenceDelta
from trimtab.delta.checkpoint import open_checkpoint
from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder, find_model
from trimtab.recipe import Adapter, Recipe


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
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        task_type="SEQ_CLS" if method == "reward" else "CAUSAL_LM",
    )


def load_delta(recipe: Recipe, policy: ModelFolder) -> ReferenceDelta | None:
    """The reference delta of a merging optimizer; None for one that does not merge.

    It comes from its folder, from reference and base, or, where the reference is an adapter, from that and
    what it started from.

    Raises:
        UserError: a model cannot be read, or policy and delta are not both of adapters or both of models.
    """
    if not recipe.optimizer.merges:
        return None
    if recipe.delta is not None:
        delta = ReferenceDelta.load(recipe.delta)
    else:
        assert recipe.reference is not None
        reference = find_model(recipe.reference, "reference", recipe.base)
        base = recipe.base
        if reference.is_adapter and (base is None or not find_model(base, "base").is_adapter):
            base = None  # the model it stands on: the adapter's delta is against its own start
        delta = ReferenceDelta.between(reference=recipe.reference, base=base)
    _check_space(delta, recipe, policy)
    return delta


def _check_space(delta: ReferenceDelta, recipe: Recipe, policy: ModelFolder) -> None:
    """Refuse a delta of whole models for an adapter, and one of an adapter for a whole model."""
    trains_adapter = policy.is_adapter or recipe.adapter is not None
    of_adapter = any(".lora_" in name for name in delta.names())
    if trains_adapter and not of_adapter:
        raise UserError(
            f"an adapter is trained on {policy.label!r}, and the delta is one of whole models, which have no "
            "adapter weights; take a trained adapter as reference, whose delta is its own, or train the model"
        )
    if of_adapter and not trains_adapter:
        raise UserError(
            f"{policy.label!r} is a whole model, and the delta is one of an adapter; let model be the "
            "adapter, or merge it into its model first and take the delta of that"
        )
