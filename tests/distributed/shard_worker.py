"""Processes that share parameters: takes the runs of ``shard_cases`` under every way of sharding.

Usage: python -m tests.distributed.shard_worker FOLDER

Imports once and forks 2 processes, then 4, joined by gloo. Process RANK of SIZE writes FOLDER/SIZE.RANK.pt:
for each sharding and case the local entries of every parameter and their indices in the unsharded one, which
torch tells by sharding a model that holds its own indices. Checkpoints go to FOLDER/saved.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # sharding imports it: once, here
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.distributed.shard_cases import (
    CASES,
    RESUMED,
    RESUMED_IN_FULL,
    SAVED_AFTER,
    STEPS,
    TRANSFORMERS,
    WAYS,
    Net,
    gradient,
    load,
    reference_model,
    save,
)
from trimtab import OnTIES, ReferenceDelta, UserError
from trimtab.optim import settling
from trimtab.optim.sharding import local_part

Shard = Callable[[Net], None]
PLAN = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "embed": RowwiseParallel(),
    "head": RowwiseParallel(),
}


def shardings(size: int) -> dict[str, Shard]:
    """The ways to shard a model over this many processes."""
    line = init_device_mesh("cpu", (size,), mesh_dim_names=("all",))

    def fsdp(model: Net) -> None:
        fully_shard(model, mesh=line)

    def nothing(model: Net) -> None:
        """DDP: every process has everything, and equal gradients."""

    def tensor_parallel(model: Net) -> None:
        parallelize_module(model, line, dict(PLAN))

    if size == 2:
        return {"fsdp": fsdp, "ddp": nothing, "tp": tensor_parallel}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def hsdp(model: Net) -> None:
        fully_shard(model, mesh=square)

    def fsdp_over_tp(model: Net) -> None:
        parallelize_module(model, square["inner"], dict(PLAN))
        fully_shard(model, mesh=square["outer"])

    return {"fsdp": fsdp, "hsdp": hsdp, "fsdp over tp": fsdp_over_tp}


def indices(shard: Shard) -> dict[str, Tensor]:
    """The local indices of every parameter, by torch's own sharding."""
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    shard(model)
    return {name: _local(p).to(torch.int64) for name, p in model.named_parameters()}


def _local(p: Tensor) -> Tensor:
    with torch.no_grad():
        return (p.to_local() if isinstance(p, DTensor) else p).detach().clone()


class Sharded:
    """The reference, sharded; made once for each dtype, since that takes longer than a run."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.folder, self.shard, self.where = folder, shard, indices(shard)
        self._models: dict[torch.dtype, tuple[Net, dict[str, Tensor]]] = {}

    def model(self, dtype: torch.dtype) -> Net:
        """The model as it was in the beginning."""
        if dtype not in self._models:
            model = reference_model(self.folder, dtype)
            self.shard(model)
            self._models[dtype] = model, {name: _local(p) for name, p in model.named_parameters()}
        model, start = self._models[dtype]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.grad = None
                (p.to_local() if isinstance(p, DTensor) else p).copy_(start[name])
        return model


class Run:
    """A sharded model and its optimizer."""

    def __init__(self, name: str, sharded: Sharded) -> None:
        self.case, self.where = CASES[name], sharded.where
        self.model = sharded.model(self.case.dtype)
        self.delta = ReferenceDelta.load(sharded.folder / "delta")
        self.optimizer: Any = self.case.build(self.model.named_parameters(), self.delta)

    def steps(self, numbers: Iterable[int]) -> None:
        for step in numbers:
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    p.grad = self.gradient(name, p, step)
            self.optimizer.step()

    def gradient(self, name: str, p: Tensor, step: int) -> Tensor | None:
        full = gradient(name, step, p.shape, p.dtype)
        if full is None or not isinstance(p, DTensor):
            return full
        local = full.reshape(-1)[self.where[name]]
        return DTensor.from_local(
            local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def result(self) -> dict[str, tuple[Tensor, Tensor]]:
        self.optimizer.merge_now()
        return {name: (self.where[name], _local(p)) for name, p in self.model.named_parameters()}


@contextmanager
def counted(delta: ReferenceDelta) -> Iterator[dict[str, list[Any]]]:
    """Note which parts of τ are read."""
    read: dict[str, list[Any]] = {"whole": [], "parts": []}
    tensor, part = delta.tensor, delta.slice

    def whole(name: str, *args: Any, **more: Any) -> Tensor:
        read["whole"].append(name)
        return tensor(name, *args, **more)

    def sliced(name: str, slices: tuple[slice, ...], *args: Any, **more: Any) -> Tensor:
        values = part(name, slices, *args, **more)
        read["parts"].append((name, [(s.start, s.stop) for s in slices], values.numel()))
        return values

    delta.tensor, delta.slice = whole, sliced  # type: ignore[method-assign]
    yield read


def accelerate_order(sharded: Sharded) -> dict[str, Any]:
    """The optimizer is built on the plain model; then accelerate shards it and swaps the parameters."""
    run = Run("onties", Sharded(sharded.folder, lambda model: None))
    names = {p: name for name, p in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            stand_in = torch.empty(1)
            stand_in.data_ptr = names[p]  # type: ignore[assignment,method-assign]
            group["params"][i] = stand_in
    sharded.shard(run.model)
    fsdp2_switch_optimizer_parameters(run.optimizer, dict(run.model.named_parameters()))
    run.where = sharded.where
    run.steps(range(1, STEPS + 1))
    return run.result()


def transformers_order(folder: Path, rank: int) -> dict[str, Any]:
    """A model that transformers shards at loading, trained on texts of its own; τ from two model folders."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / "reference", distributed_config=DistributedConfig(fsdp_size=2)
    )
    delta = ReferenceDelta.between(reference=folder / "reference", base=folder / "base")
    optimizer = OnTIES(model.named_parameters(), delta, **TRANSFORMERS)
    tokens = torch.arange(24).view(1, 24) * (3 + rank) % 104
    gradients: list[dict[str, Tensor]] = []
    with counted(delta) as read:
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
    end = {name: whole(p) for name, p in model.named_parameters()}
    local = {name: _local(p).numel() for name, p in model.named_parameters()}
    return {"gradients": gradients, "end": end, "read": read, "local": local}


def whole(p: Any) -> Tensor:
    """All of a parameter or gradient."""
    return p.detach().full_tensor().clone()


def refusals(sharded: Sharded, rank: int) -> dict[str, str]:
    """What goes wrong, said in a sentence in every process."""
    run, said = Run("onties", sharded), {}
    for name, p in run.model.named_parameters():
        if p.requires_grad and not (rank == 0 and name == "row"):
            p.grad = run.gradient(name, p, 1)
    said["gradients differ"] = _said(run.optimizer.step)
    run = Run("onties", sharded)
    if rank == 1:
        with torch.no_grad():
            run.model.embed.weight.to_local()[0, 0] += 1  # type: ignore[attr-defined]
    said["policy differs"] = _said(lambda: run.steps([1]))
    return said


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def work(folder: Path, rank: int, size: int) -> None:
    ways = {way: Sharded(folder, shard) for way, shard in shardings(size).items()}
    results: dict[str, Any] = {"runs": {}, "read": {}, "layouts": {}, "resumed": {}}
    for way, sharded in ways.items():
        for name in WAYS[size][way]:
            run = Run(name, sharded)
            with counted(run.delta) as results["read"][way, name]:
                run.steps(range(1, SAVED_AFTER + 1))
                if name in RESUMED and way == "fsdp":
                    save(folder / "saved" / f"{size} {name}", run.model, run.optimizer)
                    if name in RESUMED_IN_FULL and size == 2:
                        save_full(folder / f"{name}.pt", run, rank)
                run.steps(range(SAVED_AFTER + 1, STEPS + 1))
            results["runs"][way, name] = run.result()
        results["layouts"][way] = layouts(sharded)
    if size == 4:
        results["resumed"] = {name: resumed(name, ways["fsdp"]) for name in RESUMED}
        results["resumed in full"] = {
            name: resumed_in_full(name, ways["fsdp"], rank) for name in RESUMED_IN_FULL
        }
    else:
        results["runs"]["accelerate's order", "onties"] = accelerate_order(ways["fsdp"])
        results["refused"] = refusals(ways["fsdp"], rank)
        results["transformers"] = transformers_order(folder, rank)
    torch.save(results, folder / f"{size}.{rank}.pt")


def resumed(name: str, sharded: Sharded) -> dict[str, Any]:
    """The rest of a run that two processes have begun."""
    run = Run(name, sharded)
    load(sharded.folder / "saved" / f"2 {name}", run.model, run.optimizer)
    run.steps(range(SAVED_AFTER + 1, STEPS + 1))
    return run.result()


def save_full(path: Path, run: Run, rank: int) -> None:
    """A checkpoint in one file, as accelerate writes it for FULL_STATE_DICT."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    weights, state = get_state_dict(run.model, run.optimizer, options=whole)
    if rank == 0:
        torch.save({"model": weights, "optimizer": state}, path)


def resumed_in_full(name: str, sharded: Sharded, rank: int) -> dict[str, Any]:
    """The same from the file: the first process reads it and hands out the shards."""
    run = Run(name, sharded)
    saved = {"model": {}, "optimizer": {}}
    if rank == 0:
        saved = torch.load(sharded.folder / f"{name}.pt", weights_only=True)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    set_model_state_dict(run.model, saved["model"], options=whole)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=whole)
    run.steps(range(SAVED_AFTER + 1, STEPS + 1))
    return run.result()


def layouts(sharded: Sharded) -> dict[str, Tensor]:
    """Where the library thinks that the local entries lie."""
    model = sharded.model(torch.float32)
    found = {name: local_part(p)[1] for name, p in model.named_parameters()}
    return {name: layout.indices().view(layout.local) for name, layout in found.items()}


def join(folder: Path, rank: int, size: int) -> None:
    signal.alarm(560)  # whatever happens, no process is left behind
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous.{size}"
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=200)
    )
    if size == 2:
        settling.BUCKET = 400  # most parameters have a bucket to themselves
    work(folder, rank, size)
    distributed.destroy_process_group()


def forked(folder: Path, rank: int, size: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        join(folder, rank, size)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> None:
    for size in (2, 4):
        children = [forked(folder, rank, size) for rank in range(size)]
        failed = 0
        for child in children:
            failed |= os.waitpid(child, 0)[1]
        if failed:
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
