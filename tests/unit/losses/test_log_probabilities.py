"""Log-probabilities of given tokens against torch.log_softmax in float64, and what they allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.losses import head_log_probabilities, log_probabilities, selective_log_softmax

N, D, V = 13, 5, 11
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2}


def inputs(dtype: torch.dtype, positions: int = N, vocabulary: int = V) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, D, generator=draw).to(dtype)
    weight = torch.randn(vocabulary, D, generator=draw).to(dtype)
    bias = torch.randn(vocabulary, generator=draw).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=draw)
    slopes = torch.randn(positions, generator=draw)
    return hidden, weight, bias, targets, slopes


def gradients(result: torch.Tensor, slopes: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((result * slopes.to(result.dtype)).sum(), leaves))


@pytest.mark.parametrize("chunk", [1, 4, 13, None])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_those_of_log_softmax(
    dtype: torch.dtype, biased: bool, chunk: int | None
) -> None:
    hidden, weight, bias, targets, slopes = inputs(dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)[: 2 + biased]]
    ours = head_log_probabilities(leaves[0], leaves[1], targets, *leaves[2:], chunk=chunk)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(wide[0], wide[1], *wide[2:])
    theirs = torch.log_softmax(logits, -1)[torch.arange(N), targets]
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(ours.double(), theirs, **near)
    pairs = zip(gradients(ours, slopes, leaves), gradients(theirs, slopes, wide), strict=True)
    for mine, expected in pairs:
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), expected, **near)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_same_from_logits(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, V, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(V, (3, 4), generator=draw)
    slopes = torch.randn(3, 4, generator=draw)
    ours = selective_log_softmax(logits, targets, chunk=5)
    wide = logits.detach().double().requires_grad_()
    theirs = torch.log_softmax(wide, -1).gather(-1, targets[..., None]).squeeze(-1)
    near = {"rtol": TOLERANCE[dtype] / 10, "atol": TOLERANCE[dtype] / 10}
    torch.testing.assert_close(ours.double(), theirs, **near)
    before = logits.detach().clone()
    (mine,) = gradients(ours, slopes, [logits])
    torch.testing.assert_close(mine.double(), gradients(theirs, slopes, [wide])[0], **near)
    assert torch.equal(logits, before)  # the backward pass writes over copies only


def test_gradcheck() -> None:
    hidden, weight, bias, targets, _ = inputs(torch.float64, positions=4, vocabulary=6)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: head_log_probabilities(h, w, targets, b, chunk=3), leaves)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: selective_log_softmax(z, targets, chunk=3), [logits])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_asked_for_is_computed(frozen: str) -> None:
    hidden, weight, _, targets, slopes = inputs(torch.float32)
    leaf = weight if frozen == "hidden" else hidden
    leaf.requires_grad_()
    (gradient,) = gradients(head_log_probabilities(hidden, weight, targets), slopes, [leaf])
    assert gradient.shape == leaf.shape


def test_large_logits_and_no_positions() -> None:
    weight = torch.tensor([[1e4], [0.0]])
    result = head_log_probabilities(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    assert result.tolist() == [0.0, -1e4]
    none = head_log_probabilities(torch.ones(0, 1, requires_grad=True), weight, torch.zeros(0).long())
    none.sum().backward()
    assert none.shape == (0,)


def test_under_autocast_the_product_is_taken_in_its_dtype() -> None:
    hidden, weight, _, targets, slopes = inputs(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_log_probabilities(*leaves, targets, chunk=4)
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    theirs = head_log_probabilities(*low, targets, chunk=4)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    for mine, expected in zip(gradients(ours, slopes, leaves), gradients(theirs, slopes, low), strict=True):
        torch.testing.assert_close(mine, expected.float(), rtol=1e-2, atol=1e-2)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_logits_is_allocated(dtype: torch.dtype) -> None:
    hidden, weight, _, targets, _ = inputs(dtype, positions=64, vocabulary=97)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with Largest() as chunked:
        head_log_probabilities(*leaves, targets, chunk=8).sum().backward()
    assert chunked.elements == 8 * 97  # a chunk, in both passes; the weight has 485 elements
    with Largest() as whole:
        torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None]).sum().backward()
    assert whole.elements == 64 * 97  # the measure sees what it should


def test_chunks_are_bounded_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probabilities, "CHUNK_ELEMENTS", 8 * 97)
    hidden, weight, _, targets, _ = inputs(torch.float32, positions=64, vocabulary=97)
    with Largest() as projected:
        head_log_probabilities(hidden.requires_grad_(), weight, targets).sum().backward()
    assert projected.elements == 8 * 97
    logits = (hidden.detach() @ weight.T).bfloat16()
    with Largest() as selected:
        selective_log_softmax(logits, targets)
    assert selected.elements == 8 * 97
    with torch.inference_mode():  # a chunk holds one position at least
        monkeypatch.setattr(log_probabilities, "CHUNK_ELEMENTS", 1)
        assert head_log_probabilities(hidden, weight, targets).shape == (64,)
