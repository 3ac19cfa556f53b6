"""Where a parameter's exact value lives: in the parameter, or in the parameter and a 16-bit residual."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.ops.kernels.job import Stored
from trimtab.ops.kernels.torch_engine import master_dtype, read_master
from trimtab.ops.rounding import split_master
from trimtab.optim.sharding import local_of

Rounding = Literal["auto", "nearest", "residual", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("auto", "nearest", "residual", "stochastic")
RESIDUAL = "merge_residual"


def resolve_rounding(rounding: Rounding, dtype: torch.dtype) -> Rounding:
    """``auto`` is a residual below fp32 and plain rounding from fp32 on; fp64 has nothing wider to round
    from.
    """
    if rounding == "auto":
        return "residual" if dtype in (torch.bfloat16, torch.float16) else "nearest"
    return "nearest" if dtype == torch.float64 else rounding


def residual_like(p: Tensor) -> Tensor:
    """A residual of zeros, as the optimizer's state has it: the master is the parameter's own value.

    Its dtype is a floating one even where its bits are an integer's (see :func:`residual_bits`): to gather a
    sharded state is to send it, and neither NCCL nor gloo sends 16-bit integers.
    """
    dtype = torch.float16 if p.dtype == torch.float16 else torch.bfloat16
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)


def residual_bits(p: Tensor, residual: Tensor) -> Tensor:
    """The local part of a state's residual, in the dtype that :func:`trimtab.ops.join_master` takes."""
    local = local_of(residual)
    return local.view(torch.int16) if p.dtype == torch.bfloat16 else local


def anchor_like(p: Tensor, residual: Tensor | None, stored: Stored) -> Tensor:
    """A copy of the parameter's master, which step-K measures its way from."""
    anchor = torch.empty_like(p, dtype=master_dtype(p.dtype, stored), memory_format=torch.contiguous_format)
    rest = None if residual is None else residual_bits(p, residual)
    local_of(anchor).copy_(read_master(local_of(p), rest, stored))
    return anchor


def restore_dtypes(
    optimizer: Optimizer, state_dict: dict[str, Any], keys: Collection[str] | None = None
) -> None:
    """Undo the cast of float state to the parameter's dtype that ``Optimizer.load_state_dict`` makes.

    Args:
        optimizer: it has just loaded ``state_dict``.
        state_dict: what it was given.
        keys: those of the state that are restored; all when None.
    """
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for saved_id, p in zip(saved_ids, parameters, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if keys is not None and key not in keys:
                continue
            if isinstance(value, Tensor) and optimizer.state[p][key].dtype != value.dtype:
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)


def exact_value(p: Tensor, residual: Tensor | None) -> Tensor:
    """The local part of a parameter with what its residual holds: fp32 or wider.

    Args:
        p: the parameter.
        residual: of its optimizer's state; None where there is none.

    Returns:
        The parameter's own memory where it is its exact value, else a wider copy.
    """
    if residual is None:
        return read_master(local_of(p), None, "nearest")
    return read_master(local_of(p), residual_bits(p, residual), "residual")


def store_exact(p: Tensor, residual: Tensor | None, value: Tensor) -> None:
    """Write a local value into a parameter, and what the parameter cannot hold of it into the residual.

    Args:
        p: the parameter; without a residual it takes the nearest value it can hold.
        residual: of its optimizer's state; None where there is none.
        value: shape of the local part, fp32 or wider.
    """
    local = local_of(p)
    if residual is None:
        local.copy_(value)
        return
    weight, rest = split_master(value.to(master_dtype(p.dtype, "residual")), p.dtype)
    local.copy_(weight)
    residual_bits(p, residual).copy_(rest)
