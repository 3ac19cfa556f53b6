"""A small policy, its delta, and a step with keyed random gradients."""

from __future__ import annotations

import pytest
import torch

from trimtab import ReferenceDelta


def small_model(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).to(dtype)


def take_step(model, optimizer, t: int, dtype=torch.float32) -> None:
    generator = torch.Generator().manual_seed(1000 + t)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16).to(p.dtype)
    optimizer.step()


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().to(torch.float64).flatten() for p in model.parameters()])


@pytest.fixture
def base():
    return small_model(0)


@pytest.fixture
def policy():
    return small_model(1)


@pytest.fixture
def delta(base):
    return ReferenceDelta.between(reference=small_model(1), base=base)
