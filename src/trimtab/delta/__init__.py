"""The reference delta: what fine-tuning did to each parameter, streamed from folders or taken from modules.

Read in this order: :mod:`~trimtab.delta.reference_delta` (what users see),
:mod:`~trimtab.delta.difference` (the subtraction), :mod:`~trimtab.delta.models` and
:mod:`~trimtab.delta.layout` (where values come from), :mod:`~trimtab.delta.record` and
:mod:`~trimtab.delta.storage` (what is kept).
"""

from trimtab.delta.record import DeltaRecord, ModelIdentity, TensorRecord, TensorStatistics
from trimtab.delta.reference_delta import ReferenceDelta

__all__ = ["DeltaRecord", "ModelIdentity", "ReferenceDelta", "TensorRecord", "TensorStatistics"]
