"""What the kernels of offline merging are given: C structs, and the library in this process."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch

from trimtab.ops.kernels.loaded import load
from trimtab.ops.sparsify import Thinning

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that the kernels know, as C has them."""
NAN_MAGNITUDE = 0x7F800001
"""The magnitude of every NaN as the kernels rank it: one above infinity's, in fp32's bits."""

WORD = 1 << 32
"""Masks are drawn from the indices' lower halves: a call keeps to one side of each multiple."""
_KEEPS_ALL, _KEEPS_ABOVE, _KEEPS_DRAWN = 0, 1, 2

_TERM = ("source", "kind", "keeps", "least", "ties", "threshold", "odd", "shares")
_MERGE = ("count", "n", "base", "out_kind", "anchor_kind", "kind", "consensus", "normalize")
_RANKED = (
    *("anchor", "model", "anchor_kind", "model_kind", "kind", "n"),
    *("low", "high", "above", "at_high", "at_low", "found", "list", "lines"),
    *("counts", "prefixes", "prefix_count", "width", "below", "term", "base", "sums"),
)


class CTerm(ctypes.Structure):
    """A model's part as C reads it (``Term`` in merge.h)."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _TERM),
        ("keys", ctypes.c_int64 * 4),
        ("factor", ctypes.c_double),
        ("weight", ctypes.c_double),
    )


class CMerge(ctypes.Structure):
    """A merge of a range as C reads it (``Merge`` in merge.h)."""

    _fields_ = (
        ("out", ctypes.c_int64),
        ("anchor", ctypes.c_int64),
        ("terms", ctypes.POINTER(CTerm)),
        *((name, ctypes.c_int64) for name in _MERGE),
        ("scale", ctypes.c_double),
        ("inputs", ctypes.c_int64),
        ("output", ctypes.c_int64),
    )


class CRanked(ctypes.Structure):
    """A model's range to be counted as C reads it (``Ranked`` in rank.h)."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _RANKED)


def fill_term(
    term: CTerm,
    how: Thinning,
    low: int,
    count: int,
    total: int,
    dtype: torch.dtype,
    held: list[tuple[int, ...]],
) -> None:
    """Write what F does to the entries ``low … low + count − 1`` of a tensor, all on one side of each 2^32.

    Args:
        term: where to.
        how: what F does.
        low: where the range begins.
        count: its entries.
        total: entries of the whole tensor.
        dtype: of the arithmetic.
        held: keys of the terms before; this one's are appended.
    """
    words: tuple[int, ...] = ()
    term.keeps, term.factor = _KEEPS_ALL, how.factor
    if how.cut is not None:
        term.keeps, term.least = _KEEPS_ABOVE, in_single(how.cut.bits, dtype)
        last = how.cut.index - low
        term.ties = -1 if how.cut.index >= total or last >= count else max(last, 0)
    elif how.key is not None:
        term.threshold = round(how.rate * WORD)
        if term.threshold < WORD:
            words = how.key.words(low // WORD)
            term.keeps, term.odd = _KEEPS_DRAWN, how.key.stream % 2
            term.keys[:] = words
            term.shares = held.index(words) if words in held else len(held)
    held.append(words)


def in_single(magnitude: int, dtype: torch.dtype) -> int:
    """The bits of a magnitude of ``dtype`` as fp32 has them, :data:`NAN_MAGNITUDE` for every NaN."""
    if dtype == torch.bfloat16:
        magnitude <<= 16
    elif dtype == torch.float16 and magnitude <= 0x7C00:
        magnitude = int(np.array(magnitude, np.uint16).view(np.float16).astype(np.float32).view(np.uint32))
    elif dtype == torch.float16:
        return NAN_MAGNITUDE
    return min(magnitude, NAN_MAGNITUDE)


# -- the library


def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        RuntimeError: they are not :func:`available`.
    """
    found, why = kernels()
    if found is None:
        raise RuntimeError(why)
    return found


@cache
def kernels() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found, why = load()
    if found is None:
        return None, why
    declare(found)
    if [found.trimtab_merge_size(i) for i in range(3)] != list(map(ctypes.sizeof, (CTerm, CMerge, CRanked))):
        return None, "the compiled CPU kernels lay out their structs in an unexpected way"
    return found, None


_FUNCTIONS = {
    "trimtab_merge": None,
    "trimtab_sum": None,
    "trimtab_survey": None,
    "trimtab_place": ctypes.c_int64,
    "trimtab_histogram": ctypes.c_int64,
    "trimtab_l1": None,
}
"""What the library offers beside sizes, with what it returns."""


def declare(found: ctypes.CDLL) -> None:
    """Say what the library's functions take and return."""
    for name, result in _FUNCTIONS.items():
        function: Any = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_void_p], result
    for name in ("trimtab_merge_size", "trimtab_size"):
        function = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64


@cache
def has_half() -> bool:
    """Whether the kernels know fp16 on this processor."""
    return bool(library().trimtab_size(4))
