"""Direct preference optimization (arXiv 2305.18290): TRL's trainer, our optimizer, an explicit reference."""

from __future__ import annotations

from trl import DPOTrainer

from trimtab.model_folder import load_model
from trimtab.train.guard import GuardedTrainer
from trimtab.train.parts import Parts
from trimtab.train.reference import load_reference
from trimtab.train.sft import trainer_arguments


class MergingDPOTrainer(GuardedTrainer, DPOTrainer):
    """TRL's DPO trainer with an optimizer built from named parameters; arguments of both."""


def make_trainer(parts: Parts) -> MergingDPOTrainer:
    """Load policy and reference and put the trainer together."""
    reference = load_reference(parts)
    policy = load_model(parts.policy, parts.model_settings, trainable=True)
    trainer = MergingDPOTrainer(model=policy, ref_model=reference, **trainer_arguments(parts))
    if parts.arguments.precompute_ref_log_probs:
        trainer.ref_model = None  # its log-probabilities are columns of the data now
    return trainer
