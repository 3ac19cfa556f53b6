"""Orthogonal projection of a gradient: what is left of it beside a few other gradients."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20
_PARALLEL = 1e-10
"""Eigenvalues of the Gram matrix below this share of the greatest are 0: directions that say nothing new."""


def normalized(directions: Tensor) -> Tensor:
    """Scale each direction to length 1, in place; one of length 0 stays 0.

    Args:
        directions: shape (k, …), fp32 or fp64.

    Returns:
        ``directions``.

    Examples:
        >>> normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    for direction in directions:
        length = float(torch.linalg.vector_norm(direction, dtype=torch.float64))
        if length > 0:
            direction.div_(length)
    return directions


def project_out(gradient: Tensor, directions: Tensor) -> Tensor:
    """Remove from a gradient its component in the span of some directions, in place: g ← g − Dᵀ(DDᵀ)⁺Dg.

    The rows of D are the directions. What is left is the part of g that is orthogonal to all of them, the
    same whether they are orthogonal to each other, parallel, or 0 (the pseudo-inverse sees to it). All is
    computed in float64, a chunk of the entries at a time.

    Args:
        gradient: any shape, any floating dtype.
        directions: shape (k, …), best of length 1 (:func:`normalized`).

    Returns:
        ``gradient``.

    Examples:
        >>> project_out(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist()
        [0.0, 4.0]
    """
    rows, flat = directions.reshape(len(directions), -1), gradient.reshape(-1)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=gradient.device)
    products = torch.zeros(len(rows), 1, dtype=torch.float64, device=gradient.device)
    parts = list(zip(torch.split(rows, _CHUNK, dim=1), torch.split(flat, _CHUNK), strict=True))
    for some, entries in parts:
        wide = some.double()
        gram += wide @ wide.T
        products += wide @ entries.double()[:, None]
    shares = torch.linalg.pinv(gram, hermitian=True, rtol=_PARALLEL) @ products
    for some, entries in parts:
        entries.copy_(entries.double() - (shares.T @ some.double())[0])
    return gradient if flat.data_ptr() == gradient.data_ptr() else gradient.copy_(flat.view(gradient.shape))
