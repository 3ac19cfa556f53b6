"""Spherical interpolation between two weight tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Entries that enter a norm or an inner product at a time."""
_PARALLEL, _LEAST = 0.9995, 1e-8

Pieces = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Yields both tensors, :data:`CHUNK` entries at a time and the rest, each time it is called."""


def slerp_coefficients(t: float, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """The factors of a and b in slerp(a, b; t).

    With Ω the angle between a and b as vectors, they are sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω (Shoemake,
    SIGGRAPH 1985), and 1−t and t where abs(cos Ω) > 0.9995 or a norm is not above 1e-8 (then cos Ω is formed
    without dividing by it). The tensors are not normalised: their lengths are interpolated along.

    Args:
        t: 0 gives a, 1 gives b.
        pieces: the entries of both, in fp32 or fp64; gone through twice.

    Returns:
        Two tensors of one entry, in the dtype of the pieces.

    Examples:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> [round(float(x), 4) for x in slerp_coefficients(0.5, lambda: iter([(a, b)]))]
        [0.7071, 0.7071]
    """
    norms, products = list[list[float]](), list[float]()  # no tensors: small ones that stay split up the heap
    dtype = torch.float32
    for pair in pieces():
        dtype = pair[0].dtype
        norms.append([float(torch.linalg.vector_norm(x.view(1, -1), dim=1)) for x in pair])
    if not norms:
        return torch.tensor(1.0 - t), torch.tensor(t)
    length_a, length_b = (
        torch.linalg.vector_norm(torch.tensor(column, dtype=dtype).view(-1, 1), dim=0)
        for column in zip(*norms, strict=True)
    )
    length_a = torch.where(length_a > _LEAST, length_a, 1)
    length_b = torch.where(length_b > _LEAST, length_b, 1)
    # Normalised before they are multiplied: the product of two long vectors could overflow.
    for a, b in pieces():
        products.append(float((a / length_a).mul_(b / length_b).view(1, -1).sum(dim=1)))
    cosine = torch.tensor(products, dtype=dtype).view(-1, 1).sum(dim=0).clamp(-1, 1)
    share = torch.tensor(t, dtype=cosine.dtype)
    parallel = cosine.abs() > _PARALLEL
    angle = torch.acos(torch.where(parallel, 0, cosine))
    sine = torch.sin(angle)
    first = torch.where(parallel, 1 - share, torch.sin((1 - share) * angle) / sine)
    second = torch.where(parallel, share, torch.sin(share * angle) / sine)
    return first, second


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate between two tensors of one shape along the great circle.

    See :func:`slerp_coefficients`. The arithmetic is in fp32, or fp64 where an input is.

    Examples:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3).tolist()[0] > 0.86
        True
    """
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    flat = [x.reshape(-1).to(dtype) for x in (a, b)]

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for low in range(0, flat[0].numel(), CHUNK):
            yield flat[0][low : low + CHUNK], flat[1][low : low + CHUNK]

    first, second = slerp_coefficients(t, pieces)
    return (first * flat[0] + second * flat[1]).view(a.shape)
