"""Losses as pure functions on tensors: torch alone, no model and no file.

:mod:`~trimtab.losses.log_probabilities` turns hidden states or logits into log P of given tokens without a
float32 copy of the logits; :mod:`~trimtab.losses.rrhf` ranks responses by them;
:mod:`~trimtab.losses.ppo` weighs each token of a sampled response by what it was good for.
"""

from trimtab.losses.log_probabilities import head_log_probabilities, selective_log_softmax
from trimtab.losses.ppo import (
    SurrogateTerms,
    ValueTerms,
    adapted_kl_coefficient,
    clipped_surrogate,
    clipped_value_loss,
    entropy,
    explained_variance,
    generalized_advantages,
    token_rewards,
    whitened,
)
from trimtab.losses.rrhf import RRHFTerms, length_normalized, rrhf_loss, rrhf_terms

__all__ = [
    "RRHFTerms",
    "SurrogateTerms",
    "ValueTerms",
    "adapted_kl_coefficient",
    "clipped_surrogate",
    "clipped_value_loss",
    "entropy",
    "explained_variance",
    "generalized_advantages",
    "head_log_probabilities",
    "length_normalized",
    "rrhf_loss",
    "rrhf_terms",
    "selective_log_softmax",
    "token_rewards",
    "whitened",
]
