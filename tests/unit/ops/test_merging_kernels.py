"""Offline merging in C against the torch path, bit for bit: AVX-512 and the vectors of the compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops.combine import Operator, merge_range, weighted_sum
from trimtab.ops.consensus import CONSENSUS
from trimtab.ops.exact_sum import _fraction_sums
from trimtab.ops.kernels import build, loaded, merge_structs, merging, ranking
from trimtab.ops.kernels.merging import NonFinite, merge_range_into
from trimtab.ops.kernels.ranking import NativeMagnitudes, native_cuts
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.select import Streamed, cuts
from trimtab.ops.sparsify import Cut, Thinning, kept_by, l1_ratio, thin, thinning, top_count, top_cut

pytestmark = pytest.mark.skipif(not merging.available(), reason=f"no kernels: {merging.reason()}")

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


@dataclass(frozen=True)
class Merge:
    """A merge of a range of a tensor of ``total`` entries: ``held`` has the anchor first, then the models."""

    held: tuple[Tensor, ...]
    weights: tuple[float, ...]
    how: tuple[Thinning, ...]
    operator: Operator
    scale: float
    low: int
    total: int
    dtype: torch.dtype
    to: torch.dtype

    def ours(self) -> tuple[Tensor, NonFinite]:
        out = torch.empty(self.held[0].numel(), dtype=self.to)
        found = merge_range_into(
            out,
            self.held[0],
            self.held[1:],
            self.weights,
            self.how,
            self.operator,
            scale=self.scale,
            low=self.low,
            total=self.total,
            dtype=self.dtype,
        )
        return out, found

    def theirs(self) -> Tensor:
        anchor, *models = (x.to(self.dtype) for x in self.held)
        weights = torch.tensor(self.weights, dtype=self.dtype).tolist()
        place = Place(Layout.whole((self.total,)), self.low)
        deltas = [x - anchor for x in models]
        merged = merge_range(anchor, deltas, weights, self.how, self.operator, scale=self.scale, place=place)
        return merged.to(self.to)


@st.composite
def merges(draw: st.DrawFn, sizes: Sequence[int] = SIZES) -> Merge:
    n, models, dtype = draw(st.sampled_from(sizes)), draw(st.integers(1, 5)), draw(st.sampled_from(DTYPES))
    low = draw(st.sampled_from(LOWS))
    total, seed = low + n + draw(st.sampled_from([0, 100])), draw(st.integers(0, 1 << 30))
    held = tuple(numbers(seed + i, n, draw(st.sampled_from(DTYPES))) for i in range(models + 1))
    deltas = [x.to(dtype) - held[0].to(dtype) for x in held[1:]]
    how = tuple(draw(thinnings(i, delta, low, total)) for i, delta in enumerate(deltas))
    operator = Operator(consensus=draw(st.sampled_from(CONSENSUS)), normalize=draw(st.booleans()))
    weights = tuple(draw(st.sampled_from(NUMBERS)) for _ in deltas)
    scale, to = draw(st.sampled_from([1.0, 0.4, -1.3])), draw(st.sampled_from(DTYPES))
    return Merge(held, weights, how, operator, scale, low, total, dtype, to)


@VECTORS
@SOME
@given(case=merges())
def test_a_merge_is_that_of_torch(vectors: str, case: Merge) -> None:
    with compiled(vectors):
        out, found = case.ours()
    wanted = case.theirs()
    assert same_bits(out, wanted)
    assert found == NonFinite(output=not bool(wanted.isfinite().all()))


@settings(max_examples=5, deadline=None)
@given(case=merges(sizes=[70_000]))
def test_a_long_range_is_that_of_torch(case: Merge) -> None:
    assert same_bits(case.ours()[0], case.theirs())


@VECTORS
@SOME
@given(case=merges(), data=st.data())
def test_what_is_not_finite_is_told_and_comes_out_as_in_torch(vectors: str, case: Merge, data: Any) -> None:
    # 0·∞ is a NaN of either sign in torch, by where it stands: no vote is the same twice then.
    case = replace(
        case,
        weights=tuple(weight or 1.0 for weight in case.weights),
        how=tuple(replace(one, factor=one.factor or 1.0) for one in case.how),
    )
    n = case.held[0].numel()
    for i in data.draw(st.sets(st.integers(0, len(case.held) - 1))) if n else ():
        at = data.draw(st.integers(0, n - 1))
        case.held[i][at] = data.draw(st.sampled_from([torch.inf, -torch.inf, torch.nan]))
    with compiled(vectors):
        out, found = case.ours()
    assert same_bits(out, case.theirs())
    spoilt = [not bool(x.isfinite().all()) for x in (*case.held, out)]
    models = tuple(i for i, there in enumerate(spoilt[1:-1]) if there)
    assert found == NonFinite(models, spoilt[0], spoilt[-1])


def test_many_models() -> None:
    held = tuple(numbers(i, 100, DTYPES[i % 3]) for i in range(41))
    how = tuple(Thinning(0.5, key=MaskKey(1, i % 32, i // 32, "w"), factor=2.0) for i in range(40))
    case = Merge(
        held, (0.1,) * 40, how, Operator(consensus="sign"), 1.0, 0, 100, torch.float32, torch.float32
    )
    assert same_bits(case.ours()[0], case.theirs())


def test_ranges_on_several_threads() -> None:
    n, step = 200_003, 10_000
    base, one, two = (numbers(i, n, torch.float32) for i in range(3))
    how = [Thinning(0.3, key=MaskKey(5, i, 0, "w"), factor=1 / 0.3) for i in range(2)]
    operator, out = Operator(consensus="sign", normalize=True), torch.empty(n)

    def work(low: int) -> None:
        part = slice(low, min(low + step, n))
        models = [one[part], two[part]]
        merge_range_into(out[part], base[part], models, [0.5, 0.8], how, operator, low=low, total=n)

    loaded.each(work, range(0, n, step), 4)
    weights = torch.tensor([0.5, 0.8]).tolist()
    assert same_bits(out, merge_range(base, [one - base, two - base], weights, how, operator))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_on_any_thread_is_raised(threads: int) -> None:
    def work(item: int) -> None:
        if item == 7:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        loaded.each(work, range(20), threads)
    loaded.each(work, [], threads)


METHODS = [
    Operator("top", "none", "sign", normalize=True),
    Operator("top", "l1", "sign_or_plus", normalize=True, counting="truncate"),
    Operator("bernoulli", "expected", "linear"),
    Operator("bernoulli", "l1", "sign_or_plus"),
]


@VECTORS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", METHODS, ids=str)
def test_a_method_as_a_whole(operator: Operator, dtype: torch.dtype, vectors: str) -> None:
    n, rates = 70_001, (0.2, 0.5, 0.8)
    base, *models = (numbers(i, n, torch.bfloat16) for i in range(4))
    deltas = [x.to(dtype) - base.to(dtype) for x in models]
    how, weights = [], torch.tensor([0.6] * 3, dtype=dtype).tolist()
    out = torch.empty(n, dtype=torch.bfloat16)
    with compiled(vectors):
        for i, (rate, model, delta) in enumerate(zip(rates, models, deltas, strict=True)):
            key, counting = MaskKey(3, i, 0, "w"), operator.counting
            kind, rescale = operator.sparsify, operator.rescale
            wanted = thinning(delta, kind, rate, rescale=rescale, key=key, counting=counting)
            if wanted.cut is not None:
                magnitudes = NativeMagnitudes(reader(base), reader(model), n, dtype)
                cut = native_cuts([magnitudes], [top_count(n, rate, counting)])[0][0]
                assert torch.equal(kept_by(cut, delta), kept_by(wanted.cut, delta))
                wanted = replace(wanted, cut=cut)
            if rescale == "l1":
                sums = ranking.l1_sums(reader(base), reader(model), wanted, n, dtype, threads=2)
                assert l1_ratio(*sums) == wanted.factor
            how.append(wanted)
        for low in range(0, n, 30_000):
            part = slice(low, min(low + 30_000, n))
            one, *others = (x[part] for x in (base, *models))
            merge_range_into(out[part], one, others, weights, how, operator, low=low, total=n, dtype=dtype)
    merged = merge_range(base.to(dtype), deltas, weights, how, operator)
    assert same_bits(out, merged.to(torch.bfloat16))


# -- sums of models


@pytest.mark.skipif(merging.refuses_sum([]) is not None, reason="torch.addcmul rounds twice here")
@VECTORS
@SOME
@given(
    n=st.sampled_from(SIZES),
    held=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5),
    weights=st.lists(st.sampled_from(NUMBERS), min_size=5, max_size=5),
    to=st.sampled_from(DTYPES),
    normalize=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_a_weighted_sum_is_that_of_torch(vectors, n, held, weights, to, normalize, seed) -> None:
    models = [numbers(seed + i, n, dtype) for i, dtype in enumerate(held)]
    out = torch.empty(n, dtype=to)
    with compiled(vectors):
        found = merging.weighted_sum_into(out, models, weights[: len(models)], normalize=normalize)
    assert same_bits(out, weighted_sum(models, weights[: len(models)], normalize=normalize).to(to))
    assert found == NonFinite(output=not bool(out.isfinite().all()))


@VECTORS
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 17, 1003])
def test_an_interpolation_is_that_of_torch(n: int, to: torch.dtype, vectors: str) -> None:
    a, b = numbers(1, n, torch.float32), numbers(2, n, torch.bfloat16)
    one, other = torch.tensor([0.337]), torch.tensor([0.672])
    out = torch.empty(n, dtype=to)
    with compiled(vectors):
        assert merging.interpolate_into(out, a, b, one, other) == NonFinite()
    assert same_bits(out, (one * a + other * b.to(torch.float32)).to(to))


def test_a_sum_tells_what_is_not_finite() -> None:
    one, two = torch.ones(40), torch.ones(40, dtype=torch.bfloat16)
    two[37] = torch.inf
    assert merging.interpolate_into(torch.empty(40), one, two, 1.0, 0.0) == NonFinite((1,), False, True)


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


# -- what is refused


def test_what_the_kernels_do_not_do_is_said() -> None:
    assert merging.refuses(DTYPES) is None
    assert "float64" in str(merging.refuses([torch.float32, torch.float64]))
    assert "float64" in str(merging.refuses([torch.float32], torch.float64))
    assert "at most" in str(merging.refuses([torch.float32] * 80))
    one = torch.ones(4)
    plain = {"total": 4, "how": [Thinning()], "operator": Operator()}
    with pytest.raises(ValueError, match="differ in length"):
        merge_range_into(one, one, [one[:3]], [1.0], **plain)
    with pytest.raises(ValueError, match="contiguous"):
        merge_range_into(one, one, [torch.ones(8)[::2]], [1.0], **plain)
    with pytest.raises(ValueError, match="as many weights"):
        merge_range_into(one, one, [one], [], **plain)
    with pytest.raises(ValueError, match="as many weights"):
        merging.weighted_sum_into(one, [one], [], normalize=False)
    with pytest.raises(ValueError, match="cannot keep"):
        native_cuts([NativeMagnitudes(reader(one), reader(one), 4, torch.float32)], [5])


def test_kernels_that_do_not_agree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_path = merging.merge_range
    monkeypatch.setattr(merging, "merge_range", lambda *args, **kw: torch_path(*args, **kw) * 1.0000001)
    assert not merging._agrees.__wrapped__()
    monkeypatch.setattr(merging, "_agrees", lambda: False)
    assert "do not merge as this torch does" in str(merging.refuses([]))
    assert not merging.available()
    monkeypatch.undo()
    two = weighted_sum([torch.ones(3)], [1.0], normalize=False)
    monkeypatch.setattr(merging, "weighted_sum", lambda *_, **__: two)
    assert not merging._fuses.__wrapped__()
    monkeypatch.setattr(merging, "_fuses", lambda: False)
    assert "single rounding" in str(merging.refuses_sum([]))


def test_without_a_library_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_structs, "load", lambda: (None, "there is no C compiler"))
    assert merge_structs.kernels.__wrapped__() == (None, "there is no C compiler")
    monkeypatch.setattr(merge_structs, "kernels", lambda: (None, "there is no C compiler"))
    with pytest.raises(RuntimeError, match="no C compiler"):
        merge_structs.library()
