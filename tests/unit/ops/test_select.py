"""Cuts and factors of tensors in parts are those of the whole tensor, exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.ops.fake_processes import run
from trimtab.ops import DELTA, MaskKey
from trimtab.ops.exact_sum import exact_l1
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place, bernoulli_mask
from trimtab.ops.select import Part, global_cuts, thinnings
from trimtab.ops.sparsify import Cut, kept_by, thin, top_count, top_mask

EXTREME = [0.0, -0.0, 1.0, -1.0, 1.5, -1e-45, 1e-38, 3e38, math.inf, -math.inf, math.nan]


def rows(x: Tensor, bounds: list[int]) -> list[Part]:
    """Parts of x: its rows from one bound to the next."""
    pairs = zip([0, *bounds], [*bounds, x.shape[0]], strict=True)
    return [rectangle(x, (low, 0), (high - low, x.shape[1])) for low, high in pairs]


def rectangle(x: Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> Part:
    layout = Layout(tuple(x.shape), start, size)
    return Part(x[layout.slices()].reshape(-1), layout)


def together(x: Tensor, parts: list[Part], masks: list[Tensor]) -> Tensor:
    whole = torch.zeros(x.shape, dtype=torch.bool)
    for part, mask in zip(parts, masks, strict=True):
        whole[part.layout.slices()] = mask.view(part.layout.local)
    return whole


def cut_in_parts(parts: list[Part], k: int) -> tuple[Cut, int]:
    asked = [Part(part.x, part.layout, count=k) for part in parts]
    results, ring = run([partial(global_cuts, [part]) for part in asked])
    assert all(result == results[0] for result in results), "every process finds the same cut"
    return results[0][0], ring.calls


@st.composite
def split_matrices(draw: st.DrawFn) -> tuple[Tensor, list[Part]]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    values = st.sampled_from(EXTREME) | st.floats(-2, 2, width=16)
    entries = draw(st.lists(values, min_size=height * width, max_size=height * width))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.tensor(entries, dtype=dtype).view(height, width)
    row = draw(st.integers(0, height))
    if draw(st.booleans()):
        return x, rows(x, sorted([row, draw(st.integers(0, height))]))
    column = draw(st.integers(0, width))
    corners = [(0, 0, row, column), (0, column, row, width - column)]
    corners += [(row, 0, height - row, column), (row, column, height - row, width - column)]
    return x, [rectangle(x, corner[:2], corner[2:]) for corner in corners]


@settings(max_examples=60, deadline=None)
@given(split=split_matrices(), data=st.data())
def test_parts_keep_exactly_what_the_whole_tensor_keeps(
    split: tuple[Tensor, list[Part]], data: st.DataObject
) -> None:
    x, parts = split
    k = data.draw(st.integers(0, x.numel()))
    cut, _ = cut_in_parts(parts, k)
    masks = [kept_by(cut, part.x, Place(part.layout)).to(torch.bool) for part in parts]
    assert torch.equal(together(x, parts, masks), top_mask(x, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_of_ties_is_cut_by_index(dtype: torch.dtype) -> None:
    """Adam's first step: every magnitude is the learning rate. Large enough for several chunks and digits."""
    x = torch.where(torch.arange(700 * 1000) % 3 == 0, 1e-6, -1e-6).to(dtype).view(700, 1000)
    cut, calls = cut_in_parts(rows(x, [123, 123, 501]), 300_001)
    assert cut.index == 300_001
    assert calls == {torch.float32: 3, torch.float64: 6}[dtype] + 2, (
        "digits of the magnitude, then of 20 bits"
    )
    columns = [rectangle(x, (0, 0), (700, 999)), rectangle(x, (0, 999), (700, 1))]
    assert cut_in_parts(columns, 300_001)[0] == cut


def test_no_index_is_searched_where_all_ties_are_kept() -> None:
    x = torch.arange(50.0).view(5, 10)
    cut, calls = cut_in_parts(rows(x, [2]), 7)
    assert calls == 3
    assert cut == Cut(int(torch.tensor(43.0).view(torch.int32)), 50)


def test_tensors_of_several_sizes_share_their_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    xs = [
        torch.randn(n, 3, generator=generator, dtype=d)
        for n in (1, 40, 7)
        for d in (torch.float32, torch.float64)
    ]
    split = [rows(x, [x.shape[0] // 2]) for x in xs]
    counts = [1, 2, 60, 119, 21, 20]

    def work(rank: int) -> list[Part]:
        return [Part(two[rank].x, two[rank].layout, count=k) for two, k in zip(split, counts, strict=True)]

    (ours, theirs), ring = run([partial(global_cuts, work(rank)) for rank in (0, 1)])
    assert ours == theirs
    assert ring.calls == 6, "fp64's six digits; no ties, so no index"
    for x, cut, k in zip(xs, ours, counts, strict=True):
        assert torch.equal(kept_by(cut, x).to(torch.bool), top_mask(x, k))


def test_wrong_counts_dtypes_and_processes_are_refused() -> None:
    x = torch.arange(6.0)
    with pytest.raises(ValueError, match="cannot keep 7 of 6"):
        global_cuts([Part(x, Layout.whole((6,)), count=7)])
    with pytest.raises(ValueError, match="fp32 or fp64"):
        global_cuts([Part(x.half(), Layout.whole((6,)), count=3)])
    half = Layout((12,), (0,), (6,))
    with pytest.raises(ValueError, match="6 entries where 12 were expected"):
        global_cuts([Part(x, half, count=3)])


# -- sums


@settings(max_examples=60, deadline=None)
@given(split=split_matrices())
def test_the_sum_is_that_of_the_real_numbers_rounded_once(split: tuple[Tensor, list[Part]]) -> None:
    x, parts = split
    results, _ = run([partial(exact_l1, [part.x]) for part in parts])
    assert all(str(result) == str(results[0]) for result in results)
    if x.isfinite().all():
        assert results[0][0] == float(sum(Fraction(abs(value)) for value in x.reshape(-1).tolist()))
    else:
        assert math.isnan(results[0][0])


def test_sums_do_not_depend_on_order_and_keep_what_fp64_would_lose() -> None:
    x = torch.cat([torch.full((1 << 18,), 1e-8), torch.tensor([1e9]), torch.full((3,), -1e-8)])
    expected = float(Fraction(float(x[0])) * ((1 << 18) + 3) + 10**9)
    pieces = [x[:5], x[5:300_000], x[300_000:]]
    assert exact_l1([x, x.flip(0), pieces]) == [expected] * 3
    naive = 1e9
    for _ in range(1 << 18):
        naive += 1e-8
    assert naive != expected


def test_sums_of_other_dtypes() -> None:
    x = torch.tensor([0.5, -0.25, 1e-7])
    for dtype in (torch.bfloat16, torch.float16):
        assert exact_l1([x.to(dtype)]) == [math.fsum(x.to(dtype).abs().tolist())]
    huge = torch.full((4,), 1e308, dtype=torch.float64)
    assert exact_l1([huge, huge[:1], huge[:0]]) == [math.inf, 1e308, 0.0]
    assert exact_l1([]) == []
    with pytest.raises(ValueError, match="floating"):
        exact_l1([torch.ones(2, dtype=torch.int32)])


# -- F as a whole


PAIRS = [(kind, rescale) for kind in ("none", "bernoulli") for rescale in ("none", "expected", "l1")]


@pytest.mark.parametrize(("kind", "rescale"), [*PAIRS, ("top", "none"), ("top", "l1")])
def test_parts_are_thinned_as_the_whole_tensor_is(kind: str, rescale: str) -> None:
    x = torch.randn(13, 8, generator=torch.Generator().manual_seed(2))
    key = MaskKey(7, DELTA, 3, "a.weight")

    def work(part: Part) -> list[Part]:
        some = Part(part.x, part.layout, 0.3, top_count(x.numel(), 0.3), key)
        return [some, Part(part.x, part.layout, 1.0, x.numel(), key)]

    corners = [((0, 0), (9, 5)), ((0, 5), (9, 3)), ((9, 0), (4, 5)), ((9, 5), (4, 3))]
    parts = [rectangle(x, start, size) for start, size in corners]
    results, ring = run([partial(_thinnings, work(part), kind, rescale) for part in parts])
    assert all(result == results[0] for result in results)
    assert ring.calls == (3 if kind == "top" else 0) + (1 if rescale == "l1" and kind != "none" else 0)
    some, identity = results[0]
    assert (identity.cut, identity.key, identity.factor) == (None, None, 1.0)
    masks = {
        "none": torch.ones(x.shape, dtype=torch.bool),
        "bernoulli": bernoulli_mask(x.shape, 0.3, key),
        "top": top_mask(x, top_count(x.numel(), 0.3)),
    }
    kept = torch.where(masks[kind], x, 0.0)
    if kind != "none":
        sums = [float(sum(Fraction(abs(value)) for value in t.reshape(-1).tolist())) for t in (x, kept)]
        assert some.factor == {"none": 1.0, "expected": 1 / 0.3, "l1": sums[0] / sums[1]}[rescale]
    for part in parts:
        (thinned,) = thin([part.x], [some], Place(part.layout))
        assert torch.equal(thinned.view(part.layout.local), kept[part.layout.slices()] * some.factor)


def _thinnings(parts: list[Part], kind: str, rescale: str, reduce: object) -> object:
    return thinnings(parts, kind, rescale, reduce)  # type: ignore[arg-type]


def test_factors_of_empty_and_infinite_sums_are_one() -> None:
    key = MaskKey(0, DELTA, 0, "w")
    xs = [torch.zeros(64), torch.full((64,), math.inf), torch.zeros(0)]
    parts = [Part(x, Layout.whole(x.shape), 0.5, key=key) for x in xs]
    assert [how.factor for how in thinnings(parts, "bernoulli", "l1")] == [1.0] * 3
