"""Copies of many tensors: what a wrapper keeps of the parameters before each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ENOUGH, LEAST = 1 << 24, 1 << 16
"""Bytes of the copies that bypass the caches: of all of them, at least (fewer would still be in the caches
when they are asked for), and of each."""


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]], *, native: bool = True) -> None:
    """Copy tensors into others of the same shape, dtype and device.

    Args:
        pairs: (to, from) each.
        native: let the CPU kernels copy what is large, where they are available. They write past the caches,
            which saves reading what is overwritten.

    Examples:
        >>> x, y = torch.zeros(2), torch.ones(2)
        >>> copy_all([(x, y)])
        >>> x
        tensor([1., 1.])
    """
    large = [pair for pair in pairs if _bypasses(*pair)] if native else []
    if sum(given.numel() * given.itemsize for _, given in large) >= ENOUGH:
        from trimtab.ops.kernels import native as kernels

        if kernels.available():
            kernels.copy_all(large)
            pairs = [pair for pair in pairs if not _bypasses(*pair)]
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [given for _, given in pairs])


def _bypasses(to: Tensor, given: Tensor) -> bool:
    return (
        given.device.type == "cpu"
        and given.numel() * given.itemsize >= LEAST
        and to.is_contiguous()
        and given.is_contiguous()
    )
