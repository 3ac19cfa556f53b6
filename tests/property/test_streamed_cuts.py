"""Cuts found in a few passes over pieces, against sorting: several tensors as one, several counts at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.property.strategies import bounded, dtypes, ordinary, tensors, ties, wild
from trimtab.ops import exact_sum
from trimtab.ops.select import Streamed, cuts
from trimtab.ops.sparsify import Cut, kept_by, top_mask

SHAPES = [(0,), (1,), (2,), (7,), (64,), (129,), (3, 5)]


def streamed(x: Tensor, size: int) -> Streamed:
    """The magnitudes of a tensor that comes in pieces of ``size`` entries."""
    flat = x.reshape(-1)
    return Streamed(lambda: iter(torch.split(flat, size)), flat.numel(), x.dtype)


def by_sorting(xs: list[Tensor], k: int) -> list[list[bool]]:
    """Which entries are the k largest of all: NaN above infinity, of equals those that come first."""
    together = [value for x in xs for value in x.to(torch.float64).reshape(-1).tolist()]
    ranked = sorted(
        range(len(together)),
        key=lambda i: (not math.isnan(together[i]), 0.0 if math.isnan(together[i]) else -abs(together[i]), i),
    )
    kept = np.zeros(len(together), dtype=bool)
    kept[ranked[:k]] = True
    bounds = np.cumsum([x.numel() for x in xs])[:-1]
    return [part.tolist() for part in np.split(kept, bounds)]


def kept(xs: list[Tensor], found: list[Cut]) -> list[list[bool]]:
    return [kept_by(cut, x.reshape(-1)).to(torch.bool).tolist() for cut, x in zip(found, xs, strict=True)]


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Tensor], list[int], int]:
    dtype = draw(dtypes)
    content = draw(st.sampled_from([ties, ordinary, wild]))
    xs = [
        draw(tensors(shape=draw(st.sampled_from(SHAPES)), dtype=dtype, content=content))
        for _ in range(draw(st.integers(1, 4)))
    ]
    if not any(x.numel() for x in xs):
        xs.append(torch.ones(3, dtype=dtype))
    total = sum(x.numel() for x in xs)
    counts = draw(st.lists(st.integers(1, total), min_size=1, max_size=4))
    return xs, counts, draw(st.sampled_from([1, 2, 5, 1000]))


@bounded(250)
@given(drawn=groups())
def test_cuts_keep_what_sorting_keeps(drawn: tuple[list[Tensor], list[int], int]) -> None:
    xs, counts, size = drawn
    found = cuts([streamed(x, size) for x in xs], counts)
    assert len(found) == len(counts)
    for k, one in zip(counts, found, strict=True):
        assert kept(xs, one) == by_sorting(xs, k)
        assert sum(map(sum, kept(xs, one))) == k


@bounded(60)
@given(drawn=groups())
def test_one_count_at_a_time_gives_the_same(drawn: tuple[list[Tensor], list[int], int]) -> None:
    xs, counts, size = drawn
    together = cuts([streamed(x, size) for x in xs], counts)
    assert together == [cuts([streamed(x, size) for x in xs], [k])[0] for k in counts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, math.inf, math.nan])
def test_where_all_are_tied_the_first_ones_stay(dtype: torch.dtype, value: float) -> None:
    xs = [torch.full((count,), value, dtype=dtype) for count in (3, 0, 4, 5)]
    for k in range(1, 13):
        (found,) = cuts([streamed(x, 2) for x in xs], [k])
        assert [sum(part) for part in kept(xs, found)] == [min(3, k), 0, min(4, max(0, k - 3)), max(0, k - 7)]
        assert kept(xs, found) == by_sorting(xs, k)


def test_more_entries_than_are_counted_at_a_time() -> None:
    count = exact_sum.chunks(torch.empty(1 << 20))[0].numel() * 2 + 77
    x = (torch.randn(count, generator=torch.Generator().manual_seed(3)) * 64).round() / 64
    for k in (1, count // 3, count - 1):
        ((cut,),) = cuts([streamed(x, count)], [k])
        ((same,),) = cuts([streamed(x, 65_537)], [k])
        assert cut == same
        assert torch.equal(kept_by(cut, x).to(torch.bool), top_mask(x, k))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_counts_out_of_range_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="of 3 entries"):
        cuts([streamed(torch.ones(3), 1)], [k])


def test_the_magnitudes_are_gone_through_a_few_times_and_not_once_for_each_count() -> None:
    x, passes = torch.randn(100, generator=torch.Generator().manual_seed(0)), 0

    def pieces() -> list[Tensor]:
        nonlocal passes
        passes += 1
        return list(torch.split(x, 10))

    cuts([Streamed(pieces, 100, x.dtype)], list(range(1, 100)))
    assert passes == 3  # one for each digit of a magnitude in fp32; no two entries are tied
