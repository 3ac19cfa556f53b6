"""Direct preference optimization (arXiv 2305.18290): TRL's trainer, our optimizer, an explicit reference."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from trimtab.train.guard import GuardedTrainer
from trimtab.train.models import load_model
from trimtab.train.parts import Parts
from trimtab.train.sft import trainer_arguments


class MergingDPOTrainer(GuardedTrainer, DPOTrainer):
    """TRL's DPO trainer with an optimizer built from named parameters; arguments of both."""


def make_trainer(parts: Parts) -> MergingDPOTrainer:
    """Load policy and reference and put the trainer together.

    Without a ``ref_model`` TRL reloads one from the path in the policy's configuration, whatever that is by
    now. Here the reference is always what the recipe names. Under an adapter TRL can do without a second
    model, but what it then compares with is the adapter's start: we let it only where that is the reference.
    """
    policy = load_model(parts.policy, parts.model_settings, trainable=True)
    trainer = MergingDPOTrainer(model=policy, ref_model=_load_reference(parts), **trainer_arguments(parts))
    if parts.arguments.precompute_ref_log_probs:
        trainer.ref_model = None  # its log-probabilities are columns of the data now
    return trainer


def _load_reference(parts: Parts) -> Any:
    adapted = parts.recipe.adapter is not None or parts.policy.is_adapter
    if adapted and parts.reference == parts.policy:
        return None
    assert parts.reference is not None
    reference = load_model(parts.reference, parts.model_settings, trainable=False)
    return reference.eval().requires_grad_(False)
