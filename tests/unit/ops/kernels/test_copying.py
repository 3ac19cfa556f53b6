"""Copies of many tensors, past the caches or not, are copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trimtab.ops.kernels import copying, native


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def sources() -> list[Tensor]:
    """Of all sizes up to a few pieces, in several dtypes; at an odd address, not contiguous, empty."""
    torch.manual_seed(0)
    sizes = [1, 3, 63, 64, 1000, 16_384, 16_385, 70_001, (1 << 20) - 1, 1 << 20, 3_000_001]
    plain = [torch.randn(size) for size in sizes]
    low = [
        torch.randn(size).to(dtype) for size in (40_001, 600_001) for dtype in (torch.bfloat16, torch.float64)
    ]
    return [*plain, *low, torch.randn(900_001)[1:], torch.randn(700, 900).t(), torch.empty(0)]


@pytest.mark.parametrize("odd", [False, True])
def test_copies_are_equal_and_stay_inside(odd: bool) -> None:
    given = sources()
    around = [torch.full((x.numel() + 33,), 7.0, dtype=x.dtype) for x in given]
    to = [whole[16 + odd :][: x.numel()].view(x.shape) for whole, x in zip(around, given, strict=True)]
    assert sum(x.numel() * x.itemsize for x in given) > copying.ENOUGH
    copying.copy_all(list(zip(to, given, strict=True)))
    for whole, one, x in zip(around, to, given, strict=True):
        assert torch.equal(one, x)
        assert (whole[: 16 + odd] == 7).all()
        assert (whole[16 + odd + x.numel() :] == 7).all()


@pytest.mark.skipif(not native.available(), reason=f"no CPU kernels: {native.reason()}")
def test_the_kernels_take_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    copy = native.copy_all
    monkeypatch.setattr(
        native, "copy_all", lambda pairs: (taken.extend(x.numel() for _, x in pairs), copy(pairs))
    )
    given = [torch.randn(n) for n in (100, 5_000_000)]
    copying.copy_all([(torch.zeros_like(x), x) for x in given])
    assert taken == [5_000_000]
    copying.copy_all([(torch.zeros_like(x), x) for x in given], native=False)
    copying.copy_all([(torch.zeros_like(x), x) for x in given[:1]])
    assert taken == [5_000_000]


def test_nothing_is_fine() -> None:
    copying.copy_all([])
    if native.available():
        native.copy_all([])
