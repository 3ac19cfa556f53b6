"""The subspace that GaLore projects a gradient to: its leading singular vectors, found whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

Found = Literal["svd", "gesvd", "eigh"]
"""How singular vectors were found: torch's default, another driver, or the Gram matrix's eigenvectors."""


def leading_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Found] | None:
    """The leading singular vectors of a matrix on its shorter side, signs fixed.

    With matrix = U S Vᵀ of shape (m, n) they are the first columns of U where m ≤ n, else of V
    (arXiv 2403.03507, Algorithm 2 and §3). A singular vector is only given up to its sign; here the entry of
    largest magnitude, the first of several, is positive. Within one subspace the sign has no influence on
    Adam; from one to the next it has, because the first moment lives on.

    Where the SVD does not converge, another driver is tried (on CUDA), then the eigenvectors of the Gram
    matrix of the shorter side in float64, which span the same subspace.

    Args:
        matrix: fp32 or fp64, two dimensions, neither of them 0.
        rank: how many; at most the shorter side is taken.

    Returns:
        (vectors, how), the vectors as orthonormal columns, (shorter side, min(rank, shorter side)); None
        where nothing converged, as for entries that are not finite.

    Examples:
        >>> vectors, how = leading_vectors(torch.tensor([[0.0, -3.0, 0.0], [1.0, 0.0, 0.0]]), 1)
        >>> vectors.tolist(), how
        ([[1.0], [0.0]], 'svd')
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    for how, find in _ways(wide):
        try:
            vectors = find()[:, :rank]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(vectors.isfinite().all()):
            return _signed(vectors).contiguous(), how
    return None


def _ways(wide: Tensor) -> Iterator[tuple[Found, Callable[[], Tensor]]]:
    """What finds all left singular vectors of a matrix that is wider than high, best first."""
    yield "svd", lambda: torch.linalg.svd(wide, full_matrices=False)[0]
    if wide.is_cuda:
        yield "gesvd", lambda: torch.linalg.svd(wide, full_matrices=False, driver="gesvd")[0]
    yield "eigh", lambda: _gram_vectors(wide)


def _gram_vectors(wide: Tensor) -> Tensor:
    """Eigenvectors of W Wᵀ, the largest eigenvalue first."""
    exact = wide.to(torch.float64)
    vectors: Tensor = torch.linalg.eigh(exact @ exact.T)[1]
    return vectors.flip(1).to(wide.dtype)


def _signed(vectors: Tensor) -> Tensor:
    """The vectors with their entry of largest magnitude positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, largest) < 0, -vectors, vectors)
