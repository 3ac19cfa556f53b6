"""The k-th largest entry of several tensors taken together, without joining them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DIGIT = 16
_BINS = 1 << _DIGIT


def kth_largest(tensors: Sequence[Tensor], k: int) -> float:
    """Find the k-th largest of all entries, exactly, by counting them digit by digit.

    Non-negative floats are in the order of their bits, so two histograms of 65,536 bins find the number: one
    of the upper 16 bits, one of the lower 16 among the entries that share the upper ones.

    Args:
        tensors: fp32, entries ≥ 0, no NaN; on any devices.
        k: 1 ≤ k ≤ the number of entries.

    Returns:
        The number: at least k entries are ≥ it, fewer than k are above it.

    Examples:
        >>> kth_largest([torch.tensor([0.5, 3.0]), torch.tensor([[2.0], [0.0]])], 2)
        2.0
    """
    total = sum(x.numel() for x in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"there is no {k}-th largest of {total} entries")
    words = [x.detach().contiguous().view(-1).view(torch.int32) for x in tensors]
    upper, left = _bin_of([word >> _DIGIT for word in words], k)
    same = [(word & (_BINS - 1))[word >> _DIGIT == upper] for word in words]
    lower, _ = _bin_of(same, left)
    return float(torch.tensor([upper << _DIGIT | lower], dtype=torch.int32).view(torch.float32))


def _bin_of(digits: Sequence[Tensor], k: int) -> tuple[int, int]:
    """The digit of the k-th largest, and its rank among the entries with that digit."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for digit in digits:
        counts += torch.bincount(digit, minlength=_BINS).cpu()
    above = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a larger one
    found = int((above >= k).nonzero()[-1])
    return found, k - int(above[found] - counts[found])
