"""Pure tensor mathematics: masks, sparsifiers, consensus, their combination, presets, rounding. Imports torch
only.

Read in this order: :mod:`~trimtab.ops.masks`, :mod:`~trimtab.ops.sparsify`, :mod:`~trimtab.ops.consensus`,
:mod:`~trimtab.ops.combine` (where they meet), :mod:`~trimtab.ops.presets` (the table of methods).
"""

from trimtab.ops.averaging import move_towards
from trimtab.ops.combine import Operator, combine, combine_parts, merge, sparse_terms
from trimtab.ops.consensus import Consensus, agreeing_terms, consensus
from trimtab.ops.fingerprint import combined_digest, content_hash
from trimtab.ops.masks import DELTA, GRADIENT, ROUNDING, UPDATE, MaskKey, bernoulli_mask, uniform_u32
from trimtab.ops.names import canonical_name
from trimtab.ops.presets import FIDELITIES, PRESETS, Fidelity, Preset
from trimtab.ops.projection import normalized, project_out
from trimtab.ops.rounding import join_master, split_master, stochastic_round
from trimtab.ops.sparsify import Counting, Rescale, Sparsifier, l1_norm, sparsify, top_count, top_mask
from trimtab.ops.threshold import kth_largest

__all__ = [
    "DELTA",
    "FIDELITIES",
    "GRADIENT",
    "PRESETS",
    "ROUNDING",
    "UPDATE",
    "Consensus",
    "Counting",
    "Fidelity",
    "MaskKey",
    "Operator",
    "Preset",
    "Rescale",
    "Sparsifier",
    "agreeing_terms",
    "bernoulli_mask",
    "canonical_name",
    "combine",
    "combine_parts",
    "combined_digest",
    "consensus",
    "content_hash",
    "join_master",
    "kth_largest",
    "l1_norm",
    "merge",
    "move_towards",
    "normalized",
    "project_out",
    "sparse_terms",
    "sparsify",
    "split_master",
    "stochastic_round",
    "top_count",
    "top_mask",
    "uniform_u32",
]
