"""Losses as pure functions on tensors: torch alone, no model and no file.

:mod:`~trimtab.losses.log_probabilities` turns hidden states or logits into log P of given tokens without a
float32 copy of the logits.
"""

from trimtab.losses.log_probabilities import head_log_probabilities, selective_log_softmax

__all__ = ["head_log_probabilities", "selective_log_softmax"]
