"""What the GPU kernels find in the tables that the host writes for them: one row of 8-byte words for each job
and one for each piece of a layout. No triton here: the host's side and the kernels both read these names.
"""

from __future__ import annotations

ADDRESSES = (
    "param",
    "residual",
    "first",
    "second",
    "greatest",
    "grad",
    "anchor",
    "tau",
    "scales",
    "update",
    "clock",
    "rate",
)
"""Addresses of tensors; 0 where there is none. ``scales`` is the bitmap of a sparse τ; ``clock`` and ``rate``
are the device's step count and learning rate."""

INTEGERS = ("step", "threshold", "cut_bits", "cut_index", "tau_bits", "tau_index")
"""The step of the masks' keys, round(p·2^32), and where top cuts Δ and τ."""

SINGLES = (
    "update_weight",
    "tau_weight",
    "update_factor",
    "tau_factor",
    "decay",
    "decay_after",
    "anchor_decay",
    "sign",
    "blend",
    "light",
    "beta2",
    "fresh",
    "size",
    "root",
    "eps",
)
"""fp32 in the word's low half. ``sign`` is −1 to maximize. lerp: ``blend`` times g − m, added to m (``light``
is 1) or to g. ``fresh`` = 1 − β₂, ``size`` = −lr/(1 − β₁ᵗ), ``root`` = √(1 − β₂ᵗ)."""

DOUBLES = (
    "decay_64",
    "decay_after_64",
    "anchor_decay_64",
    "beta1_64",
    "beta2_64",
    "decay_rate_64",
    "decay_after_rate_64",
)
"""fp64: factors of fp64 masters, and what a device's step count needs: β₁, β₂, λ of decay before or after."""

COLUMNS = ADDRESSES + INTEGERS + SINGLES + DOUBLES
WIDTH = len(COLUMNS)
"""Words of a job's row."""

PIECE = (
    "first",
    "count",
    "base",
    "run",
    "stride",
    "high",
    "scale_shift",
    "mask_coarse",
    "mask_fine",
    "moment_coarse",
    "rounding_coarse",
    "rounding_fine",
)
"""A piece of a layout: local entry ``first + j``, j < ``count``, has the global index ``high``·2^32 +
(``base`` + j // ``run`` · ``stride`` + j % ``run``). ``scale_shift``: what the number of an entry's block
within its 2^32 indices lacks to be its place among the scales of an int8 τ. Then lanes of the keys of three
pairs of streams."""

OWNER = ("job", "piece", "block", "extra")
"""int32, one row for each program: what it works on. ``extra``: how many entries of a sparse τ lie before its
first one; where top searches, the number of the search."""

SEARCH = ("job", "total", "count", "capacity", "offset", "upper", "lower", "samples")
"""int64, one row for each tensor in which top searches: its job, size n, k, room in the list of candidates
and where that begins; the ranks in the sample between which the k-th largest entry lies almost surely; the
sample's size."""

STATE = ("above", "listed", "low", "high", "shift", "need", "found", "short", "todo")
"""int32, one row for each search: how many entries lie above the bracket ``low … high``, how many in it; bins
of 2^``shift`` values. Then, of the bin that the threshold is in: its ``low``; which of its entries, from the
largest on, is the last one kept; how many there are; how many have been gathered; and what is left to do."""


def column(name: str) -> int:
    """Place of a column in a job's row."""
    return COLUMNS.index(name)
