"""What a measuring step adds up: a dozen sums per parameter, additive over chunks and shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SUMS = (
    "update",
    "kept_update",
    "kept_tau",
    "surviving_tau",
    "product",
    "both",
    "conflicts",
    "wanted_update",
    "arrived_update",
    "wanted_tau",
    "arrived_tau",
)
"""Names of the sums, in the order of :func:`measure`'s result."""

_CHUNK = 1 << 18
_IN_CACHE = 1 << 14
"""Entries that a CPU works on at a time: the two dozen temporaries of more would not stay in its cache."""


def measure(
    base: Tensor,
    update: Tensor,
    kept_update: Tensor,
    kept_tau: Tensor,
    parts: Sequence[Tensor],
    stored: torch.dtype,
) -> Tensor:
    """Add up what one chunk of one parameter contributes to the diagnostics of a merge.

    * ``update``: Σ Δ²
    * ``kept_update``: Σ F(Δ)²
    * ``kept_tau``: Σ F(τ)²
    * ``surviving_tau``: Σ b², with b = α·F(τ) where the vote lets it through and 0 elsewhere
    * ``product``: Σ F(Δ)·F(τ)
    * ``both``: number of entries where neither F(Δ) nor F(τ) is 0
    * ``conflicts``: number of those where their signs differ
    * ``wanted_update``: Σ abs(a), with a = (1−α)·F(Δ) where the vote lets it through
    * ``arrived_update``: how much of that changes what is stored
    * ``wanted_tau``: Σ abs(b)
    * ``arrived_tau``: how much of that changes what is stored

    A part b of the bracket a + b arrives, entry by entry, as clip(sign(b)·(fl(θ + (a + b)) − fl(θ + a)), 0,
    abs(b)), with fl the rounding to what is stored. Clipping keeps an entry that rounds up to a whole unit in
    the last place from making up for another one that is lost.

    F(Δ) and F(τ) come in before they are weighted, so that an α of 0 leaves their angle defined. Nothing is
    read back from the device.

    Args:
        base: θ before the bracket is added, flat, in the master's dtype.
        update: Δ, flat.
        kept_update: F(Δ), rescaled as F rescales; not weighted.
        kept_tau: F(τ), likewise.
        parts: what is added to ``base``: the weighted terms of Δ and of τ, each 0 where it is outvoted
            (:func:`trimtab.ops.consensus.agreeing_terms`).
        stored: the dtype that the sum is rounded to; the master's own where a rounding help keeps it.

    Returns:
        float64 tensor of ``len(SUMS)`` on the device of ``base``.

    Examples:
        >>> one, tau = torch.tensor([1.0, 0.0, -3.0]), torch.tensor([-1.0, 2.0, -4.0])
        >>> sums = measure(torch.zeros(3), one, one, tau, [0.5 * one, 0.5 * tau], torch.float32)
        >>> dict(zip(SUMS, sums.tolist()))["product"], dict(zip(SUMS, sums.tolist()))["conflicts"]
        (11.0, 1.0)
    """
    tensors = (base, update, kept_update, kept_tau, *parts)
    if base.device.type != "cpu" or base.numel() <= _IN_CACHE:
        return _measure(tensors, stored)
    pieces = zip(*(torch.split(x, _IN_CACHE) for x in tensors), strict=True)
    return torch.stack([_measure(piece, stored) for piece in pieces]).sum(dim=0)


def _measure(tensors: Sequence[Tensor], stored: torch.dtype) -> Tensor:
    base, update, kept_update, kept_tau, a, b = tensors
    kept, tau = kept_update.to(torch.float64), kept_tau.to(torch.float64)
    product = kept * tau
    total = product.sum()
    signs = product.sign_()
    both = torch.dot(signs, signs)
    after = (base + (a + b)).to(stored)
    return torch.stack(
        [
            _square(update.to(torch.float64)),
            _square(kept),
            _square(tau),
            _square(b.to(torch.float64)),
            total,
            both,
            (both - signs.sum()) / 2,
            *_arrival(after, (base + b).to(stored), a),
            *_arrival(after, (base + a).to(stored), b),
        ]
    )


def squared_norm(values: Tensor) -> float:
    """Σ x² in float64, a chunk at a time.

    Examples:
        >>> squared_norm(torch.tensor([[3.0, 4.0]]))
        25.0
    """
    chunks = [_square(chunk.to(torch.float64)) for chunk in torch.split(values.reshape(-1), _CHUNK)]
    return float(torch.stack(chunks).sum()) if chunks else 0.0


def _arrival(after: Tensor, without: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """(wanted, arrived) of one part: ``without`` is what would be stored had it not been added."""
    wide = torch.promote_types(after.dtype, part.dtype)  # the difference of two neighbours is exact in it
    moved = after.to(wide).sub_(without) if after.dtype != wide else after - without
    wanted = part.abs()
    arrived = torch.minimum(moved.mul_(part.sign()).clamp_(min=0), wanted)
    return wanted.sum(dtype=torch.float64), arrived.sum(dtype=torch.float64)


def _square(x: Tensor) -> Tensor:
    return torch.dot(x, x)
