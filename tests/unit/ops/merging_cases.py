"""What the tests of offline merging in C share: numbers, thinnings, both ways to compile the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops.kernels import build, merge_structs
from trimtab.ops.masks import MaskKey
from trimtab.ops.sparsify import Cut, Thinning, top_cut

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 15, 16, 17, 1000]
LOWS = [0, 5, (1 << 32) - 500, (1 << 33) + 7]
NUMBERS = [1.0, 0.5, 0.3, -0.7, 0.0, 1.7]
RATES = [0.3, 0.5, 0.123, 1e-6, 1 - 1e-12]
VECTORS = pytest.mark.parametrize("vectors", ["native", "generic"])
SOME = settings(max_examples=100, deadline=None)


@cache
def generic() -> ctypes.CDLL:
    """The kernels as they are compiled where there is no AVX-512."""
    found = ctypes.CDLL(str(build.library(["TRIMTAB_GENERIC=1"])))
    merge_structs.declare(found)
    return found


@contextmanager
def compiled(vectors: str) -> Iterator[None]:
    kept = merge_structs.kernels
    if vectors == "generic":
        merge_structs.kernels = lambda: (generic(), None)  # type: ignore[assignment]
    try:
        yield
    finally:
        merge_structs.kernels = kept


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of bits, −0 and +0 apart; one NaN is as good as another."""
    if one.dtype != other.dtype or not torch.equal(one.isnan(), other.isnan()):
        return False
    one, other = one[~one.isnan()], other[~other.isnan()]
    words = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(words), other.view(words))


def numbers(seed: int, count: int, dtype: torch.dtype) -> Tensor:
    """Ordinary numbers, equal ones, −0, denormal ones; at an odd address."""
    source = torch.Generator().manual_seed(seed)

    def share(of: float) -> Tensor:
        return torch.rand(count, generator=source) < of

    x = torch.randn(count, generator=source)
    x = torch.where(share(0.2), (x * 4).round() / 4, x)
    x = torch.where(share(0.1), x * 1e-39, x)
    x = torch.where(share(0.1), torch.tensor(-0.0), x).to(dtype)
    room = np.empty(count * x.element_size() + 1, np.uint8)
    room[1:] = x.view(torch.uint8).numpy()
    with np.errstate(all="ignore"):
        return torch.frombuffer(memoryview(room), dtype=dtype, offset=1, count=count) if count else x


def reader(x: Tensor, first: int = 0) -> Callable[[int, int], Tensor]:
    return lambda low, high: x[low - first : high - first]


@st.composite
def thinnings(draw: st.DrawFn, place: int, delta: Tensor, low: int, total: int) -> Thinning:
    factor = draw(st.sampled_from([1.0, 1 / 0.3, 1.7, 0.0]))
    kind = draw(st.sampled_from(["all", "drawn", "cut"])) if delta.numel() else "all"
    if kind == "all":
        return Thinning(factor=factor)
    if kind == "drawn":
        key = MaskKey(7, draw(st.sampled_from([place, 2 * place + 1, 0])), place // 3, "w")
        return Thinning(draw(st.sampled_from(RATES)), key=key, factor=factor)
    cut = top_cut(delta, draw(st.integers(0, delta.numel())))
    index = total if cut.index >= delta.numel() else low + cut.index
    return Thinning(0.3, cut=Cut(cut.bits, index), factor=factor)
