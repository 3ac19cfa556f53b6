"""Keeping what rounding would lose: exact 16-bit splits of an fp32 master, compensation, stochastic
rounding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_FP16_SCALE = (
    2048.0  # an fp16 rounding error is at most 2⁻¹¹ of the value: scaled, it uses the same exponents
)


@lru_cache(maxsize=1 << 10)
def rounded(number: float, dtype: torch.dtype) -> float:
    """A number as a tensor of ``dtype`` holds it.

    Examples:
        >>> rounded(0.3, torch.bfloat16)
        0.30078125
    """
    return float(torch.tensor(number, dtype=dtype))


def split_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a wide tensor into its rounding to ``dtype`` and a 16-bit residual.

    * fp32 → bf16 + int16: **exact**. The weight is the master rounded to nearest (ties away from zero), the
      residual the difference of the bit patterns, so :func:`join_master` gives the master back bit for bit.
    * fp32 → fp16 + fp16 and fp64 → fp32 + bf16: compensation. The residual is the rounding error in 16 bits,
      hence about 21 and 31 significant bits in all. Splitting what was joined gives the same two again.

    Args:
        master: fp32 or fp64 tensor of any shape.
        dtype: the dtype of the weights: bf16 or fp16 for fp32, fp32 for fp64.

    Returns:
        (weight in ``dtype``, residual).

    Examples:
        >>> master = torch.tensor([0.1, -3.3e-5, float("inf")])
        >>> weight, residual = split_master(master, torch.bfloat16)
        >>> bool((join_master(weight, residual) == master).all()), residual.dtype
        (True, torch.int16)
    """
    if (master.dtype, dtype) == (torch.float32, torch.bfloat16):
        bits = master.view(torch.int32)
        bits = torch.where(
            master.isnan(), bits & -0x10000 | 0x400000, bits
        )  # a NaN must not carry into the sign
        weight = (bits + 0x8000) >> 16
        return weight.to(torch.int16).view(torch.bfloat16), (bits - (weight << 16)).to(torch.int16)
    weight = master.to(dtype)
    error = torch.where(weight.isfinite(), master - weight, 0.0)
    if (master.dtype, dtype) == (torch.float32, torch.float16):
        return weight, _below_half_a_unit(weight, (error * _FP16_SCALE).to(torch.float16))
    if (master.dtype, dtype) == (torch.float64, torch.float32):
        return weight, _below_half_a_unit(weight, error.to(torch.bfloat16))
    raise ValueError(f"no 16-bit residual splits {master.dtype} into {dtype}")


def join_master(weight: Tensor, residual: Tensor) -> Tensor:
    """Join what :func:`split_master` split: fp32 for bf16 and fp16 weights, fp64 for fp32 weights."""
    if (weight.dtype, residual.dtype) == (torch.bfloat16, torch.int16):
        return ((weight.view(torch.int16).to(torch.int32) << 16) + residual).view(torch.float32)
    if (weight.dtype, residual.dtype) == (torch.float16, torch.float16):
        return weight.to(torch.float32) + residual.to(torch.float32) / _FP16_SCALE
    if (weight.dtype, residual.dtype) == (torch.float32, torch.bfloat16):
        return weight.to(torch.float64) + residual.to(torch.float64)
    raise ValueError(f"{residual.dtype} is no residual of {weight.dtype} weights")


def _below_half_a_unit(weight: Tensor, residual: Tensor) -> Tensor:
    """Step a residual that was rounded up to half a unit of its weight back towards 0.

    The sum would round to the weight's neighbour, and a step that adds nothing would move it.
    """
    tips_over = weight.isfinite() & (join_master(weight, residual).to(weight.dtype) != weight)
    bits = residual.view(torch.int16)
    return torch.where(tips_over, bits - 1, bits).view(residual.dtype)


def stochastic_round(master: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round to one of the two neighbours in ``dtype`` with expectation equal to the value.

    The bits that ``dtype`` has no room for are compared with as many random bits: x rounds away from zero
    with probability (dropped bits)/2^b. b = 16 for fp32 → bf16, exact. For fp32 → fp16 (b = 13, exact where
    fp16 is normal; below 2⁻¹⁴ it rounds to nearest) and fp64 → fp32 (b = 29; to nearest below 2⁻¹²⁶).
    Infinities and NaN stay.

    Args:
        master: fp32 or fp64 tensor.
        dtype: bf16 or fp16 for fp32, fp32 for fp64.
        random: int64 tensor of master's shape, uniform in [0, 2^32).

    Returns:
        Tensor in ``dtype``.
    """
    layouts = {
        (torch.float32, torch.bfloat16): (torch.int32, 16, 0.0),
        (torch.float32, torch.float16): (torch.int32, 13, 2.0**-14),
        (torch.float64, torch.float32): (torch.int64, 29, 2.0**-126),
    }
    if (master.dtype, dtype) not in layouts:
        raise ValueError(
            "stochastic rounding goes from fp32 to bf16 or fp16 and from fp64 to fp32, "
            f"not from {master.dtype} to {dtype}"
        )
    integer, dropped, smallest = layouts[master.dtype, dtype]
    low = (random >> (32 - dropped)).to(integer)
    rounded = (master.view(integer) + low) & -(1 << dropped)
    usable = master.isfinite() & (master.abs() >= smallest)
    return torch.where(usable, rounded.view(master.dtype), master).to(dtype)
