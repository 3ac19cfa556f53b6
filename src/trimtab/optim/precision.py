"""Where a parameter's exact value lives: in the parameter, or in the parameter and a 16-bit residual."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.ops import ROUNDING, MaskKey, join_master, split_master, stochastic_round, uniform_u32

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


def update_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which updates are formed: max(fp32, the parameter's dtype)."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def read_master(p: Tensor, state: dict[str, Any], rounding: Rounding) -> Tensor:
    """Return the parameter's value in its working dtype: the parameter itself where nothing wider is kept.

    Args:
        p: the parameter.
        state: its optimizer state; a residual is found under ``merge_residual``.
        rounding: resolved mode.

    Returns:
        ``p`` itself (an alias without gradient) for plain rounding at fp32 or fp64; else a wider copy: fp32
        for bf16 and fp16, fp64 for fp32 with a rounding help.
    """
    value = p.detach()
    if rounding == "nearest" and p.dtype in (torch.float32, torch.float64):
        return value
    if rounding == "residual" and RESIDUAL in state:
        return join_master(value, state[RESIDUAL])
    return value.to(torch.float64 if p.dtype == torch.float32 else torch.float32)


def write_master(p: Tensor, state: dict[str, Any], master: Tensor, rounding: Rounding, key: MaskKey) -> None:
    """Store ``master`` in the parameter (and its residual). ``key`` draws the bits of stochastic rounding."""
    value = p.detach()
    if master.data_ptr() == value.data_ptr() and master.dtype == value.dtype:
        return
    if rounding == "residual":
        weight, state[RESIDUAL] = split_master(master, p.dtype)
        value.copy_(weight)
    elif rounding == "stochastic":
        random = uniform_u32(master.shape, key, device=master.device)
        value.copy_(stochastic_round(master, p.dtype, random))
    else:
        value.copy_(master)


def rounding_key(seed: int, step: int, name: str) -> MaskKey:
    """The key of the bits that stochastic rounding draws for one parameter at one step."""
    return MaskKey(seed, ROUNDING, step, name)
