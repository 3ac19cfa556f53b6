"""``anchor + ⊕_w(F(δ₁), F(δ₂), …)``, which online and offline merging share, against the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import reference as oracle
from tests.property.strategies import as_float64, bounded, rates, same_bits, shapes, tensors, within
from trimtab.ops import DELTA, UPDATE, MaskKey, Operator, bernoulli_mask, combine, combine_parts, merge

EPS = torch.finfo(torch.float64).eps
finite = st.floats(-4.0, 4.0, width=16)


def keys(count: int) -> list[MaskKey]:
    """The update's stream for the first delta, then those of the deltas."""
    streams = [UPDATE, *range(DELTA, DELTA + count - 1)]
    return [MaskKey(seed=7, stream=stream, step=3, name="a.weight") for stream in streams]


def oracle_combine(
    deltas: list[Tensor], weights: list[float], kept_rates: list[float], operator: Operator
) -> tuple[oracle.Array, oracle.Array]:
    """The oracle's bracket, and which entries rounding cannot move across a vote."""
    count = oracle.top_count if operator.counting == "ceil" else oracle.released_top_count
    terms = []
    for delta, p, key in zip(deltas, kept_rates, keys(len(deltas)), strict=True):
        kept = None
        if operator.sparsify == "top" and p != 1:
            kept = oracle.top_mask(as_float64(delta), count(delta.numel(), p))
        elif operator.sparsify == "bernoulli" and p != 1:
            kept = bernoulli_mask(delta.shape, p, key).reshape(-1).tolist()
        terms.append(oracle.sparsify(as_float64(delta), p, kept, operator.rescale))
    counted = [1.0] * len(terms) if operator.consensus == "sign_unweighted" else weights
    vote = np.abs(sum(w * t for w, t in zip(counted, terms, strict=True)))
    size = sum(np.abs(w * t) for w, t in zip(counted, terms, strict=True))
    clear = (vote > 64 * EPS * size) | (size == 0) | (operator.consensus == "linear")
    return oracle.consensus(terms, weights, operator.consensus, operator.normalize), clear


@st.composite
def operators(draw: st.DrawFn) -> Operator:
    kind = draw(st.sampled_from(["none", "bernoulli", "top"]))
    rescales = {"none": ["none"], "bernoulli": ["none", "expected", "l1"], "top": ["none", "l1"]}[kind]
    return Operator(
        kind,
        draw(st.sampled_from(rescales)),
        draw(st.sampled_from(["linear", "sign", "sign_unweighted"])),
        normalize=draw(st.booleans()),
        counting=draw(st.sampled_from(["ceil", "floor"])),
    )


@st.composite
def merges(draw: st.DrawFn):
    shape, count = draw(shapes), draw(st.integers(2, 4))
    deltas = [draw(tensors(shape=shape, dtype=torch.float64, content=finite)) for _ in range(count)]
    weights = [draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])) for _ in range(count)]
    return deltas, weights, [draw(rates.filter(lambda p: p > 1e-4)) for _ in range(count)]


@bounded(400)
@given(drawn=merges(), operator=operators())
def test_combine_follows_the_oracle(drawn: tuple, operator: Operator) -> None:
    deltas, weights, kept_rates = drawn
    before = [d.clone() for d in deltas]
    result = combine(deltas, weights, kept_rates, operator, keys(len(deltas)))
    expected, clear = oracle_combine(deltas, weights, kept_rates, operator)
    size = sum(np.abs(as_float64(d)).max(initial=0.0) for d in deltas) / min(kept_rates)
    error = np.abs(as_float64(result) - expected)
    if operator.rescale == "none":
        assert bool((error <= 16 * EPS * size).all())  # sums of such numbers are exact: no near ties
    assert bool((error[clear] <= 16 * EPS * size).all())
    assert all(same_bits(a, b) for a, b in zip(deltas, before, strict=True)), "an input was changed"


@bounded(200)
@given(drawn=merges(), operator=operators(), data=st.data())
def test_merge_adds_the_bracket_once(drawn: tuple, operator: Operator, data: st.DataObject) -> None:
    deltas, weights, kept_rates = drawn
    anchor = data.draw(tensors(shape=tuple(deltas[0].shape), dtype=torch.float64, content=finite))
    bracket = combine(deltas, weights, kept_rates, operator, keys(len(deltas)))
    before = anchor.clone()
    merged = merge(anchor, deltas, weights, kept_rates, operator, keys(len(deltas)))
    assert same_bits(merged, anchor + bracket)
    assert same_bits(anchor, before), "the anchor was changed"


@bounded(200)
@given(drawn=merges(), operator=operators())
def test_parts_add_up(drawn: tuple, operator: Operator) -> None:
    deltas, weights, kept_rates = drawn
    operator = Operator(operator.sparsify, operator.rescale, operator.consensus, counting=operator.counting)
    parts = combine_parts(deltas, weights, kept_rates, operator, keys(len(deltas)))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert len(parts) == len(deltas)
    assert bool((total == combine(deltas, weights, kept_rates, operator, keys(len(deltas)))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.01, 1 / 3, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 1e-7, 0.5, 1.0])
def test_equations_3_to_7_written_out(dtype: torch.dtype, p: float, alpha: float) -> None:
    generator = torch.Generator().manual_seed(5)
    update, tau = (torch.randn(60, 20, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    kept = [bernoulli_mask(update.shape, p, key) for key in keys(2)]
    a, b = (1 - alpha) * as_float64(update), alpha * as_float64(tau)
    unit = 3 * torch.finfo(dtype).eps

    ondare = combine([update, tau], [1 - alpha, alpha], [p, p], Operator("bernoulli"), keys(2))
    linear = a * as_float64(kept[0]) + b * as_float64(kept[1])
    assert bool((np.abs(as_float64(ondare) - linear) <= unit * (np.abs(a) + np.abs(b))).all())

    onties = combine([update, tau], [1 - alpha, alpha], [p, p], Operator("top", consensus="sign"), keys(2))
    k = math.ceil(p * update.numel())
    for column, x in ((a, update), (b, tau)):
        lowest = np.sort(np.abs(as_float64(x)).ravel())[::-1][k - 1]
        column[np.abs(as_float64(x)) < lowest] = 0
    elected = np.where(np.sign(a) == np.sign(a + b), a, 0) + np.where(np.sign(b) == np.sign(a + b), b, 0)
    assert bool((np.abs(as_float64(onties) - elected) <= unit * (np.abs(a) + np.abs(b))).all())


def test_a_method_is_the_identity_only_without_weight_on_tau_and_with_everything_kept() -> None:
    for operator in (Operator("bernoulli", "expected"), Operator("top", consensus="sign")):
        assert operator.is_identity_on_first([1.0, 0.0], 1.0)
        assert not operator.is_identity_on_first([1.0, 0.0], 0.999)
        assert not operator.is_identity_on_first([1 - 1e-16 * 2, 1e-16], 1.0)
    assert Operator("none").is_identity_on_first([1.0, 0.0], 0.1)


def test_the_unweighted_vote_counts_tau_even_without_weight() -> None:
    """α = 0 leaves τ its vote: the released OnTIES at p = 1 drops updates that disagree with τ."""
    operator = Operator("top", consensus="sign_unweighted")
    update, tau = torch.tensor([-1.0, 1.0]), torch.tensor([5.0, 5.0])
    assert combine([update, tau], [1.0, 0.0], [1.0, 1.0], operator, keys(2)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsify": "topp"},
        {"rescale": "l2"},
        {"consensus": "sgn"},
        {"sparsify": "top", "rescale": "expected"},
    ],
)
def test_impossible_operators_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        Operator(**fields)


def test_empty_and_zero_dimensional_tensors() -> None:
    for x in (torch.zeros(0), torch.zeros(0, 3), torch.tensor(2.0)):
        for operator in (Operator("bernoulli", "l1"), Operator("top", consensus="sign")):
            result = merge(x, [x, x], [0.5, 0.5], [0.5, 0.5], operator, keys(2))
            assert result.shape == x.shape
    within(
        merge(torch.tensor(2.0), [torch.tensor(4.0)] * 2, [0.5, 0.5], [0.1, 0.1], Operator("top"), keys(2)),
        6.0,
        0,
    )
