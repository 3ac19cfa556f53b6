"""GaLore in float64 NumPy, written from Algorithm 2 of arXiv 2403.03507; nothing of the library is imported.

The algorithm is for m <= n; a higher matrix is worked on as its transpose, which is what section 3 of the
paper says (project the shorter side). The paper has one matrix, whose projector is renewed at t = 0, T, 2T …;
``offset`` shifts all but the first of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def leading_left_vectors(gradient: Array, rank: int) -> Array:
    """The first columns of U of U S V' = G, the entry of largest magnitude of each positive."""
    left = np.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
    for column in range(left.shape[1]):
        if left[np.argmax(np.abs(left[:, column])), column] < 0:
            left[:, column] *= -1
    return left


@dataclass
class GaLore:
    """What GaLore adds to one matrix in a step, its decoupled weight decay apart."""

    shape: tuple[int, int]
    rank: int
    gap: int
    scale: float
    offset: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    count: int = 0
    projector: Array | None = None
    first: Array | None = None
    second: Array | None = None

    def update(self, theta: list[float], grad: list[float], lr: float) -> list[float]:
        """The update, row-major, of a gradient given row-major."""
        whole = np.array(grad, dtype=np.float64).reshape(self.shape)
        turned = self.shape[0] > self.shape[1]
        gradient = whole.T if turned else whole
        if self.projector is None or self.count % self.gap == self.offset:
            self.projector = leading_left_vectors(gradient, self.rank)
        low = self.projector.T @ gradient
        if self.first is None or self.second is None:
            self.first, self.second = np.zeros_like(low), np.zeros_like(low)
        self.count += 1
        direction = np.zeros_like(low)
        for at in np.ndindex(*low.shape):
            self.first[at] = self.beta1 * self.first[at] + (1 - self.beta1) * low[at]
            self.second[at] = self.beta2 * self.second[at] + (1 - self.beta2) * low[at] ** 2
            first = self.first[at] / (1 - self.beta1**self.count)
            second = self.second[at] / (1 - self.beta2**self.count)
            direction[at] = first / (math.sqrt(second) + self.eps)
        back = self.scale * (self.projector @ direction)
        return [-lr * float(value) for value in (back.T if turned else back).reshape(-1)]
