"""RRHF (arXiv 2304.05302) from a recipe: ranked responses, our trainer on transformers', our optimizer.

With p_i = Σ_t log P(y_i,t | x, y_i,<t) / ‖y_i‖^γ for the responses y_i to a prompt x, whose scores are r_i,

    L = w · Σ_{r_i < r_j} max(0, p_i − p_j + margin) − Σ_t log P(y_best,t | x, y_best,<t)

and the mean over the global batch's prompts is minimised.
"""

from __future__ import annotations

from trimtab.recipe import RRHFLoss
from trimtab.train.parts import Parts
from trimtab.train.policy import load_policy
from trimtab.train.rrhf_trainer import MergingRRHFTrainer, RRHFSettings


def make_trainer(parts: Parts) -> MergingRRHFTrainer:
    """Load the policy and put the trainer together."""
    loss = parts.recipe.loss
    assert isinstance(loss, RRHFLoss)
    return MergingRRHFTrainer(
        load_policy(parts),
        parts.arguments,
        settings=RRHFSettings(**loss.model_dump()),
        train_dataset=parts.train,
        eval_dataset=parts.held_out,
        processing_class=parts.tokenizer,
        optimizer_plan=parts.plan,
    )
