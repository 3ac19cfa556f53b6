"""Where local parts lie, and what is refused; in one process, which plays one of several."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from trimtab import OnDARE, OnTIES, ReferenceDelta, UserError
from trimtab.ops.layout import Layout
from trimtab.optim.sharding import (
    aligned_grad,
    like,
    local_of,
    local_part,
    rectangle,
    refuse_flattened,
    set_data,
    shard_group,
)


@pytest.fixture
def square() -> Iterator[DeviceMesh]:
    """A mesh of 2 × 2 processes, seen from the last one; collectives do nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    distributed.destroy_process_group()


# -- rectangles


def spread(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Placement, ...]) -> None:
    """Compare with torch's own function at every coordinate of a mesh."""
    for at in product(*map(range, mesh)):
        size, start = _compute_local_shape_and_global_offset(shape, mesh, list(at), placements)
        layout = rectangle(shape, mesh, at, placements)
        assert (layout.local, layout.shape) == (tuple(size), shape)
        if layout.numel:
            assert layout.start == tuple(start)


def test_rectangles_are_where_torch_says() -> None:
    generator = random.Random(0)
    for _ in range(300):
        shape = tuple(generator.randint(1, 9) for _ in range(generator.randint(1, 3)))
        mesh = tuple(generator.choice([1, 2, 3, 4]) for _ in range(generator.randint(1, 3)))
        kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        spread(shape, mesh, tuple(generator.choice(kinds) for _ in mesh))


@pytest.mark.parametrize("rows", [8, 97, 96, 3, 1])
@pytest.mark.parametrize("inner", [2, 4])
def test_fsdp_over_tensor_parallelism(rows: int, inner: int) -> None:
    """FSDP2 cuts what tensor parallelism has cut before, and calls that a strided shard."""
    placements = (_StridedShard(0, split_factor=inner), Shard(0))
    taken = [rectangle((rows, 3), (2, inner), at, placements) for at in product(range(2), range(inner))]
    spread((rows, 3), (2, inner), placements)
    parts = [torch.chunk(part, 2) for part in torch.chunk(torch.arange(rows), inner)]
    for layout, (outer, at) in zip(taken, product(range(2), range(inner)), strict=True):
        part = parts[at][outer] if at < len(parts) and outer < len(parts[at]) else torch.arange(0)
        assert torch.equal(torch.arange(rows)[layout.slices()[0]], part)


def test_shards_that_their_placements_do_not_describe_are_refused_at_every_process() -> None:
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    for at in product(range(4), range(2)):
        with pytest.raises(UserError, match="97 is not divisible by 8"):
            rectangle((97, 3), (4, 2), at, placements)


def test_other_placements_are_refused() -> None:
    with pytest.raises(UserError, match="Partial"):
        rectangle((4, 4), (2,), (0,), (Partial(),))


# -- local parts


def test_plain_tensors_are_whole() -> None:
    p = nn.Parameter(torch.zeros(3, 2))
    local, layout, group = local_part(p)
    assert (layout, group) == (Layout.whole((3, 2)), None)
    assert local.data_ptr() == p.data_ptr()
    assert not local.requires_grad
    assert local_of(p) is p
    assert like(p, local) is local


@pytest.mark.parametrize(
    ("placements", "start", "local", "dims"),
    [
        ((Shard(0), Replicate()), (3, 0), (2, 6), (0,)),
        ((Replicate(), Shard(1)), (0, 3), (5, 3), (1,)),
        ((Shard(0), Shard(1)), (3, 3), (2, 3), (0, 1)),
        ((Replicate(), Replicate()), (0, 0), (5, 6), ()),
    ],
)
def test_local_parts_of_a_mesh(
    square: DeviceMesh, placements: Any, start: Any, local: Any, dims: tuple[int, ...]
) -> None:
    held = torch.arange(30.0).view(5, 6)[start[0] : start[0] + local[0], start[1] : start[1] + local[1]]
    p = DTensor.from_local(
        held.contiguous(), square, placements, run_check=False, shape=torch.Size((5, 6)), stride=(6, 1)
    )
    part, layout, group = local_part(nn.Parameter(p))
    assert layout == Layout((5, 6), start, local)
    assert torch.equal(part.view(-1), layout.indices().float())
    assert (group is None) == (not dims)
    if group is not None:
        assert (group.dims, group.size) == (dims, 2 ** len(dims))
        assert group == shard_group(p), "equal groups are one"
    again = like(p, part.clone())
    assert isinstance(again, DTensor)
    assert (again.placements, again.shape) == (p.placements, p.shape)


def test_a_mesh_dimension_of_one_process_cuts_nothing(square: DeviceMesh) -> None:
    line = init_device_mesh("cpu", (4, 1), mesh_dim_names=("all", "one"))
    p = DTensor.from_local(torch.zeros(1, 6), line, (Replicate(), Shard(0)), run_check=False)
    assert local_part(p)[1:] == (Layout.whole((1, 6)), None)


def test_local_tensors_of_another_size_are_refused(square: DeviceMesh) -> None:
    odd = DTensor.from_local(
        torch.zeros(1, 6),
        square,
        (Shard(0), Replicate()),
        run_check=False,
        shape=torch.Size((5, 6)),
        stride=(6, 1),
    )
    with pytest.raises(UserError, match=r"local part of \(1, 6\), where \(2, 6\) was due"):
        local_part(odd)


def test_a_process_outside_the_mesh_is_told(square: DeviceMesh) -> None:
    others = DeviceMesh("cpu", [0, 1])
    p = DTensor.from_local(
        torch.zeros(0), others, (Shard(0),), run_check=False, shape=torch.Size((4, 6)), stride=(6, 1)
    )
    with pytest.raises(UserError, match="not in it"):
        local_part(p)


def test_set_data_replaces_the_entries_and_gives_them_back(square: DeviceMesh) -> None:
    make = partial(DTensor.from_local, device_mesh=square, placements=(Shard(0), Shard(1)), run_check=False)
    p = nn.Parameter(make(torch.ones(2, 3, dtype=torch.bfloat16)))
    stored = p.to_local().data_ptr()
    weight = p.data
    set_data(p, make(torch.full((2, 3), 2.0)))
    assert p.dtype == torch.float32
    assert local_of(p).dtype == torch.float32
    assert torch.equal(local_of(p + 1), torch.full((2, 3), 3.0)), "operations see them"
    set_data(p, weight)
    assert (p.dtype, local_of(p).data_ptr()) == (torch.bfloat16, stored)
    assert torch.equal(local_of(p + 1), torch.full((2, 3), 2.0, dtype=torch.bfloat16))


def test_gradients_are_sharded_as_their_parameter(square: DeviceMesh) -> None:
    p = nn.Parameter(DTensor.from_local(torch.zeros(2, 6), square, (Shard(0), Replicate()), run_check=False))
    p.grad = DTensor.from_local(torch.ones(4, 6), square, (Replicate(), Replicate()), run_check=False)
    assert aligned_grad(p).placements == p.placements
    assert local_of(aligned_grad(p)).shape == (2, 6)
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.ones(2)
    assert aligned_grad(plain) is plain.grad


# -- flat parameters


def test_flattened_parameters_are_refused_in_a_sentence() -> None:
    flat, named = nn.Parameter(torch.zeros(9)), {"param_names": ["a.weight", "b.weight"]}
    with pytest.raises(UserError, match=r"DeepSpeed ZeRO .* FSDP2 .* DDP"):
        refuse_flattened([named | {"params": [flat]}])
    partitioned = nn.Parameter(torch.zeros(0))
    partitioned.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="DeepSpeed ZeRO"):
        refuse_flattened([{"param_names": ["a.weight"], "params": [partitioned]}])
    for name in ("_fsdp_wrapped_module._flat_param", "_fsdp_wrapped_module.a.weight"):
        with pytest.raises(UserError, match=r"FSDP1.*fully_shard"):
            refuse_flattened([{"param_names": [name], "params": [flat]}])
    marked = nn.Parameter(torch.zeros(4))
    marked._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="FSDP1"):
        refuse_flattened([{"param_names": ["a.weight"], "params": [marked]}])
    refuse_flattened([named | {"params": [flat, flat]}])


@pytest.mark.parametrize("kind", [OnDARE, OnTIES])
def test_an_optimizer_whose_parameters_were_replaced_by_a_flat_one_says_so(kind: Any) -> None:
    base, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    delta = ReferenceDelta.between(reference=reference, base=base)
    optimizer = kind(reference.named_parameters(), delta)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(8))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8)
    with pytest.raises(UserError, match="DeepSpeed ZeRO"):
        optimizer.step()


def test_a_placement_that_cannot_be_stepped_is_refused_with_the_parameter_s_name(square: DeviceMesh) -> None:
    base, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    delta = ReferenceDelta.between(reference=reference, base=base)
    pending = DTensor.from_local(torch.zeros(2, 3), square, (Replicate(), Partial()), run_check=False)
    reference.weight = nn.Parameter(pending)
    with pytest.raises(UserError, match=r"weight: a parameter of shape \(2, 3\) has the placement Partial"):
        OnDARE(reference.named_parameters(), delta).step()
