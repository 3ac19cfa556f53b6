"""Takes the same steps in one process and in two: with shards of a model, and with replicas of it.

Usage: python -m tests.distributed.regulariser_worker FOLDER

Writes FOLDER/alone.pt, and FOLDER/RANK.pt for each of two processes: the whole parameters, and their
averages, by how they are held and by regulariser.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trimtab import OnDARE, ReferenceDelta, UserError
from trimtab.optim import (
    EMA,
    ChildTuning,
    ElasticReset,
    FisherChildTuning,
    GradientProjection,
    PullToReference,
)

SIZE, STEPS = 2, 5
ROWS = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def losses(policy: torch.nn.Module) -> Callable[[], Any]:
    """This process's share of the rows' losses."""
    joined = distributed.is_initialized()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)
    return lambda: (policy(row).square().sum() for row in ROWS[rank::size])


ELEMENTWISE: dict[str, Callable[[torch.nn.Module, Any], Any]] = {
    "ema": lambda _, optimizer: EMA(optimizer, 0.25),
    "pull": lambda _, optimizer: PullToReference(optimizer, 0.25),
    "elastic reset": lambda _, optimizer: ElasticReset(optimizer, 0.25, every=2),
    "child tuning": lambda _, optimizer: ChildTuning(optimizer, 0.5, seed=3),
}
OF_WHOLE_TENSORS: dict[str, Callable[[torch.nn.Module, Any], Any]] = {
    "fisher": lambda policy, optimizer: FisherChildTuning(optimizer, losses(policy), 0.3),
    "projection": lambda policy, optimizer: GradientProjection(optimizer, [losses(policy)], every=2),
}
KINDS = {**ELEMENTWISE, **OF_WHOLE_TENSORS}


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def trained(kind: str, *, shards: bool) -> dict[str, list[Tensor]]:
    """Parameters and averages after some steps."""
    policy = model(1)
    delta = ReferenceDelta.between(reference=model(1), base=model(0))
    if shards:
        fully_shard(policy, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = OnDARE(policy.named_parameters(), delta, lr=0.05, reserve_rate=0.5, merge_weight=1e-2)
    regulariser = KINDS[kind](policy, optimizer)
    for step in range(STEPS):
        for i, p in enumerate(policy.parameters()):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if shards else gradient
        optimizer.step()
    found = {"parameters": [whole(p) for p in policy.parameters()]}
    if isinstance(regulariser, EMA):
        found["averages"] = [whole(regulariser.average(p)) for p in policy.parameters()]  # type: ignore[arg-type]
        with regulariser.swapped_in():
            found["swapped in"] = [whole(p) for p in policy.parameters()]
        found["swapped out"] = [whole(p) for p in policy.parameters()]
    return found


def refusal(kind: str) -> str:
    try:
        trained(kind, shards=True)
    except UserError as error:
        return str(error)
    return "not refused"


def share(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=SIZE)
    found = {
        "shards": {kind: trained(kind, shards=True) for kind in ELEMENTWISE},
        "replicas": {kind: trained(kind, shards=False) for kind in KINDS},
        "refused": {kind: refusal(kind) for kind in OF_WHOLE_TENSORS},
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    torch.save({kind: trained(kind, shards=False) for kind in KINDS}, folder / "alone.pt")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=share, args=(rank, folder)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
