"""Formats of τ: what is exact is exact bit for bit, what is rounded keeps its bound, shards are the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.ops.formats import (
    INT8_BLOCK,
    SPARSE_BLOCK,
    DenseTau,
    Int8Tau,
    SparseTau,
    block_cover,
    hold_dense,
    hold_int8,
    hold_sparse,
)
from trimtab.ops.kernels.job import Tau
from trimtab.ops.layout import Layout

SHAPES = [
    (),
    (0,),
    (1,),
    (5, 0),
    (1000,),
    (7, 300),
    (6, 256),
    (300, 1),
    (4, 5, 130),
    (3, 4, 256),
    (2, 3, 4, 40),
]


def random_values(shape, seed=0, dtype=torch.float32, exponents=12):
    """Normal numbers whose magnitudes differ by orders, so that blocks have scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape, generator=generator, dtype=torch.float64) * -exponents
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * size.exp2()).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))


def pieces(shape):
    """Layouts of whole tensors, rows, columns, inner rectangles, and empty parts."""
    cuts = [sorted({(0, n), (0, n // 2), (n // 2, n - n // 2), (n // 3, n // 3), (n // 2, 0)}) for n in shape]
    for cut in itertools.product(*cuts):
        yield Layout(shape, tuple(at for at, _ in cut), tuple(size for _, size in cut))


def naive_int8(x: np.ndarray) -> np.ndarray:
    """Block-wise absmax quantisation entry by entry, in float64."""
    flat, out = x.reshape(-1), []
    for i, value in enumerate(flat):
        first = i // INT8_BLOCK * INT8_BLOCK
        scale = np.float32(np.abs(flat[first : first + INT8_BLOCK]).max() / np.float32(127))
        code = np.rint(float(value) / float(scale)) if scale > 0 else 0.0
        out.append(np.float32(np.float32(code) * scale))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_holds_every_bit(shape, dtype):
    x = random_values(shape, dtype=dtype)
    tau = hold_dense(x, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert same_bits(tau.dense(0, x.numel()), x.reshape(-1).to(wide))
    assert tau.nbytes == x.numel() * dtype.itemsize
    assert not tau.masked


def test_dense_bf16_is_within_its_bound_and_takes_half():
    x = random_values((70_000,))
    tau = hold_dense(x, torch.bfloat16, masked=True)
    error = (tau.dense(0, 70_000) - x).abs()
    assert bool((error <= x.abs() * 2.0**-8).all())
    assert float((error / x.abs()).max()) > 2.0**-9  # the bound is not a loose one
    assert tau.nbytes == 2 * 70_000
    assert tau.masked


def test_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match="float16"):
        hold_dense(torch.zeros(3), torch.float16)
    with pytest.raises(ValueError, match="float16"):
        hold_sparse(torch.zeros(3), torch.float16)


# -- int8


@pytest.mark.parametrize("shape", [(1000,), (7, 300), (4, 5, 130), ()], ids=str)
def test_int8_is_the_naive_quantisation(shape):
    x = random_values(shape)
    tau = hold_int8(x)
    assert np.array_equal(tau.dense(0, x.numel()).numpy(), naive_int8(x.numpy()))
    assert tau.codes.dtype == torch.int8
    assert tau.scales.numel() == -(-x.numel() // INT8_BLOCK)


@given(
    n=st.integers(1, 700),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-149, 100),
    wide=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_int8_error_is_within_half_a_code_and_an_ulp(n, seed, exponent, wide):
    x = random_values((n,), seed, torch.float64) * 2.0**exponent
    x = x if wide else x.to(torch.float32)
    error = (hold_int8(x).dense(0, n).to(torch.float64) - x.to(torch.float64)).abs()
    for part, errors in zip(x.split(INT8_BLOCK), error.split(INT8_BLOCK), strict=True):
        largest = float(part.abs().max())
        assert float(errors.max()) <= largest / 254 + largest * 2.0**-24 + 2.0**-142


def test_int8_takes_a_byte_and_a_32nd():
    assert hold_int8(torch.randn(128 * 1000)).nbytes == 128 * 1000 + 4 * 1000


def test_int8_keeps_zeros_and_blocks_of_zeros_exactly():
    x = random_values((512,))
    x[128:256] = 0
    x[300] = 0
    dense = hold_int8(x).dense(0, 512)
    assert bool((dense[128:256] == 0).all())
    assert dense[300] == 0
    assert hold_int8(x).scales[1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_refuses_what_is_not_finite(value):
    x = torch.ones(300)
    x[200] = value
    with pytest.raises(ValueError, match="finite"):
        hold_int8(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_shards_hold_the_values_of_the_whole(shape):
    x = random_values(shape)
    whole = hold_int8(x).dense(0, x.numel()).view(shape)
    count = 0
    for layout in pieces(shape):
        cover = block_cover(layout)
        tau = hold_int8(x[cover.slices()], layout, cover=cover)
        wanted = whole[layout.slices()].reshape(-1)
        n = layout.numel
        assert same_bits(tau.dense(0, n), wanted)
        assert same_bits(tau.dense(n // 3, n - n // 4), wanted[n // 3 : n - n // 4])
        # what kernels do: the scale of local entry j by its global index
        index = layout.indices() // INT8_BLOCK - tau.first_block
        assert same_bits(tau.codes.to(torch.float32) * tau.scales[index], wanted)
        count += 1
    assert count >= 1


def test_a_row_shard_holds_its_own_scales_only():
    layout = Layout((64, 256), start=(16, 0), local=(16, 256))
    assert block_cover(layout) == layout
    assert hold_int8(torch.randn(16, 256), layout).scales.numel() == 16 * 256 // INT8_BLOCK


def test_the_cover_has_every_entry_of_the_blocks_and_few_more():
    for shape in SHAPES:
        for layout in pieces(shape):
            cover = block_cover(layout)
            if layout.numel == 0:
                assert cover == layout
                continue
            touched = set((layout.indices() // INT8_BLOCK).tolist())
            mine = set(cover.indices().tolist())
            needed = {
                i for b in touched for i in range(b * INT8_BLOCK, (b + 1) * INT8_BLOCK) if i < cover.total
            }
            assert needed <= mine
    rows = block_cover(Layout((1000, 300), start=(500, 0), local=(10, 300)))
    assert rows.slices() == (slice(499, 511), slice(0, 300))


def test_int8_of_a_cut_block_wants_the_cover():
    layout = Layout((1000,), start=(300,), local=(200,))
    with pytest.raises(ValueError, match="block_cover"):
        hold_int8(torch.randn(200), layout)
    with pytest.raises(ValueError, match="200 entries"):
        hold_int8(torch.randn(200), layout, cover=block_cover(layout))


# -- sparse


@given(
    n=st.integers(0, 3 * SPARSE_BLOCK // 64),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_sparse_holds_every_bit(n, seed, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.where(torch.rand(n, generator=generator) < share, random_values((n,), seed, dtype), 0)
    tau = hold_sparse(x)
    assert same_bits(tau.dense(0, n), x)
    low, high = n // 3, n - n // 5
    assert same_bits(tau.dense(low, high), x[low:high])


def test_sparse_across_blocks_is_what_its_docstring_says():
    n = 2 * SPARSE_BLOCK + 1000
    x = torch.zeros(n)
    at = torch.tensor([0, 5, SPARSE_BLOCK - 1, SPARSE_BLOCK, 2 * SPARSE_BLOCK + 999])
    x[at] = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    tau = hold_sparse(x)
    assert tau.starts.tolist() == [0, 3, 4, 5]
    assert tau.offsets.tolist() == [0, 5, SPARSE_BLOCK - 1, 0, 999]
    assert tau.offsets.dtype == torch.uint16
    assert same_bits(tau.dense(0, n), x)
    for low, high in [(5, 6), (SPARSE_BLOCK - 1, SPARSE_BLOCK + 1), (SPARSE_BLOCK, n), (6, 6), (n - 1, n)]:
        assert same_bits(tau.dense(low, high), x[low:high])


def test_sparse_keeps_negative_zero_nan_and_infinity():
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    tau = hold_sparse(x)
    assert tau.offsets.tolist() == [1, 2, 3, 4, 5]
    assert same_bits(tau.dense(0, 6), x)


def test_sparse_takes_six_bytes_per_kept_entry():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1 << 20, generator=generator)
    x[torch.rand(1 << 20, generator=generator) >= 0.01] = 0
    kept = int(x.count_nonzero())
    assert hold_sparse(x).nbytes == 6 * kept + 8 * 17
    assert hold_sparse(x).nbytes / (1 << 20) == pytest.approx(0.06, rel=0.05)
    assert hold_sparse(x, torch.bfloat16).nbytes == 4 * kept + 8 * 17


def test_sparse_in_bf16_is_dense_in_bf16():
    x = torch.where(torch.rand(5000) < 0.1, random_values((5000,)), 0)
    one, other = hold_sparse(x, torch.bfloat16), hold_dense(x, torch.bfloat16)
    assert same_bits(one.dense(0, 5000), other.dense(0, 5000))


# -- all


FORMATS = [hold_dense, hold_int8, hold_sparse, lambda x: hold_dense(x, torch.bfloat16)]


@pytest.mark.parametrize("hold", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_format_is_a_tau_and_survives_a_move(hold, shape):
    x = random_values(shape)
    tau: Tau = hold(x)
    n = x.numel()
    assert isinstance(tau, DenseTau | Int8Tau | SparseTau)
    assert tau.numel == n
    assert tau.dense(0, n).shape == (n,)
    assert tau.dense(0, n).dtype == torch.float32
    assert tau.dense(0, n + 5).numel() == n  # a last chunk may ask for more than there is
    copy = tau.map(torch.Tensor.clone)
    assert type(copy) is type(tau)
    assert copy.nbytes == tau.nbytes
    assert same_bits(copy.dense(0, n), tau.dense(0, n))
    assert tau.to("meta").device.type == "meta"


@pytest.mark.parametrize("hold", FORMATS)
def test_strides_do_not_matter_and_nothing_is_written(hold):
    x = random_values((40, 30)).t()
    before = x.clone()
    assert same_bits(hold(x).dense(0, 1200), hold(x.contiguous()).dense(0, 1200))
    assert torch.equal(x, before)
