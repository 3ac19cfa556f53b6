"""Where a parameter's exact value lives: in the parameter, or in the parameter and a 16-bit residual."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trimtab.ops.kernels.job import Stored
from trimtab.ops.kernels.torch_engine import master_dtype, read_master
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
