"""Losses as pure functions on tensors: torch alone, no model and no file.

:mod:`~trimtab.losses.log_probabilities` turns hidden states or logits into log P of given tokens without a
float32 copy of the logits; :mod:`~trimtab.losses.rrhf` ranks responses by them.
"""

from trimtab.losses.log_probabilities import head_log_probabilities, selective_log_softmax
from trimtab.losses.rrhf import RRHFTerms, length_normalized, rrhf_loss, rrhf_terms

__all__ = [
    "RRHFTerms",
    "head_log_probabilities",
    "length_normalized",
    "rrhf_loss",
    "rrhf_terms",
    "selective_log_softmax",
]
