"""The loss section of each method: what may be written, what it means, and its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimtab.recipe.reward_source import RewardSources
from trimtab.recipe.section import Section
from trimtab.recipe.values import (
    Flag,
    NonNegative,
    NonNegativeCount,
    Positive,
    PositiveCount,
    PositiveShare,
    Share,
)


class SFTLoss(Section):
    """Supervised fine-tuning: the mean negative log-likelihood per token."""

    completion_only: Flag | None = None
    """Loss on the answers only; null: yes where prompt and completion are apart, as TRL does."""
    packing: Flag = False
    """Put several examples into one row of max_length tokens."""


class DPOLoss(Section):
    """Direct preference optimization (arXiv 2305.18290) and its relatives, as TRL computes them."""

    type: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sigmoid_norm",
    ] = "sigmoid"
    """The loss on the difference of rewards; sigmoid is the paper's."""
    beta: Positive = 0.1
    """Strength of the pull to the reference (for ipo: the target margin is 1 / (2 beta))."""
    label_smoothing: Annotated[NonNegative, Field(lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round."""
    sft_weight: NonNegative = 0.0
    """How much of the chosen answers' negative log-likelihood is added (RPO's alpha)."""


class IPOLoss(Section):
    """Identity preference optimization (arXiv 2310.12036), as TRL computes it: with means over tokens."""

    beta: Positive = 0.1
    """tau of the paper: the margin between two answers, in log-ratio per token, is to become 1 / (2 beta)."""
    sft_weight: NonNegative = 0.0
    """How much of the chosen answers' negative log-likelihood is added (RPO's alpha)."""


class KTOLoss(Section):
    """Kahneman-Tversky optimization (arXiv 2402.01306): each answer by itself, desirable or not."""

    beta: Positive = 0.1
    """How fast the value of an answer saturates with its log-ratio, and the pull to the reference."""
    desirable_weight: Positive = 1.0
    """lambda_D: weight of the losses of desirable answers."""
    undesirable_weight: Positive = 1.0
    """lambda_U: weight of the losses of undesirable answers."""


class RewardLoss(Section):
    """A reward model of pairs (Bradley and Terry): -log sigma(r(chosen) - r(rejected))."""

    center_rewards: NonNegative = 0.0
    """How much of (r(chosen) + r(rejected))^2 is added, which keeps rewards around 0 (arXiv 2312.09244)."""


class RRHFLoss(Section):
    """Rank responses by their log-probability (RRHF, arXiv 2304.05302): w * L_rank + L_ft."""

    rank_weight: NonNegative = 1.0
    """w: weight of the ranking beside the best response's log-likelihood."""
    length_exponent: NonNegative = 1.0
    """gamma of p = sum of log-probabilities / length^gamma; 1 in the paper, 0 leaves the sum."""
    margin: NonNegative = 0.0
    """By how much a better response should lead, in units of p; 0 in the paper."""
    ft_normalization: Literal["sum", "token_mean"] = "sum"
    """L_ft averaged over prompts (sum: the paper's), or over the best responses' tokens."""
    layout: Literal["shared_prefix", "repeated"] = "shared_prefix"
    """Read each prompt once for all its responses, or once for each (which every model can)."""


class SampledLoss(Section):
    """What the methods share that let the policy answer prompts and learn from the rewards of its answers."""

    rewards: RewardSources
    """What scores the responses: a reward source or a list of them, whose weighted scores are added up."""
    max_new_tokens: PositiveCount = 256
    """Longest response in tokens; data.max_length less this is left for the prompt."""
    temperature: Positive = 1.0
    """Logits are divided by this, when sampling and in the log-probabilities that are learned from."""
    top_p: PositiveShare = 1.0
    """Sample among the likeliest tokens that together have this probability; 1: among all."""
    top_k: NonNegativeCount = 0
    """Sample among this many likeliest tokens; 0: among all."""
    beta: NonNegative
    """Coefficient of the KL divergence from the reference."""


class PPOLoss(SampledLoss):
    """Proximal policy optimization (arXiv 1707.06347) with a value head on the policy."""

    beta: NonNegative = 0.05
    """Coefficient of every token's penalty for leaving the reference; with kl_target, where it starts."""
    kl_target: Positive | None = None
    """Divergence from the reference, in nats a response, that beta is adapted to; null: beta stays."""
    kl_gain: Annotated[Positive, Field(lt=5)] = 0.1
    """How fast beta is adapted: by at most a fifth of this share a rollout; 0.1 in arXiv 1909.08593."""
    minibatches: PositiveCount = 1
    """Optimizer steps in one pass over a rollout, which has as many prompts as these steps need."""
    epochs: PositiveCount = 4
    """Passes over each rollout."""
    clip: Annotated[Positive, Field(lt=1)] = 0.2
    """epsilon: how far the ratio of new to old probabilities may pay off."""
    value_clip: Positive = 0.2
    """The same for values, in units of the reward."""
    value_coefficient: NonNegative = 0.1
    """Weight of the values' squared error in the loss."""
    discount: Share = 1.0
    """gamma: what a reward one token later is worth."""
    trace: Share = 0.95
    """lambda of generalized advantage estimation."""
    missing_eos_penalty: NonNegative | None = None
    """Taken off the reward of responses that max_new_tokens cut off; null: nothing is."""
    generation_batch_size: PositiveCount = 16
    """Responses that each process generates at once."""


class GRPOLoss(SampledLoss):
    """Group relative policy optimization (arXiv 2402.03300), as TRL computes it."""

    beta: NonNegative = 0.04
    """Coefficient of the KL divergence from the reference; 0.04 in the paper, 0: no reference is loaded."""
    num_generations: Annotated[PositiveCount, Field(ge=2)] = 8
    """G: responses to each prompt, among which advantages are taken."""
    num_iterations: PositiveCount = 1
    """mu: passes over each batch of responses."""
    epsilon: Annotated[Positive, Field(lt=1)] = 0.2
    """Clip range of the probability ratio, downwards; upwards too unless epsilon_high is given."""
    epsilon_high: Positive | None = None
    """Clip range upwards, where it is another."""
    type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """What sums over tokens are divided by: a response's length (grpo: the paper's) or one number for all."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: the group's (the paper's), the batch's, or none."""


class RLOOLoss(SampledLoss):
    """REINFORCE leave-one-out (arXiv 2402.14740), as TRL computes it."""

    beta: NonNegative = 0.05
    """Coefficient of the KL divergence from the reference, which is taken off the reward."""
    num_generations: Annotated[PositiveCount, Field(ge=2)] = 2
    """k: responses to each prompt; the mean reward of the others is the baseline of each."""
    num_iterations: PositiveCount = 1
    """Passes over each batch of responses."""
    epsilon: Annotated[Positive, Field(lt=1)] = 0.2
    """Clip range of a response's probability ratio, which matters from the second pass on."""
    normalize_advantages: Flag = False
    """Give advantages mean 0 and standard deviation 1 within the batch."""
