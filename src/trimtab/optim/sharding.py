"""Sharded parameters: what part of one this process has, and who has the others.

A parameter under FSDP2, HSDP or tensor parallelism is a ``DTensor``. This process steps its local part; for
masks it is enough to know the part's :class:`~trimtab.ops.layout.Layout`. ``top`` and the rescaling ``l1``
depend on all of the unsharded tensor, so the processes that share one add up histograms of it
(:mod:`trimtab.optim.settling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from trimtab.errors import UserError
from trimtab.ops.layout import Layout


@dataclass(frozen=True)
class ShardGroup:
    """The processes that a parameter is cut up over, without those that have a replica of the same part.

    Args:
        mesh: the parameter's device mesh.
        dims: those of its dimensions that cut the parameter up.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of processes."""
        return prod(self.mesh.size(dim) for dim in self.dims)

    def __call__(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place, and return it; all of them have to call it."""
        there = values.to(self.mesh.device_type)  # parameters may be kept on the CPU, beside a GPU's mesh
        for dim in self.dims:  # one dimension after the other: the sums of all are known to all
            distributed.all_reduce(there, group=self.mesh.get_group(dim))
        if there is not values:
            values.copy_(there)
        return values

    def gathering(self) -> tuple[int, Callable[[Any], list[Any]]]:
        """The process's place along the group's longest dimension, and what gathers a value along it."""
        dim = max(self.dims, key=self.mesh.size)
        size, along = self.mesh.size(dim), self.mesh.get_group(dim)

        def gather(value: Any) -> list[Any]:
            given: list[Any] = [None] * size
            distributed.all_gather_object(given, value, group=along)
            return given

        return self.mesh.get_local_rank(dim), gather


def local_of(tensor: Tensor) -> Tensor:
    """The local part of a sharded tensor, without gradient; the tensor itself where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local: Any = tensor.to_local()
        found: Tensor = local.wait() if hasattr(local, "wait") else local
        return found.detach()


def local_part(tensor: Tensor) -> tuple[Tensor, Layout, ShardGroup | None]:
    """(local part, its place in the unsharded tensor, the processes with the other parts).

    The group is None for a tensor that every process has in full: a plain one (DDP), or a replicated
    ``DTensor``.

    Raises:
        UserError: a placement that is neither a shard nor a replica, or shards that are no rectangles.

    Examples:
        >>> local_part(torch.zeros(4, 6))[1:]
        (Layout(shape=(4, 6), start=(0, 0), local=(4, 6)), None)
    """
    local = local_of(tensor).detach()
    if not isinstance(tensor, DTensor):
        return local, Layout.whole(tensor.shape), None
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise UserError(
            f"a parameter of shape {tuple(tensor.shape)} lies on the device mesh {mesh}, and this process is "
            "not in it; give the optimizer of each process the parameters it has a part of"
        )
    layout = rectangle(tuple(tensor.shape), tuple(mesh.shape), tuple(coordinate), tuple(tensor.placements))
    if tuple(local.shape) != layout.local:
        raise UserError(
            f"a parameter of shape {tuple(tensor.shape)}, placed {tensor.placements} on a mesh of "
            f"{tuple(mesh.shape)}, has a local part of {tuple(local.shape)}, where {layout.local} was due: "
            "online merging needs shards as torch.chunk cuts them"
        )
    return local, layout, shard_group(tensor)


def shard_group(tensor: Tensor) -> ShardGroup | None:
    """The processes that a tensor is cut up over; None where it is in one piece."""
    if not isinstance(tensor, DTensor):
        return None
    mesh, cut = tensor.device_mesh, [not isinstance(place, Replicate) for place in tensor.placements]
    dims = tuple(dim for dim, cuts in enumerate(cut) if cuts and mesh.size(dim) > 1)
    return ShardGroup(mesh, dims) if dims else None


def like(p: Tensor, local: Tensor) -> Tensor:
    """Make a local part a tensor that is sharded as the parameter is; the counterpart of :func:`local_of`."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def set_data(p: Tensor, values: Tensor) -> None:
    """``p.data = values``, also where both are sharded; there, that alone sets the dtype but not the entries.

    Args:
        p: a parameter; its gradient must be None, since that has the dtype of what is replaced.
        values: a tensor of its shape, sharded as it is, of any dtype.
    """
    p.data = values
    if isinstance(p, DTensor):
        assert isinstance(values, DTensor)
        p._local_tensor, p._spec = values._local_tensor, values._spec


def aligned_grad(p: Tensor) -> Tensor:
    """The gradient, sharded as the parameter is: tensor parallelism may leave it otherwise."""
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        return grad.redistribute(p.device_mesh, p.placements)
    return grad


# -- where a local part lies


@lru_cache(maxsize=1 << 12)
def rectangle(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> Layout:
    """The part of a ``DTensor`` that the process at a coordinate of its mesh has.

    Args:
        shape: the unsharded tensor's.
        mesh: sizes of the mesh's dimensions.
        coordinate: the process's place in it.
        placements: one for each of the mesh's dimensions.

    Raises:
        UserError: a placement is neither a shard nor a replica, or FSDP2 over tensor parallelism has cut a
            dimension so unevenly that its shards are not what their placements say.

    Examples:
        >>> rectangle((97, 6), (4,), (3,), (Shard(0),))
        Layout(shape=(97, 6), start=(75, 0), local=(22, 6))
    """
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for size, at, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            # A strided shard was cut after those to its right, as many as its split factor.
            pieces = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            cuts.setdefault(placement.dim, []).append((size, at, pieces))
        elif not isinstance(placement, Replicate):
            raise UserError(
                f"a parameter of shape {shape} has the placement {placement!r}; online merging steps those "
                "that are sharded or replicated (FSDP2, HSDP, tensor parallelism, DDP)"
            )
    start, local = [0] * len(shape), list(shape)
    for dim, cut in cuts.items():
        if any(pieces > 1 for _, _, pieces in cut):
            _check_strided(shape, dim, tuple((size, pieces) for size, _, pieces in cut))
        start[dim], local[dim] = _cut_in_order_of_time(shape[dim], cut)
    return Layout(shape, tuple(start), tuple(local))


def _cut_in_order_of_time(n: int, cuts: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """(start, size) of this process's part of n rows, the strided cuts last, as FSDP2 makes them."""
    start = 0
    for size, at, _ in sorted(cuts, key=lambda cut: cut[2] > 1):
        low, high = _chunk(n, size, at)
        start, n = start + low, high - low
    return start, n


def _cut_in_order_of_mesh(n: int, cuts: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The bounds of the rows that the placements, read from left to right, give this process."""
    bounds = [(0, n)]
    for size, at, pieces in cuts:
        taken = []
        for piece in range(pieces):
            low, high = _chunk(n, pieces, piece)
            start, end = _chunk(high - low, size, at)
            taken += _between(bounds, low + start, low + end)
        bounds = taken
        n = sum(high - low for low, high in bounds)
    return bounds


def _between(bounds: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Bounds of the rows number ``start … end−1`` among those within the bounds."""
    taken = []
    for low, high in bounds:
        first, last = max(start, 0), min(end, high - low)
        if first < last:
            taken.append((low + first, low + last))
        start, end = start - (high - low), end - (high - low)
    return taken


def _chunk(n: int, count: int, at: int) -> tuple[int, int]:
    """Bounds of one of the parts that ``torch.chunk`` cuts n rows into; the last may be short or empty."""
    step = -(-n // count)
    return min(n, at * step), min(n, (at + 1) * step)


@lru_cache(maxsize=1 << 12)
def _check_strided(shape: tuple[int, ...], dim: int, cuts: tuple[tuple[int, int], ...]) -> None:
    """Refuse what FSDP2 cuts in one way and ``DTensor`` reads in another: all processes find the same."""
    for at in product(*(range(size) for size, _ in cuts)):
        cut = [(size, i, pieces) for (size, pieces), i in zip(cuts, at, strict=True)]
        start, size = _cut_in_order_of_time(shape[dim], cut)
        bounds = _cut_in_order_of_mesh(shape[dim], cut)
        rows = sum(high - low for low, high in bounds)
        if rows != size or (bounds and (bounds[0][0], bounds[-1][1]) != (start, start + size)):
            ways = prod(size for size, _ in cuts)
            raise UserError(
                f"a parameter of shape {shape} is sharded {ways} ways along dimension {dim} by tensor "
                f"parallelism and FSDP2 together, and {shape[dim]} is not divisible by {ways}: torch's "
                "placements do not describe such shards; pad that dimension, or shard it one way only"
            )


def refuse_flattened(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse parameters that have been replaced by flat ones: nothing tells which entry is which.

    Raises:
        UserError: they are those of DeepSpeed ZeRO or of FSDP1.
    """
    for group in groups:
        names, parameters = group["param_names"], group["params"]
        if len(names) != len(parameters) or any(hasattr(p, "ds_id") for p in parameters):
            raise UserError(
                f"the optimizer was built from {len(names)} named parameters and has {len(parameters)}: "
                "DeepSpeed ZeRO flattens and partitions them, so none has its own shape any more; online "
                "merging shards with FSDP2 (fsdp_version 2) instead, or trains unsharded with DDP"
            )
        for name, p in zip(names, parameters, strict=True):
            if (
                getattr(p, "_fsdp_flattened", False)
                or "_flat_param" in name
                or "_fsdp_wrapped_module" in name
            ):
                raise UserError(
                    f"{name} is part of a flat parameter of FSDP1 and has lost its shape; online merging "
                    "shards with FSDP2 (fsdp_version 2, or torch.distributed.fsdp.fully_shard)"
                )
