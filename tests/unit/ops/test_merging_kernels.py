"""Offline merging in C against the torch path, bit for bit: AVX-512 and the vectors of the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.ops.merging_cases import (
    DTYPES,
    LOWS,
    NUMBERS,
    SIZES,
    SOME,
    VECTORS,
    compiled,
    numbers,
    reader,
    same_bits,
    thinnings,
)
from trimtab.ops.combine import Operator, merge_range, weighted_sum
from trimtab.ops.consensus import CONSENSUS
from trimtab.ops.kernels import loaded, merge_structs, merging, ranking
from trimtab.ops.kernels.merging import NonFinite, merge_range_into
from trimtab.ops.kernels.ranking import NativeMagnitudes, native_cuts
from trimtab.ops.layout import Layout
from trimtab.ops.masks import MaskKey, Place
from trimtab.ops.sparsify import Thinning, kept_by, l1_ratio, thinning, top_count

pytestmark = pytest.mark.skipif(not merging.available(), reason=f"no kernels: {merging.reason()}")


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


@pytest.mark.parametrize("count", [62, 63, 64])
def test_more_models_than_the_kernels_have_room_for_are_refused(count: int) -> None:
    one, out = torch.ones(20), torch.empty(20)
    held = [torch.float32] * (count + 1)  # the anchor and each model
    if count == 62:
        assert merging.refuses(held) is None
        merging.merge_range_into(
            out, one, [2 * one] * 62, [1.0] * 62, [Thinning()] * 62, Operator(), total=20
        )
        assert out.tolist() == [63.0] * 20
        return
    assert "at most 62 models" in str(merging.refuses(held))
    with pytest.raises(ValueError, match="at most 62 models"):
        merging.merge_range_into(
            out, one, [one] * count, [1.0] * count, [Thinning()] * count, Operator(), total=20
        )
    with pytest.raises(ValueError, match="at most 62 models"):
        merging.weighted_sum_into(out, [one] * count, [1.0] * count, normalize=True)
