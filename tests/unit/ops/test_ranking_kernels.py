"""Cuts and sums of magnitudes in C against the torch path: AVX-512 and the vectors of the compiler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.ops.merging_cases import (
    DTYPES,
    LOWS,
    SIZES,
    VECTORS,
    compiled,
    numbers,
    reader,
    thinnings,
)
from trimtab.ops.exact_sum import _fraction_sums
from trimtab.ops.kernels import merging, ranking
from trimtab.ops.kernels.ranking import NativeMagnitudes, native_cuts
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place
from trimtab.ops.select import Streamed, cuts
from trimtab.ops.sparsify import Thinning, thin, top_cut

pytestmark = pytest.mark.skipif(not merging.available(), reason=f"no kernels: {merging.reason()}")


# -- cuts


def pair(seed: int, n: int, held: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    anchor, model = numbers(seed, n, held), numbers(seed + 1, n, held)
    if n > 3:
        model[:2] = torch.tensor([torch.inf, torch.nan])
    return anchor, model, model.to(dtype) - anchor.to(dtype)


@VECTORS
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 15, 16, 17, 1000, 70_000]), min_size=1, max_size=3),
    held=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    ranks=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    threads=st.integers(1, 3),
)
def test_cuts_are_those_of_torch(vectors, sizes, held, dtype, ranks, threads) -> None:
    pairs = [pair(i, n, held, dtype) for i, n in enumerate(sizes)]
    native = [
        NativeMagnitudes(reader(anchor), reader(model), len(anchor), dtype, threads)
        for anchor, model, _ in pairs
    ]
    streamed = [Streamed(lambda x=x: [x], len(x), dtype) for _, _, x in pairs]
    counts = [1 + int(rank * (sum(sizes) - 1)) for rank in ranks]
    wanted = cuts(streamed, counts)
    with compiled(vectors):
        assert native_cuts(native, counts) == wanted
        assert native_cuts(native, counts[:1]) == wanted[:1]
        assert cuts(native, counts) == wanted


@pytest.mark.parametrize("skewed", [False, True])
def test_a_bracket_that_misses_is_made_good(skewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1 << 17
    anchor = torch.zeros(n)
    model = torch.arange(n, dtype=torch.float32)
    magnitudes = NativeMagnitudes(reader(anchor), reader(model), n, torch.float32)
    wrong = (1, 2) if skewed else (int(torch.tensor(1e9).view(torch.int32)), 0x7F800000)
    monkeypatch.setattr(ranking, "_bracket", lambda *_: wrong)
    assert native_cuts([magnitudes], [n // 5]) == cuts(
        [Streamed(lambda: [model], n, torch.float32)], [n // 5]
    )


def test_a_sample_that_takes_all_of_a_short_tensor() -> None:
    pairs = [pair(i, n, torch.bfloat16, torch.float32) for i, n in enumerate([17, 33, 70_000, 15])]
    native = [NativeMagnitudes(reader(a), reader(b), len(a), torch.float32) for a, b, _ in pairs]
    assert [part.size for part in native[1].sample(0, 33, 33)] == [32]
    assert native[3].sample(0, 15, 15) == []
    streamed = [Streamed(lambda x=x: [x], len(x), torch.float32) for *_, x in pairs]
    for k in (1, 5000, 70_000):
        assert native_cuts(native, [k]) == cuts(streamed, [k])


@pytest.mark.parametrize("values", [1, 2, 7])
def test_few_different_magnitudes(values: int) -> None:
    n = 1 << 17
    anchor, model = torch.zeros(n, dtype=torch.bfloat16), (torch.arange(n) * 7 % values).to(torch.bfloat16)
    native = NativeMagnitudes(reader(anchor), reader(model), n, torch.float32)
    streamed = Streamed(lambda: [model.to(torch.float32)], n, torch.float32)
    for k in (1, n // 7, n // 2, n - 1):
        assert native_cuts([native], [k]) == cuts([streamed], [k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_histograms_of_a_range(dtype: torch.dtype) -> None:
    anchor, model, delta = pair(5, 3000, torch.bfloat16, dtype)
    native = NativeMagnitudes(reader(anchor), reader(model), 3000, dtype)
    streamed = Streamed(lambda: [delta], 3000, dtype)
    streamed.widths = native.widths
    top = native.histograms(0, [0])
    assert np.array_equal(top, streamed.histograms(0, [0]))
    if len(native.widths) > 1:
        prefixes = [int(i) for i in np.flatnonzero(top[0])[[0, 5, -1]]]
        assert np.array_equal(native.histograms(1, prefixes), streamed.histograms(1, prefixes))
    for bits in (0, top_cut(delta, 700).bits, top_cut(delta, 1).bits):
        assert native.ties(bits) == streamed.ties(bits) > 0
        assert native.tie(bits, native.ties(bits)) == streamed.tie(bits, native.ties(bits))
    with pytest.raises(ValueError, match="not as many ties"):
        native.tie(0, 3000)


# -- sums of magnitudes


@VECTORS
@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([*SIZES, 70_000]),
    held=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    low=st.sampled_from(LOWS),
    data=st.data(),
)
def test_the_tables_of_magnitudes_are_those_of_torch(vectors, n, held, dtype, low, data) -> None:
    anchor, model, delta = pair(3, n, held, dtype)
    how = data.draw(thinnings(1, delta, low, low + n))
    with compiled(vectors):
        found = ranking.l1_tables(anchor, model, how, low=low, total=low + n, dtype=dtype)
    place = Place(Layout.whole((low + n,)), low)
    kept = thin([delta], [replace(how, factor=1.0)], place)[0]
    wanted = torch.stack([_fraction_sums(delta), _fraction_sums(kept)])
    found[:, 1, -1] = wanted[:, 1, -1] = 0  # what NaNs are made of
    assert torch.equal(found, wanted)


def test_the_sum_over_an_empty_tensor() -> None:
    nothing = reader(torch.empty(0))
    assert ranking.l1_sums(nothing, nothing, Thinning(), 0, torch.float32) == [0.0, 0.0]
