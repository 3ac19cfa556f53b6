"""⊕: what entries of weighted terms add up to.

On a dyadic grid (small multiples of 1/32, weights in quarters) every product and sum is exact in every dtype,
so there the results must be equal; off the grid they are held to a stated number of units in the last place.
"""

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
    same_bits,
    same_values,
    shapes,
    tensors,
    ties,
    wild,
    within,
)
from trimtab.ops import agreeing_terms, consensus

KINDS = ["linear", "sign", "sign_unweighted"]
kinds = st.sampled_from(KINDS)
quarters = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def from_float64(values: object, like: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64)).reshape(like.shape).to(like.dtype)


@st.composite
def weighted_terms(draw: st.DrawFn, content: st.SearchStrategy[float], weights: st.SearchStrategy[float]):
    shape, dtype, count = draw(shapes), draw(dtypes), draw(st.integers(1, 3))
    terms = [draw(tensors(shape=shape, dtype=dtype, content=content)) for _ in range(count)]
    return terms, [draw(weights) for _ in range(count)]


@bounded(300)
@given(weighted=weighted_terms(ties, quarters), kind=kinds)
def test_exact_on_the_dyadic_grid(weighted: tuple[list[Tensor], list[float]], kind: str) -> None:
    terms, weights = weighted
    before = [term.clone() for term in terms]
    result = consensus(terms, weights, kind)
    expected = oracle.consensus([as_float64(t) for t in terms], weights, kind)
    assert same_values(result, from_float64(expected, terms[0]))
    assert all(same_bits(a, b) for a, b in zip(terms, before, strict=True)), "an input was changed"


@bounded(200)
@given(weighted=weighted_terms(ties, st.sampled_from([0.25, 0.5, 1.0, 2.0])), kind=kinds)
def test_normalized_by_the_weights_that_agree(weighted: tuple[list[Tensor], list[float]], kind: str) -> None:
    terms, weights = weighted
    result = consensus(terms, weights, kind, normalize=True)
    within(result, oracle.consensus([as_float64(t) for t in terms], weights, kind, normalize=True), units=1)


@bounded(200)
@given(weighted=weighted_terms(wild, st.sampled_from([0.25, 0.5, 0.75])), kind=kinds)
def test_nan_and_infinity_follow_the_oracle(weighted: tuple[list[Tensor], list[float]], kind: str) -> None:
    terms, weights = weighted
    result = consensus(terms, weights, kind)
    expected = from_float64(oracle.consensus([as_float64(t) for t in terms], weights, kind), terms[0])
    special = ~expected.isfinite()
    assert torch.equal(~result.isfinite(), special)
    assert same_values(result[special], expected[special])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", [(0.9, 0.1), (1 - 1e-7, 1e-7), (0.0, 1.0), (1.0, 0.0), (0.3, 0.3, 0.4)])
def test_ordinary_numbers_within_three_units(
    kind: str, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    generator = torch.Generator().manual_seed(11)
    terms = [torch.randn(40, 50, generator=generator, dtype=torch.float64).to(dtype) for _ in weights]
    arrays = [as_float64(t) for t in terms]
    expected = oracle.consensus(arrays, weights, kind)
    size = sum(abs(w) * np.abs(a) for w, a in zip(weights, arrays, strict=True))
    votes = sum(w * a for w, a in zip(weights, arrays, strict=True)) if kind == "sign" else sum(arrays)
    clear = (np.abs(votes) > 8 * torch.finfo(dtype).eps * size) | (kind == "linear")
    error = np.abs(as_float64(consensus(terms, weights, kind)) - expected)
    assert clear.mean() > 0.99
    assert bool((error[clear] <= 3 * torch.finfo(dtype).eps * size[clear]).all())


@bounded(150)
@given(weighted=weighted_terms(ties, quarters), kind=kinds)
def test_agreeing_terms_add_up_to_the_consensus(
    weighted: tuple[list[Tensor], list[float]], kind: str
) -> None:
    terms, weights = weighted
    parts = agreeing_terms(terms, weights, kind)
    assert len(parts) == len(terms)
    total = sum(as_float64(part) for part in parts)
    assert same_values(consensus(terms, weights, kind), from_float64(total, terms[0]))
    if kind == "sign":  # what is left never disagrees with itself
        assert not bool(((torch.stack(parts) > 0).any(0) & (torch.stack(parts) < 0).any(0)).any())


@bounded(100)
@given(x=tensors(content=ties), weight=quarters, kind=st.sampled_from(["linear", "sign"]))
def test_one_term_is_its_own_consensus(x: Tensor, weight: float, kind: str) -> None:
    assert same_values(consensus([x], [weight], kind), from_float64(weight * as_float64(x), x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unweighted_tie_counts_as_plus_and_a_weighted_one_as_nothing(dtype: torch.dtype) -> None:
    x, y = torch.tensor([1.0, -1.0, 0.0], dtype=dtype), torch.tensor([-1.0, 1.0, 0.0], dtype=dtype)
    assert consensus([x, y], [0.25, 0.75], "sign_unweighted").tolist() == [0.25, 0.75, 0.0]
    assert consensus([x, y], [0.5, 0.5], "sign").tolist() == [0.0, 0.0, 0.0]


def test_the_smallest_numbers_still_vote() -> None:
    tiny = torch.tensor([5e-324, -5e-324], dtype=torch.float64)
    assert consensus([tiny, -2 * tiny], [1.0, 1.0], "sign").tolist() == [-1e-323, 1e-323]


def test_where_the_reference_delta_is_zero_the_update_has_its_own_vote() -> None:
    update, tau = torch.tensor([-3e-6, 4e-6, -5e-6]), torch.tensor([1e-3, 0.0, -1e-3])
    assert consensus([update, tau], [1 - 1e-7, 1e-7], "sign")[0] == update[0] * (1 - 1e-7)
    unweighted = consensus([update, tau], [1 - 1e-7, 1e-7], "sign_unweighted")
    assert unweighted[0] == tau[0] * 1e-7  # |tau| >> |update|: tau decides
    assert unweighted[1] == update[1] * (1 - 1e-7)
    assert math.isclose(unweighted[2].item(), -5e-6 - 1e-10, rel_tol=1e-6)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="sgn"):
        consensus([torch.ones(2)], [1.0], "sgn")
