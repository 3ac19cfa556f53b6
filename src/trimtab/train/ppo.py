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

from trimtab.recipe import PPOLoss
from trimtab.rewards import load_rewards
from trimtab.train.parts import Parts
from trimtab.train.policy import load_policy
from trimtab.train.ppo_trainer import MergingPPOTrainer
from trimtab.train.reference import frozen_reference


def make_trainer(parts: Parts) -> MergingPPOTrainer:
    """Load rewards, policy and reference and put the trainer together."""
    loss = parts.recipe.loss
    assert isinstance(loss, PPOLoss)
    under_adapter = parts.recipe.adapter is not None and parts.reference == parts.policy
    reward = load_rewards(loss.rewards, key="loss.rewards", device=parts.arguments.device)
    return MergingPPOTrainer(
        load_policy(parts),
        parts.arguments,
        settings=loss,
        reference=None if under_adapter else frozen_reference(parts),
        reward=reward,
        train_dataset=parts.train,
        eval_dataset=parts.held_out,
        processing_class=parts.tokenizer,
        optimizer_plan=parts.plan,
    )
