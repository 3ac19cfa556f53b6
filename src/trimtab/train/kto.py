"""Kahneman-Tversky optimization (arXiv 2402.01306): TRL's trainer, our optimizer, an explicit reference.

With r(x, y) = log(π_θ(y | x) / π_ref(y | x)), a sum over tokens, the loss of an answer is

    λ_D · (1 − σ(β · (r − z)))  if it is desirable,    λ_U · (1 − σ(β · (z − r)))  if it is not,

where z = max(0, mean of r(x_i, y_{i−1}) over the batch) carries no gradient. ``docs/methods.md`` says how the
mismatched answers y_{i−1} are made.
"""

from __future__ import annotations

from trl import KTOTrainer

from trimtab.model_folder import load_model
from trimtab.train.guard import GuardedTrainer
from trimtab.train.parts import Parts
from trimtab.train.reference import load_reference
from trimtab.train.sft import trainer_arguments


class MergingKTOTrainer(GuardedTrainer, KTOTrainer):
    """TRL's KTO trainer with an optimizer built from named parameters; arguments of both."""


def make_trainer(parts: Parts) -> MergingKTOTrainer:
    """Load policy and reference and put the trainer together."""
    reference = load_reference(parts)
    policy = load_model(parts.policy, parts.model_settings, trainable=True)
    trainer = MergingKTOTrainer(model=policy, ref_model=reference, **trainer_arguments(parts))
    if parts.arguments.precompute_ref_log_probs:
        trainer.ref_model = None  # its log-probabilities are columns of the data now
    return trainer
