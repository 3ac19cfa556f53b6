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
    size = _IN_CACHE if base.device.type == "cpu" else max(base.numel(), 1)
    pieces = zip(*(torch.split(x, size) for x in tensors), strict=True)
    sums = [torch.stack([x.sum(dtype=torch.float64) for x in _entries(piece, stored)]) for piece in pieces]
    return torch.stack(sums).sum(dim=0)


def measure_each(tensors: Sequence[Tensor], stored: torch.dtype, counts: Sequence[int]) -> Tensor:
    """As :func:`measure`, of several parameters whose entries lie side by side in the tensors.

    Args:
        tensors: base, update, kept_update, kept_tau and the two parts.
        stored: the dtype that sums are rounded to.
        counts: entries of each parameter.

    Returns:
        float64 tensor (parameters, SUMS).

    Examples:
        >>> one = torch.ones(5)
        >>> measure_each([one] * 6, torch.float32, [2, 3])[:, 0].tolist()
        [2.0, 3.0]
    """
    entries = torch.stack([x.to(torch.float64) for x in _entries(tensors, stored)])
    return torch.stack([part.sum(dim=1) for part in torch.split(entries, list(counts), dim=1)])


def _entries(tensors: Sequence[Tensor], stored: torch.dtype) -> list[Tensor]:
    """What each entry adds to each of the sums, in the order of :data:`SUMS`."""
    base, update, kept_update, kept_tau, a, b = tensors
    kept, tau = kept_update.to(torch.float64), kept_tau.to(torch.float64)
    product = kept * tau
    signs = product.sign()
    after = (base + (a + b)).to(stored)
    return [
        _square(update),
        _square(kept),
        _square(tau),
        _square(b),
        product,
        signs.abs(),
        signs.neg().clamp_(min=0),
        *_arrival(after, (base + b).to(stored), a),
        *_arrival(after, (base + a).to(stored), b),
    ]


def squared_norm(values: Tensor) -> float:
    """Σ x² in float64, a chunk at a time.

    Examples:
        >>> squared_norm(torch.tensor([[3.0, 4.0]]))
        25.0
    """
    chunks = (chunk.to(torch.float64) for chunk in torch.split(values.reshape(-1), _CHUNK))
    return float(torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum())


def _arrival(after: Tensor, without: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """(wanted, arrived) of one part: ``without`` is what would be stored had it not been added."""
    wide = torch.promote_types(after.dtype, part.dtype)  # the difference of two neighbours is exact in it
    moved = after.to(wide).sub_(without) if after.dtype != wide else after - without
    wanted = part.abs()
    return wanted, torch.minimum(moved.mul_(part.sign()).clamp_(min=0), wanted)


def _square(x: Tensor) -> Tensor:
    return x.to(torch.float64).square()
