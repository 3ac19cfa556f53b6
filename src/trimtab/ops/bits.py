"""Floating numbers by their bit patterns.

Selecting entries with a mask of bits takes three cheap integer operations. On a CPU, torch's comparisons cost
five times as much as its integer arithmetic, and ``torch.where`` forty times.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# dtype: (integers of its size, number of bits, pattern of +infinity)
_PATTERNS = {
    torch.float64: (torch.int64, 64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 32, 0x7F800000),
    torch.bfloat16: (torch.int16, 16, 0x7F80),
    torch.float16: (torch.int16, 16, 0x7C00),
}

Words = Tensor | NDArray[np.int32]
"""32-bit words: int32 as a tensor or, on one thread of a CPU, as an array that shares a tensor's memory.

In place, the operators of both do the same. NumPy's calls cost a third of torch's, and it shifts unsigned
numbers too, but it knows of no threads.
"""


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


def words(x: Tensor) -> Words:
    """An int32 tensor as :data:`Words` in the same memory."""
    return x.numpy() if x.device.type == "cpu" and torch.get_num_threads() == 1 else x


def tensor(x: Words) -> Tensor:
    """The same words as a tensor again."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def shifted(x: Words, count: int) -> Words:
    """``x >> count``, with x read as unsigned."""
    if isinstance(x, Tensor):
        return torch.bitwise_right_shift(x, count).bitwise_and_((1 << 32 - count) - 1)
    out = torch.empty(x.shape, dtype=torch.int32, device="cpu").numpy()  # aligned to a cache line
    np.right_shift(x.view(np.uint32), count, out=out.view(np.uint32))
    return out


def xor(x: Tensor, number: int, out: Words) -> None:
    """``x ^ number`` in the memory of ``out``."""
    if isinstance(out, Tensor):
        torch.bitwise_xor(x, number, out=out)
    else:
        np.bitwise_xor(x.numpy(), number, out=out)


def less(x: Words, bound: int) -> Words:
    """−1 where words are below ``bound``, else 0; x − bound must not overflow. Writes over ``x``."""
    x -= bound
    x >>= 31
    return x


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


def places(x: Tensor | Words, value: int) -> Tensor:
    """Indices at which flat integers have a value, as int64."""
    if isinstance(x, Tensor) and x.device.type != "cpu":
        return (x == value).nonzero().squeeze(1)
    array = x.numpy() if isinstance(x, Tensor) else x  # NumPy takes a fifth of torch's time
    return torch.from_numpy((array == value).nonzero()[0])


def _nan_of(magnitudes: Tensor, x: Tensor) -> Tensor:
    _, width, infinity = _pattern(x)
    return magnitudes.neg().add_(infinity).bitwise_right_shift_(width - 1)


def _greatest(x: Tensor) -> int:
    return (1 << _pattern(x)[1] - 1) - 1


def _pattern(x: Tensor) -> tuple[torch.dtype, int, int]:
    if x.dtype not in _PATTERNS:
        raise ValueError(f"bit patterns are taken of floating tensors, got {x.dtype}")
    return _PATTERNS[x.dtype]
