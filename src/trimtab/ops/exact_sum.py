"""Σ|x| rounded once: the same number however the entries are ordered, grouped or sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], object]
"""Sums a tensor over the processes that share what it counts, in place; all of them call it alike."""

# Signed integer of the same size, bits of the exponent, bits of the fraction, digits that the fraction is cut
# into.
_FORMATS = {
    torch.float32: (torch.int32, 8, 23, 1),
    torch.float64: (torch.int64, 11, 52, 2),
}
_DIGIT = 26
_CHUNK, _CHUNK_ELSEWHERE = 1 << 18, 1 << 24  # on a CPU, temporaries should stay in its cache


def alone(counts: Tensor) -> Tensor:
    """The :data:`Reduce` of a process that has the whole tensor."""
    return counts


def chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """A flat tensor in pieces small enough for the temporaries of a pass over it; the last may be smaller."""
    return torch.split(flat, _CHUNK if flat.device.type == "cpu" else _CHUNK_ELSEWHERE)


def exact_l1(parts: Sequence[Tensor | Iterable[Tensor]], reduce: Reduce = alone) -> list[float]:
    """Σ|x| of several unsharded tensors, each rounded once to float64; NaN where an entry is not finite.

    A floating-point sum depends on its order, and an order that follows the unsharded tensor (blocks of
    fixed size, say) asks a process for entries that another one has. Here the fractions of equal exponent
    are summed as integers, those sums are added up over the processes, and Python's integers bring the
    exponents together: the result is that of the real numbers, so no layout, chunk or order can change it.

    Args:
        parts: this process's entries of each tensor, in any order: a tensor, or pieces of one dtype that need
            not exist at the same time. fp32, fp64, bf16 or fp16.
        reduce: sums an int64 tensor over the processes: 4 kB for each tensor (48 kB in fp64), in one call.

    Examples:
        >>> x = torch.tensor([1e30, 1.0, -1e-30])
        >>> exact_l1([x]) == exact_l1([x.flip(0)]) == exact_l1([[x[:1], x[1:]]])
        True
    """
    if not parts:
        return []
    tables = [_table([part] if isinstance(part, Tensor) else part) for part in parts]
    together = torch.cat([table.reshape(-1) for table in tables])
    reduce(together)
    columns = torch.split(together.cpu(), [table.numel() for table in tables])
    return [_rounded(one.view(table.shape)) for one, table in zip(columns, tables, strict=True)]


def _table(pieces: Iterable[Tensor]) -> Tensor:
    """The sum of :func:`_fraction_sums` over the pieces of a tensor."""
    total: Tensor | None = None
    for piece in pieces:
        for chunk in chunks(piece.detach().reshape(-1)):
            added = _fraction_sums(chunk)
            total = added if total is None else total.add_(added)
    assert total is not None, "a part without entries is an empty tensor, not no tensor"
    return total


def _fraction_sums(flat: Tensor) -> Tensor:
    """For each exponent the number of entries and, digit by digit, the sum of their fractions.

    Returns:
        int64 tensor (1 + digits, exponents).
    """
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.to(torch.float32)
    if flat.dtype not in _FORMATS:
        raise ValueError(f"a sum of magnitudes needs a floating tensor, got {flat.dtype}")
    integer, exponent_bits, fraction_bits, digits = _FORMATS[flat.dtype]
    bins = 1 << exponent_bits
    bits = flat.view(integer).bitwise_and(torch.iinfo(integer).max)
    exponent = bits >> fraction_bits
    fraction = bits.bitwise_and_((1 << fraction_bits) - 1)
    table = torch.zeros(1 + digits, bins, dtype=torch.int64, device=flat.device)
    table[0] = torch.bincount(exponent, minlength=bins)
    exponent = exponent.to(torch.int64)
    for digit in range(digits):
        part = (fraction >> digit * _DIGIT).bitwise_and_((1 << _DIGIT) - 1).to(torch.int64)
        table[1 + digit].index_add_(0, exponent, part)
    return table


def _rounded(table: Tensor) -> float:
    dtype = next(key for key, (_, bits, _, _) in _FORMATS.items() if table.shape[1] == 1 << bits)
    _, exponent_bits, fraction_bits, _ = _FORMATS[dtype]
    counts, *digits = table.tolist()
    if counts.pop():  # the last exponent is that of infinity and NaN
        return math.nan
    total = 0
    for exponent, count in enumerate(counts):
        if count:
            fraction = sum(digit[exponent] << i * _DIGIT for i, digit in enumerate(digits))
            leading = count << fraction_bits if exponent else 0
            total += fraction + leading << max(exponent, 1)
    try:  # an integer quotient is rounded once, whatever the size of its terms
        return total / (1 << (1 << exponent_bits - 1) - 1 + fraction_bits)
    except OverflowError:
        return math.inf
