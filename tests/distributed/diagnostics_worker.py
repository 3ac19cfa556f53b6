"""Takes the same steps with all of a model and with shards of it, and writes what was measured.

Usage: python -m tests.distributed.diagnostics_worker FOLDER

Writes FOLDER/alone.pt, and FOLDER/RANK.pt for each of two processes that share the parameters (FSDP2).
"""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trimtab import OnDARE, OnTIES, ReferenceDelta

SIZE, STEPS = 2, 4
EXACT = {
    "ondare": (OnDARE, {"kernel": "torch"}),
    "onties": (OnTIES, {"kernel": "torch"}),
    "l1": (OnDARE, {"rescale": "l1", "consensus": "sign", "kernel": "torch"}),
}
"""The torch engine measures every entry of a merge."""

SAMPLED = {"ondare-sampled": (OnDARE, {}), "onties-sampled": (OnTIES, {})}
"""Others measure a sample, which is another one for other shards."""

KINDS = {**EXACT, **SAMPLED}


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(33, 41), torch.nn.Linear(41, 7))


def found(kind: str, *, shards: bool) -> dict[str, Any]:
    """The diagnostics after some steps, and the numbers in the param groups."""
    build, settings = KINDS[kind]
    delta = ReferenceDelta.between(reference=model(1), base=model(0))
    policy = model(1)
    if shards:
        fully_shard(policy, mesh=init_device_mesh("cpu", (SIZE,)))
    named = list(policy.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "merge_weight": 2e-2}]
    common = {"lr": 1e-3, "reserve_rate": 0.4, "merge_weight": 1e-2, "measure_every": 2}
    optimizer = build(groups, delta, **common, **settings)
    for step in range(STEPS):
        for i, (_, p) in enumerate(named):
            generator = torch.Generator().manual_seed(100 * step + i)
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
    numbers = [{k: v for k, v in g.items() if isinstance(v, int | float)} for g in optimizer.param_groups]
    return {"diagnostics": asdict(optimizer.diagnostics), "groups": numbers}


def share(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=SIZE)
    torch.save({kind: found(kind, shards=True) for kind in KINDS}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    torch.save({kind: found(kind, shards=False) for kind in KINDS}, folder / "alone.pt")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=share, args=(rank, folder)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
