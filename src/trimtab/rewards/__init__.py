"""Scoring responses: by a reward model, by the likelihood under a language model, by a rule.

A :class:`Reward` takes prompts and responses and gives numbers; :func:`load_reward` makes one of what a
recipe names.
"""

from trimtab.rewards.accuracy import pairwise_accuracy, unequal_pairs
from trimtab.rewards.likelihood import RRHFScorer
from trimtab.rewards.loading import find_rewards, load_reward, load_rewards
from trimtab.rewards.model import RewardModel
from trimtab.rewards.reward import Message, Prompt, Reward, Rows, WeightedSum
from trimtab.rewards.rule import Rule

__all__ = [
    "Message",
    "Prompt",
    "RRHFScorer",
    "Reward",
    "RewardModel",
    "Rows",
    "Rule",
    "WeightedSum",
    "find_rewards",
    "load_reward",
    "load_rewards",
    "pairwise_accuracy",
    "unequal_pairs",
]
