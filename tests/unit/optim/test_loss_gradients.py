"""ChildTuning-D and the projection: what they take from the gradients of other losses, held to the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import regularisers as oracle
from trimtab import UserError
from trimtab.ops import kth_largest, normalized, project_out
from trimtab.optim import FisherChildTuning, GradientProjection
from trimtab.optim.loss_gradients import mean_gradients


def model_and_rows() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    return model, torch.randn(6, 4, dtype=torch.float64)


def losses_of(model: torch.nn.Module, rows: torch.Tensor) -> Any:
    def losses() -> Iterator[torch.Tensor]:
        for row in rows:
            yield model(row).square().sum()

    return losses


def gradients_of(model: torch.nn.Module, row: torch.Tensor) -> list[list[float]]:
    """The gradient of one row's loss, by backward."""
    model.zero_grad()
    model(row).square().sum().backward()
    found = [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def set_gradients(model: torch.nn.Module, seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]


def test_the_fisher_mask_is_of_all_entries_together_and_stays() -> None:
    model, rows = model_and_rows()
    expected = oracle.most_informed([gradients_of(model, row) for row in rows], 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []

    def losses() -> Any:
        calls.append(1)
        return losses_of(model, rows)()

    FisherChildTuning(optimizer, losses, 0.3)
    for t in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        gradients = set_gradients(model, t)
        optimizer.step()
        for p, start, gradient, kept in zip(model.parameters(), before, gradients, expected, strict=True):
            moved = start.flatten() - 0.1 * torch.tensor(oracle.masked(gradient, kept), dtype=torch.float64)
            assert torch.allclose(p.flatten(), moved, rtol=0, atol=1e-15)
    assert len(calls) == 1
    assert 0 < sum(map(sum, expected)) == 12  # 0.3 of 37, rounded up


def test_entries_without_information_are_never_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    FisherChildTuning(optimizer, lambda: [weight[:1].sum() * 2], 0.75)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert weight.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_a_parameter_without_a_gradient_at_the_first_step_is_refused() -> None:
    model, rows = model_and_rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FisherChildTuning(optimizer, losses_of(model, rows), 0.3)
    set_gradients(model, 0)
    next(model.parameters()).grad = None
    with pytest.raises(UserError, match="a gradient of every trained parameter at its first step"):
        optimizer.step()


def test_parameters_that_come_after_the_mask_are_refused() -> None:
    weight, more = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    FisherChildTuning(optimizer, lambda: [weight.sum()], 0.5)
    weight.grad = more.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [more]})
    with pytest.raises(UserError, match="parameters were added after ChildTuning-D had chosen"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["fisher", "projection"])
def test_rows_that_give_nothing_are_refused(kind: str) -> None:
    for rows, sentence in (([], "no rows"), ([float("nan")], "not finite")):
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.SGD([weight], lr=1.0)

        def losses(weight: torch.Tensor = weight, rows: list[float] = rows) -> Any:
            return [weight.sum() * row for row in rows]

        if kind == "fisher":
            FisherChildTuning(optimizer, losses, 0.5)
        else:
            GradientProjection(optimizer, [losses])
        weight.grad = torch.ones(4)
        with pytest.raises(UserError, match=sentence):
            optimizer.step()
        assert weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_the_projection_is_the_oracle_s_and_is_refreshed_in_time(sets: int) -> None:
    model, rows = model_and_rows()
    parts = [rows[index::sets] for index in range(sets)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientProjection(optimizer, [losses_of(model, part) for part in parts], every=2)
    directions: list[list[list[float]]] = []
    for t in range(5):
        if t % 2 == 0:
            means = []
            for part in parts:
                found = [gradients_of(model, row) for row in part]
                tensors = [torch.tensor(one, dtype=torch.float64) for one in zip(*found, strict=True)]
                means.append([tensor.mean(0).tolist() for tensor in tensors])
            directions = [list(tensor) for tensor in zip(*means, strict=True)]
        before = [p.detach().clone() for p in model.parameters()]
        gradients = set_gradients(model, t)
        optimizer.step()
        for p, begin, gradient, axes in zip(model.parameters(), before, gradients, directions, strict=True):
            expected = torch.tensor(oracle.rejected(gradient, axes), dtype=torch.float64)
            assert torch.allclose(begin.flatten() - 0.1 * expected, p.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("projected", "order"), [(False, 1), (True, 2)])
def test_a_projected_step_leaves_the_capability_loss_alone_to_first_order(
    projected: bool, order: int
) -> None:
    changes = []
    for size in (1e-3, 1e-4):
        model, rows = model_and_rows()
        optimizer = torch.optim.SGD(model.parameters(), lr=size)
        if projected:
            GradientProjection(optimizer, [losses_of(model, rows)])
        set_gradients(model, 1)
        before = total(model, rows)
        optimizer.step()
        changes.append(abs(total(model, rows) - before))
    assert changes[0] / changes[1] == pytest.approx(10**order, rel=0.1)


@torch.no_grad()
def total(model: torch.nn.Module, rows: torch.Tensor) -> float:
    return sum(float(loss) for loss in losses_of(model, rows)())


vectors = st.lists(st.floats(-10, 10, allow_nan=False, width=32), min_size=6, max_size=6)


@settings(deadline=None, max_examples=60)
@given(vectors, st.lists(vectors, min_size=1, max_size=3))
def test_what_is_left_is_orthogonal_to_every_direction(vector: list[float], axes: list[list[float]]) -> None:
    gradient = torch.tensor(vector, dtype=torch.float64).view(2, 3)
    directions = normalized(torch.tensor(axes, dtype=torch.float64).view(-1, 2, 3))
    left = project_out(gradient.clone(), directions)
    length = float(gradient.norm())
    for direction in directions:
        assert abs(float((left * direction).sum())) <= 1e-4 * length
    assert float(left.norm()) <= length * (1 + 1e-9)
    again = project_out(left.clone(), directions)
    assert torch.allclose(again, left, rtol=0, atol=1e-4 * max(length, 1e-300))


def test_a_direction_counts_whatever_its_length() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientProjection(optimizer, [lambda: [weight[1] * 1e4], lambda: [weight[2] * 1e-4]])
    weight.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0, 1, 1], abs=1e-12)


@pytest.mark.parametrize("squared", [False, True])
def test_gradients_are_averaged_over_the_losses_and_left_where_they_are(squared: bool) -> None:
    model, rows = model_and_rows()
    each = [gradients_of(model, row) for row in rows]
    set_gradients(model, 0)
    before = [p.grad for p in model.parameters()]
    found = mean_gradients(losses_of(model, rows), list(model.parameters()), squared=squared)
    for place, (p, gradient) in enumerate(zip(model.parameters(), found, strict=True)):
        wanted = torch.tensor([row[place] for row in each], dtype=torch.float64)
        wanted = (wanted**2 if squared else wanted).sum(0) / len(rows)
        assert torch.allclose(gradient.flatten(), wanted, rtol=0, atol=1e-14)
        assert p.grad is before[place]


def test_a_gradient_that_meets_no_learning_rate_is_projected_before_it_enters_the_momentum() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0, momentum=0.5)
    GradientProjection(optimizer, [lambda: [weight[1] * 2]])
    for lr, gradient in ((0.0, 1.0), (1.0, 0.0)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.full((2,), gradient)
        optimizer.step()
    assert weight.tolist() == [0.5, 1.0]


def test_large_and_strided_gradients_are_projected_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.ops.projection._CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 5, generator=generator, dtype=torch.float64).T
    directions = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    expected = oracle.rejected(gradient.flatten().tolist(), [one.flatten().tolist() for one in directions])
    kept = gradient.clone()
    assert project_out(kept, directions) is kept
    assert kept.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), max_size=8), min_size=1, max_size=4), st.data())
def test_the_kth_largest_is_that_of_the_sorted_list(lists: list[list[float]], data: st.DataObject) -> None:
    ranked = sorted((value for values in lists for value in values), reverse=True)
    if not ranked:
        with pytest.raises(ValueError, match="there is no 1-th largest of 0"):
            kth_largest([torch.tensor(values) for values in lists], 1)
        return
    k = data.draw(st.integers(1, len(ranked)))
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    assert kth_largest(tensors, k) == ranked[k - 1]
