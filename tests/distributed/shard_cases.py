"""The runs that several processes take together and one takes alone: models, gradients, optimizers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab import OnDARE, OnlineMerging, OnTIES, ReferenceDelta

STEPS = 6
SAVED_AFTER = 3
COMMON = {"lr": 1e-3, "weight_decay": 0.1, "merge_weight": 1e-2, "without_delta": "head", "seed": 5}
MERGED = {"merge_weight": 1e-2, "without_delta": "head", "seed": 5}
TRANSFORMERS = {"lr": 1e-3, "reserve_rate": 0.3, "merge_weight": 1e-2, "weight_decay": 0.1}
"""The arguments of the optimizer on a model that transformers has sharded."""
SPARSE = [("down.weight", 2), ("up.bias", 1), ("up.bias", 4)]
"""(parameter, step from 1) without a gradient."""


class Net(nn.Module):
    """Rows that 2 and 4 do not divide, a single row, a frozen parameter, and one that has no delta."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 12)
        self.up = nn.Linear(12, 26)
        self.down = nn.Linear(26, 12, bias=False)
        self.scale = nn.Parameter(torch.ones(7))
        self.row = nn.Parameter(torch.ones(1, 12))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.head = nn.Linear(12, 3)


Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One optimizer on parameters of one dtype."""

    build: Callable[[Named, ReferenceDelta], Optimizer]
    dtype: torch.dtype = torch.float32


def _ondare(**more: Any) -> Callable[[Named, ReferenceDelta], Optimizer]:
    return lambda named, delta: OnDARE(named, delta, **{**COMMON, "reserve_rate": 0.4, **more})


def _onties(**more: Any) -> Callable[[Named, ReferenceDelta], Optimizer]:
    return lambda named, delta: OnTIES(named, delta, **{**COMMON, "reserve_rate": 0.3, **more})


def _around(inner: Callable[[Named], Optimizer], **more: Any) -> Callable[[Named, ReferenceDelta], Optimizer]:
    return lambda named, delta: OnlineMerging(inner(named), delta, **{**MERGED, "reserve_rate": 0.3, **more})


def _adamw(named: Named) -> Optimizer:
    return torch.optim.AdamW(named, lr=1e-3, weight_decay=0.1)


def _sgd(named: Named) -> Optimizer:
    return torch.optim.SGD(named, lr=1e-2, momentum=0.9)


CASES = {
    "ondare": Case(_ondare()),
    "ondare l1": Case(_ondare(rescale="l1")),
    "ondare released": Case(_ondare(fidelity="released")),
    "ondare masked once, l1": Case(_ondare(redraw=False, rescale="l1")),
    "ondare bf16, stochastic": Case(_ondare(rounding="stochastic"), torch.bfloat16),
    "ondare fp32, residual, K": Case(_ondare(rounding="residual", merge_every=2)),
    "onties": Case(_onties()),
    "onties one entry": Case(_onties(reserve_rate=1e-4)),
    "onties K": Case(_onties(merge_every=4)),
    "onties l1": Case(_onties(rescale="l1", amsgrad=True)),
    "onties released": Case(_onties(fidelity="released")),
    "onties bf16, residual": Case(_onties(merge_every=2), torch.bfloat16),
    "onties fp64": Case(_onties(), torch.float64),
    "onties bf16 state": Case(_onties(state_dtype="bfloat16", delta_storage="int8")),
    "top around adamw": Case(_around(_adamw, sparsify="top", consensus="sign")),
    "top around adamw, K": Case(
        _around(_adamw, sparsify="top", consensus="sign", rescale="l1", merge_every=2)
    ),
    "bernoulli around sgd": Case(_around(_sgd)),
    "bernoulli around sgd, l1": Case(_around(_sgd, rescale="l1")),
    "top around sgd, bf16": Case(_around(_sgd, sparsify="top", consensus="sign"), torch.bfloat16),
}
MAIN = ("ondare l1", "onties", "onties K", "onties bf16, residual", "bernoulli around sgd, l1")
RESUMED = ("ondare l1", "onties K", "onties bf16, residual", "ondare bf16, stochastic", "top around adamw, K")
RESUMED_IN_FULL = ("onties bf16, residual", "top around adamw, K")
WAYS = {
    2: {"fsdp": tuple(CASES), "tp": MAIN, "ddp": MAIN},
    4: {"fsdp": tuple(dict.fromkeys((*MAIN, *RESUMED))), "hsdp": MAIN, "fsdp over tp": MAIN},
}
"""Number of processes -> way of sharding -> what is run."""


def write_delta(folder: Path) -> None:
    """Save a reference's weights and its delta, which all processes read."""
    torch.manual_seed(0)
    reference, base = Net(), Net()
    with torch.no_grad():
        for p, q in zip(reference.parameters(), base.parameters(), strict=True):
            q.copy_(p + 0.02 * torch.randn(p.shape))
    for module in (reference, base):
        del module.head
    delta = ReferenceDelta.between(reference=reference, base=base)
    delta.save(folder / "delta")
    head = nn.Linear(12, 3)
    weights = reference.state_dict() | {f"head.{name}": p for name, p in head.state_dict().items()}
    torch.save(weights, folder / "reference.pt")


def reference_model(folder: Path, dtype: torch.dtype) -> Net:
    model = Net()
    model.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))
    return model.to(dtype)


def gradient(name: str, step: int, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """The gradient that every run has; many of its magnitudes are equal, so that the top must cut ties."""
    if (name, step) in SPARSE:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    values = torch.randn(shape, generator=generator)
    return values.mul_(2).round_().div_(64).to(dtype)


def run_alone(
    folder: Path, case: Case, steps: Iterable[int], resume: Path | None = None
) -> dict[str, Tensor]:
    """Parameters after a run in this process, gathered interval merged."""
    model = reference_model(folder, case.dtype)
    optimizer = case.build(model.named_parameters(), ReferenceDelta.load(folder / "delta"))
    if resume is not None:
        load(resume, model, optimizer)
    for step in steps:
        for name, p in model.named_parameters():
            p.grad = gradient(name, step, p.shape, p.dtype) if p.requires_grad else None
        optimizer.step()
    optimizer.merge_now()  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def save(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write a checkpoint as torch.distributed.checkpoint does, each process its shards."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Continue from a checkpoint that any number of processes has written."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
