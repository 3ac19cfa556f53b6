"""Floating numbers by their bit patterns.

Selecting entries with a mask of bits takes three cheap integer operations. On a CPU, torch's comparisons cost
five times as much as its integer arithmetic, and ``torch.where`` forty times.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# dtype: (integers of its size, number of bits, pattern of +infinity)
_PATTERNS = {
    torch.float64: (torch.int64, 64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 32, 0x7F800000),
    torch.bfloat16: (torch.int16, 16, 0x7F80),
    torch.float16: (torch.int16, 16, 0x7C00),
}


@lru_cache(maxsize=256)
def constant(value: int) -> Tensor:
    """A constant as an operand of int32 arithmetic: a Python number is converted anew in every operation."""
    return torch.tensor(value, dtype=torch.int32, device="cpu")


def as_bits(x: Tensor) -> Tensor:
    """The bit patterns of a floating tensor as signed integers; they share its memory."""
    return x.view(_pattern(x)[0])


def selected(x: Tensor, keep: Tensor) -> Tensor:
    """``x`` where ``keep`` is −1, exactly +0 where it is 0; in the memory of ``keep`` if that has x's size.

    Args:
        x: floating tensor.
        keep: integers, all bits set or none.

    Examples:
        >>> selected(torch.tensor([1.5, float("nan")]), torch.tensor([-1, 0], dtype=torch.int32)).tolist()
        [1.5, 0.0]
    """
    return keep.to(_pattern(x)[0]).bitwise_and_(as_bits(x)).view(x.dtype)


def less(x: Tensor, bound: int) -> Tensor:
    """−1 where integers are below ``bound``, else 0; x − bound must not overflow. Writes over ``x``."""
    return x.sub_(bound).bitwise_right_shift_(8 * x.element_size() - 1)


def magnitude(x: Tensor) -> Tensor:
    """Integers in the order of |x|: the bit pattern without its sign, and the greatest value for every NaN.

    Examples:
        >>> magnitude(torch.tensor([-0.0, float("nan")])).tolist() == [0, 2**31 - 1]
        True
    """
    bits = as_bits(x).bitwise_and(_greatest(x))
    return bits.bitwise_or_(_nan_of(bits, x).bitwise_and_(_greatest(x)))


def agreeing(x: Tensor, with_sign_of: Tensor) -> Tensor:
    """−1 where two floating tensors have the same sign bit, else 0."""
    return (
        as_bits(x).bitwise_xor(as_bits(with_sign_of)).bitwise_right_shift_(_pattern(x)[1] - 1).bitwise_not_()
    )


def nonzero(x: Tensor) -> Tensor:
    """−1 where a floating tensor is neither +0 nor −0, else 0."""
    return as_bits(x).bitwise_and(_greatest(x)).neg_().bitwise_right_shift_(_pattern(x)[1] - 1)


def nan(x: Tensor) -> Tensor:
    """−1 where a floating tensor is NaN, else 0."""
    return _nan_of(as_bits(x).bitwise_and(_greatest(x)), x)


def places(x: Tensor, value: int) -> Tensor:
    """Indices at which a flat integer tensor has a value, as int64."""
    if x.device.type == "cpu":  # NumPy takes a fifth of torch's time
        return torch.from_numpy(np.flatnonzero(x.numpy() == value))
    return (x == value).nonzero().squeeze(1)


def _nan_of(magnitudes: Tensor, x: Tensor) -> Tensor:
    _, width, infinity = _pattern(x)
    return magnitudes.neg().add_(infinity).bitwise_right_shift_(width - 1)


def _greatest(x: Tensor) -> int:
    return (1 << _pattern(x)[1] - 1) - 1


def _pattern(x: Tensor) -> tuple[torch.dtype, int, int]:
    if x.dtype not in _PATTERNS:
        raise ValueError(f"bit patterns are taken of floating tensors, got {x.dtype}")
    return _PATTERNS[x.dtype]
