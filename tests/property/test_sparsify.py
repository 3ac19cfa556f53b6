"""F(x; p): which entries survive, exactly how many, and what the survivors become."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import reference as oracle
from tests.property.strategies import (
    DTYPES,
    as_float64,
    bounded,
    dtypes,
    rates,
    same_bits,
    same_values,
    tensors,
    within,
)
from trimtab.ops import MaskKey, bernoulli_mask, sparsify, top_count, top_mask
from trimtab.ops.sparsify import l1_norm

KEY = MaskKey(seed=3, stream=0, step=5, name="layers.0.weight")


@bounded(300)
@given(n=st.integers(0, 10**13), p=rates)
def test_top_count_is_exact(n: int, p: float) -> None:
    assert top_count(n, p) == oracle.top_count(n, p)
    assert top_count(n, p, "floor") == oracle.released_top_count(n, p)


@pytest.mark.parametrize("p", [np.float64(0.07), np.float32(0.5), 1])
def test_top_count_takes_the_numbers_a_schedule_may_return(p: float) -> None:
    assert top_count(100, p) == {0.07: 7, 0.5: 50, 1.0: 100}[round(float(p), 6)]


@bounded(300)
@given(x=tensors(), data=st.data())
def test_top_mask_keeps_exactly_the_k_that_the_oracle_keeps(x: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, x.numel()))
    kept = top_mask(x, k)
    assert kept.shape == x.shape
    assert kept.dtype == torch.bool
    assert int(kept.sum()) == k
    assert kept.reshape(-1).tolist() == oracle.top_mask(as_float64(x), k)


SPECIAL_BITS = [0x7F80, 0xFF80, 0x7F81, 0xFFC1, 0x7FFF, 0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x0001, 0x8000, 0]


@bounded(200)
@given(
    bits=st.lists(st.integers(0, 2**16 - 1) | st.sampled_from(SPECIAL_BITS), min_size=1, max_size=60),
    half=st.booleans(),
    data=st.data(),
)
def test_top_mask_orders_every_bit_pattern(bits: list[int], half: bool, data: st.DataObject) -> None:
    dtype = torch.float16 if half else torch.bfloat16
    x = torch.tensor([b - 2**16 if b >= 2**15 else b for b in bits], dtype=torch.int16).view(dtype)
    k = data.draw(st.integers(0, len(bits)))
    assert top_mask(x, k).tolist() == oracle.top_mask(as_float64(x), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_row_major_index_whatever_the_strides(dtype: torch.dtype) -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]], dtype=dtype)
    for x in (signs, signs.t().contiguous().t(), torch.ones(1, dtype=dtype).expand(2, 3)):
        assert top_mask(x, 4).tolist() == [[True, True, True], [True, False, False]]


def test_a_large_tensor_of_ties_keeps_exactly_k() -> None:
    x = torch.ones(300_001)
    x[::2] = -1
    x[200_000] = 2
    kept = top_mask(x, 12_345)
    assert int(kept.sum()) == 12_345
    assert kept[:12_344].all()
    assert kept[200_000]


@bounded(250)
@given(x=tensors(), p=rates, rescale=st.sampled_from(["none", "l1"]))
def test_top_follows_the_oracle(x: Tensor, p: float, rescale: str) -> None:
    before = x.clone()
    result = sparsify(x, "top", p, rescale=rescale)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    k = oracle.top_count(x.numel(), p)
    kept = oracle.top_mask(as_float64(x), k) if p != 1 else None
    expected = oracle.sparsify(as_float64(x), p, kept, rescale)
    if rescale == "none":
        assert same_values(result, torch.from_numpy(np.asarray(expected)).reshape(x.shape).to(x.dtype))
    else:
        within(result, expected, units=2)
    assert same_bits(x, before), "the input was changed"


@bounded(250)
@given(x=tensors(), p=rates, rescale=st.sampled_from(["none", "expected", "l1"]))
def test_bernoulli_follows_the_oracle_given_the_mask(x: Tensor, p: float, rescale: str) -> None:
    before = x.clone()
    result = sparsify(x, "bernoulli", p, rescale=rescale, key=KEY)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    kept = bernoulli_mask(x.shape, p, KEY)
    expected = oracle.sparsify(as_float64(x), p, kept.reshape(-1).tolist(), rescale)
    within(result, expected, units=2)
    assert bool((result[~kept] == 0).all()), "a dropped entry is not exactly 0"
    assert same_bits(x, before), "the input was changed"


@bounded(100)
@given(x=tensors(), p=rates)
def test_dropped_nan_and_infinity_are_zero_and_kept_ones_stay(x: Tensor, p: float) -> None:
    poisoned = torch.full(x.shape, math.nan, dtype=x.dtype)
    for kind in ("bernoulli", "top"):
        result = sparsify(poisoned, kind, p, key=KEY)
        kept = bernoulli_mask(x.shape, p, KEY).sum() if kind == "bernoulli" else top_count(x.numel(), p)
        assert int(result.isnan().sum()) == int(kept)
        assert int((result == 0).sum()) == x.numel() - int(kept)


@bounded(100)
@given(x=tensors(), p=rates, rescale=st.sampled_from(["none", "expected", "l1"]))
def test_identity_keeps_every_bit(x: Tensor, p: float, rescale: str) -> None:
    assert same_bits(sparsify(x, "none", p, rescale="none" if rescale == "expected" else rescale), x)
    assert same_bits(sparsify(x, "bernoulli", 1.0, rescale=rescale, key=KEY), x)
    assert same_bits(sparsify(x, "top", 1.0, rescale="none" if rescale == "expected" else rescale), x)


@bounded(100)
@given(x=tensors(), p=rates, kind=st.sampled_from(["bernoulli", "top"]))
def test_memory_layout_does_not_matter(x: Tensor, p: float, kind: str) -> None:
    strided = sparsify(x, kind, p, rescale="l1", key=KEY)
    assert same_values(
        strided, sparsify(x.clone(memory_format=torch.contiguous_format), kind, p, rescale="l1", key=KEY)
    )


@bounded(100)
@given(x=tensors(), p=rates)
def test_a_count_computed_before_gives_the_same(x: Tensor, p: float) -> None:
    given_count = sparsify(x, "top", p, count=top_count(x.numel(), p))
    assert same_bits(given_count, sparsify(x, "top", p))


@bounded(60)
@given(dtype=dtypes, p=st.sampled_from([0.5, 0.07, 1e-3]))
def test_released_counting_is_dense_where_it_truncates_to_zero(dtype: torch.dtype, p: float) -> None:
    for n in (1, 2, 13, 100, 999):
        x = torch.arange(1, n + 1).to(dtype)
        kept = int((sparsify(x, "top", p, counting="floor") != 0).sum())
        assert kept == (int(p * n) or n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [[], [0.0, 0.0, 0.0], [math.inf, 1.0, 2.0], [math.nan, 1.0, 2.0]])
def test_l1_factor_is_one_where_a_sum_is_zero_or_not_finite(dtype: torch.dtype, values: list[float]) -> None:
    x = torch.tensor(values, dtype=dtype)
    assert same_bits(sparsify(x, "top", 0.4, rescale="l1"), sparsify(x, "top", 0.4))
    # all that is kept is 0, though the whole is not
    zero_kept = torch.tensor([0.0, 3.0, 0.0], dtype=dtype)
    assert same_bits(sparsify(zero_kept, "top", 0.4, rescale="l1", count=0), torch.zeros(3, dtype=dtype))


def test_l1_restores_the_norm() -> None:
    x = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
    for kind in ("bernoulli", "top"):
        result = sparsify(x, kind, 0.07, rescale="l1", key=KEY)
        assert l1_norm(result) == pytest.approx(math.fsum(abs(v) for v in x.tolist()), rel=1e-6)


@bounded(60)
@given(x=tensors(content=st.floats(-4.0, 4.0, width=16)))
def test_l1_norm_is_the_sum_of_magnitudes(x: Tensor) -> None:
    assert l1_norm(x) == pytest.approx(math.fsum(abs(v) for v in oracle.flat(as_float64(x))), rel=1e-14)


def test_l1_norm_does_not_overflow_in_half_precision() -> None:
    x = torch.full((5000,), 60000.0, dtype=torch.float16)
    assert l1_norm(x) == 3e8
    # kept entries whose rescaled value fits are finite, though both sums exceed fp16's range
    small = torch.full((70_000,), 2.0, dtype=torch.float16)
    result = sparsify(small, "top", 0.5, rescale="l1")
    assert result[:35_000].eq(4).all()


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bernoulli", "top"])
def test_impossible_reserve_rates_are_refused(p: float, kind: str) -> None:
    with pytest.raises(ValueError, match="reserve_rate"):
        sparsify(torch.ones(4), kind, p, key=KEY)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError):
        sparsify(torch.ones(4), "bernouli", 0.5, key=KEY)
    with pytest.raises(ValueError):
        sparsify(torch.ones(4), "top", 0.5, rescale="expected")
    with pytest.raises((ValueError, AssertionError)):
        sparsify(torch.ones(4), "bernoulli", 0.5)
