"""One step of a tensor towards another: moving averages, and the pull back to where training began."""

from __future__ import annotations

from torch import Tensor


def move_towards(x: Tensor, target: Tensor, share: float) -> Tensor:
    """Move ``x`` a share of the way to ``target``, in place: x ← (1 − s)·x + s·target.

    With x an average and s its coefficient this is an exponential moving average; with x the weights and the
    target the reference it is decoupled decay towards the reference. Computed as ``torch.lerp`` does: x +
    s·(target − x) for s < 1/2, else from the target's side, so that x = target stays as it is, to the bit.

    Args:
        x: what moves; fp32 or fp64.
        target: of x's shape, in any floating dtype; computed in that of x.
        share: s in [0, 1].

    Returns:
        ``x``.

    Examples:
        >>> import torch
        >>> move_towards(torch.tensor([0.0, 4.0]), torch.tensor([4.0, 4.0]), 0.25).tolist()
        [1.0, 4.0]
    """
    return x.lerp_(target.to(x.dtype), share)
