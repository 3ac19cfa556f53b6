"""Proximal policy optimization (PPO) from a recipe: answer, score, learn.

A **rollout**: the policy answers prompts, a reward scores the answers, every token's reward is what the
penalty for departing from the reference leaves of it, and advantages A and returns G follow from the values
V. Then **epochs** over the rollout in **minibatches**, one optimizer step each, that minimise over the
minibatch's tokens the mean of

    −min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) + c · ½·max((V − G)², (V_clipped − G)²),   ρ = π(y_t) / π_old(y_t)

π is the policy at the temperature that it samples with. :mod:`trimtab.losses.ppo` has every equation with
its source. The values come from a linear head on the policy's last hidden states: a model of their own would
need as much memory again as the policy with its gradients and moments.
"""

from __future__ import annotations

from typing import Any

from trimtab.recipe import PPOLoss
from trimtab.rewards import load_rewards
from trimtab.train.models import load_model
from trimtab.train.parts import Parts
from trimtab.train.policy import load_policy
from trimtab.train.ppo_trainer import MergingPPOTrainer


def make_trainer(parts: Parts) -> MergingPPOTrainer:
    """Load rewards, policy and reference and put the trainer together."""
    loss = parts.recipe.loss
    assert isinstance(loss, PPOLoss)
    reward = load_rewards(loss.rewards, key="loss.rewards", device=parts.arguments.device)
    return MergingPPOTrainer(
        load_policy(parts),
        parts.arguments,
        settings=loss,
        reference=_load_reference(parts),
        reward=reward,
        train_dataset=parts.train,
        eval_dataset=parts.held_out,
        processing_class=parts.tokenizer,
        optimizer_plan=parts.plan,
    )


def _load_reference(parts: Parts) -> Any:
    """The reference, frozen; None where it is the policy without its fresh adapter."""
    assert parts.reference is not None
    if parts.recipe.adapter is not None and parts.reference == parts.policy:
        return None
    reference = load_model(parts.reference, parts.model_settings, trainable=False)
    return reference.eval().requires_grad_(False)
