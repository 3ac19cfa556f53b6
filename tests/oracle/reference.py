"""An independent float64 oracle of the mathematics: naive loops over elements, written from the papers.

Sources: online merging arXiv 2405.17931 (Eq. 3-4 OnDARE, Eq. 5-7 OnTIES), DARE 2311.03099, TIES 2306.01708,
Adam 1412.6980, Adafactor 1804.04235, and torch's documentation for the order in which its optimizers decay.
Nothing here imports the library. The only thing taken from outside are the bits of the random masks, which
callers pass in.

Every number is a Python float (an IEEE double). A tensor is flattened row-major, worked element by element,
and given back as a float64 array of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Bits = Sequence[bool]


def flat(x: Any) -> list[float]:
    """Return the entries of ``x`` in row-major order."""
    return [float(v) for v in np.asarray(x, dtype=np.float64).reshape(-1)]


def shaped(values: Sequence[float], like: Any) -> Array:
    return np.array(values, dtype=np.float64).reshape(np.shape(like))


def sign(value: float) -> float:
    """Return -1, 0 or 1, and NaN for NaN."""
    if math.isnan(value):
        return math.nan
    return float((value > 0) - (value < 0))


# sparsifiers F(x; p)


def top_count(n: int, p: float) -> int:
    """k = min(n, max(1, ceil(p n))), with p read as the decimal that was written."""
    return min(n, max(1, math.ceil(Fraction(repr(p)) * n)))


def released_top_count(n: int, p: float) -> int:
    """The released count: int(p n), and every entry where that is 0."""
    k = int(p * n)
    return k if k > 0 else n


def mergekit_top_count(n: int, p: float) -> int:
    """mergekit's count: int(p n), and at least one entry."""
    return min(n, max(1, int(p * n)))


def top_mask(x: Any, k: int) -> list[bool]:
    """Keep the ``k`` largest magnitudes; NaN ranks above infinity; of equals the lower index wins."""
    values = flat(x)

    def rank(i: int) -> tuple[bool, float, int]:
        nan = math.isnan(values[i])
        return (not nan, 0.0 if nan else -abs(values[i]), i)

    kept = set(sorted(range(len(values)), key=rank)[:k])
    return [i in kept for i in range(len(values))]


def l1_factor(before: Sequence[float], after: Sequence[float]) -> float:
    """Sum |x| / sum |F(x)|, and 1 where a sum is 0 or not finite."""
    whole, left = 0.0, 0.0
    for value in before:
        whole += abs(value)
    for value in after:
        left += abs(value)
    if whole == 0 or left == 0 or not math.isfinite(whole) or not math.isfinite(left):
        return 1.0
    return whole / left


def sparsify(x: Any, p: float, kept: Bits | None, rescale: str = "none") -> Array:
    """F(x; p) given which entries are kept (None: all of them). 2405.17931 Eq. 3; 2311.03099."""
    values = flat(x)
    if kept is None:
        return shaped(values, x)
    result = []
    for i in range(len(values)):
        result.append(values[i] if kept[i] else 0.0)
    if rescale == "expected":
        result = [value / p for value in result]
    elif rescale == "l1":
        factor = l1_factor(values, result)
        result = [value * factor for value in result]
    elif rescale != "none":
        raise ValueError(rescale)
    return shaped(result, x)


# consensus


def consensus(terms: Sequence[Any], weights: Sequence[float], kind: str, normalize: bool = False) -> Array:
    """The weighted terms a_i = w_i x_i brought together, entry by entry (2405.17931 Eq. 4 and Eq. 6-7)."""
    columns = [flat(term) for term in terms]
    result = []
    for entries in zip(*columns, strict=True):
        result.append(consensus_entry(entries, weights, kind, normalize))
    return shaped(result, terms[0])


def consensus_entry(entries: Sequence[float], weights: Sequence[float], kind: str, normalize: bool) -> float:
    weighted = [w * x for w, x in zip(weights, entries, strict=True)]
    total = sum(weighted)
    if kind == "linear":
        return total / sum(weights) if normalize else total
    elected = sign(total if kind == "sign" else sum(entries))
    if math.isnan(elected):
        return math.nan
    if elected == 0:
        if kind == "sign":
            return 0.0
        elected = 1.0
    agreed, agreeing_weight = 0.0, 0.0
    for w, a in zip(weights, weighted, strict=True):
        if sign(a) == elected:
            agreed += a
            agreeing_weight += w
    if normalize and agreeing_weight != 0:
        return agreed / agreeing_weight
    return agreed


# what the wrapped optimizers add: one update per step, without decoupled weight decay


@dataclass
class SGD:
    """v <- mu v + g (the first step takes g), update -lr v; Nesterov looks ahead; coupled L2 goes into g."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    l2: float = 0.0
    velocity: list[float] | None = None

    def update(self, theta: list[float], grad: list[float], lr: float) -> list[float]:
        grad = [g + self.l2 * t for g, t in zip(grad, theta, strict=True)]
        if self.momentum == 0:
            return [-lr * g for g in grad]
        if self.velocity is None:
            self.velocity = list(grad)
        else:
            self.velocity = [
                self.momentum * v + (1 - self.dampening) * g for v, g in zip(self.velocity, grad, strict=True)
            ]
        if self.nesterov:
            return [-lr * (g + self.momentum * v) for g, v in zip(grad, self.velocity, strict=True)]
        return [-lr * v for v in self.velocity]


@dataclass
class Adam:
    """Adam with bias correction. ``released`` puts eps outside: -lr sqrt(c2)/c1 m / (sqrt(v) + eps)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0
    released: bool = False
    count: int = 0
    m: list[float] = field(default_factory=list)
    v: list[float] = field(default_factory=list)

    def update(self, theta: list[float], grad: list[float], lr: float) -> list[float]:
        if self.count == 0:
            self.m, self.v = [0.0] * len(grad), [0.0] * len(grad)
        self.count += 1
        correction1 = 1 - self.beta1**self.count
        correction2 = 1 - self.beta2**self.count
        result = []
        for i in range(len(grad)):
            g = grad[i] + self.l2 * theta[i]
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * g
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * g * g
            if self.released:
                step = lr * math.sqrt(correction2) / correction1
                result.append(-step * self.m[i] / (math.sqrt(self.v[i]) + self.eps))
            else:
                m_hat, v_hat = self.m[i] / correction1, self.v[i] / correction2
                result.append(-lr * m_hat / (math.sqrt(v_hat) + self.eps))
        return result


@dataclass
class RMSprop:
    """v <- a v + (1-a) g^2; centred subtracts the squared mean; momentum gathers g / (sqrt(v) + eps)."""

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    l2: float = 0.0
    v: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    buffer: list[float] = field(default_factory=list)

    def update(self, theta: list[float], grad: list[float], lr: float) -> list[float]:
        if not self.v:
            self.v, self.mean, self.buffer = ([0.0] * len(grad) for _ in range(3))
        result = []
        for i in range(len(grad)):
            g = grad[i] + self.l2 * theta[i]
            self.v[i] = self.alpha * self.v[i] + (1 - self.alpha) * g * g
            spread = self.v[i]
            if self.centered:
                self.mean[i] = self.alpha * self.mean[i] + (1 - self.alpha) * g
                spread -= self.mean[i] ** 2
            scaled = g / (math.sqrt(spread) + self.eps)
            if self.momentum > 0:
                self.buffer[i] = self.momentum * self.buffer[i] + scaled
                scaled = self.buffer[i]
            result.append(-lr * scaled)
        return result


@dataclass
class Adafactor:
    """Adafactor as torch.optim.Adafactor documents it: relative step, factored moments for matrices.

    rho = min(lr, 1/sqrt(t)); step = max(eps2, RMS(theta)) rho; 1 - beta2 = t^-0.8; update clipped at RMS d.
    """

    shape: tuple[int, ...]
    eps1: float = float(np.finfo(np.float64).eps)  # torch's default: the eps of the parameter's dtype
    eps2: float = 1e-3
    d: float = 1.0
    beta2_decay: float = -0.8
    count: int = 0
    rows: Array | None = None
    columns: Array | None = None
    full: Array | None = None

    def update(self, theta: list[float], grad: list[float], lr: float) -> list[float]:
        self.count += 1
        g = np.array(grad).reshape(self.shape)
        fresh = self.count**self.beta2_decay
        if len(self.shape) > 1:
            spread = self._factored(g, fresh)
        else:
            self.full = (0 if self.full is None else (1 - fresh) * self.full) + fresh * g * g
            spread = self.full
        raw = flat(g / np.sqrt(np.maximum(spread, self.eps1**2)))
        rms = math.sqrt(sum(u * u for u in raw) / len(raw))
        size = math.sqrt(sum(t * t for t in theta) / len(theta))
        step = max(self.eps2, size) * min(lr, 1 / math.sqrt(self.count))
        return [-step * u / max(1.0, rms / self.d) for u in raw]

    def _factored(self, g: Array, fresh: float) -> Array:
        row = (g * g).mean(axis=-1, keepdims=True)
        column = (g * g).mean(axis=-2, keepdims=True)
        self.rows = fresh * row + (0 if self.rows is None else (1 - fresh) * self.rows)
        self.columns = fresh * column + (0 if self.columns is None else (1 - fresh) * self.columns)
        return self.rows * self.columns / np.maximum(self.rows.mean(axis=-2, keepdims=True), self.eps1)


# whole steps


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: how update and reference delta are sparsified and brought together."""

    kind: str  # none, bernoulli, top
    combine: str  # linear, sign, sign_unweighted
    rescale: str = "none"
    clamp: float | None = None  # bound on F(tau), after rescaling
    decay_last: bool = False
    count: Callable[[int, float], int] = top_count


@dataclass
class Parameter:
    """One parameter under online merging: theta, and for step-K the anchor and the decay gathered since."""

    theta: list[float]
    tau: list[float] | None  # None: absent from the delta, takes the plain step
    inner: Any
    method: Method
    count: int = 0  # steps that had a gradient
    since: int = 0  # those of them at lr > 0 since the last merge
    anchor: list[float] = field(default_factory=list)
    decayed: float = 1.0

    def step(
        self,
        grad: list[float] | None,
        *,
        lr: float,
        decay: float = 0.0,
        merge_weight: float = 0.0,
        reserve_rate: float = 1.0,
        merge_every: int = 1,
        update_kept: Bits | None = None,
        tau_kept: Bits | None = None,
    ) -> None:
        """One optimizer step. Only ``bernoulli`` needs masks. At lr = 0 a merge that is due waits."""
        if grad is None:
            return
        if self.since == 0:
            self.anchor, self.decayed = list(self.theta), 1.0
        self.count += 1
        self.since += 1 if lr != 0 else 0
        before = list(self.theta)
        if not self.method.decay_last:
            self.apply_decay(lr, decay)
        update = self.inner.update(before, grad, lr)
        merging = self.since >= merge_every and lr != 0
        if self.tau is None or not merging:
            self.theta = [t + u for t, u in zip(self.theta, update, strict=True)]
        else:
            self.merge(update, merge_weight, reserve_rate, update_kept, tau_kept)
        if self.method.decay_last:
            self.apply_decay(lr, decay)
        if merging:
            self.since = 0

    def apply_decay(self, lr: float, decay: float) -> None:
        factor = 1 - lr * decay
        self.theta = [factor * t for t in self.theta]
        self.decayed *= factor

    def merge_now(self, alpha: float, p: float, update_kept: Bits | None, tau_kept: Bits | None) -> None:
        """Merge what is pending without taking a step; steps at lr = 0 leave nothing pending."""
        if self.since > 0 and self.tau is not None:
            self.merge([0.0] * len(self.theta), alpha, p, update_kept, tau_kept)
            self.since = 0

    def merge(
        self, update: list[float], alpha: float, p: float, update_kept: Bits | None, tau_kept: Bits | None
    ) -> None:
        """Delta_c = (theta - c anchor) + Delta; theta <- c anchor + (1-alpha) F(Delta_c) (+) alpha F(tau)."""
        assert self.tau is not None
        floor = [self.decayed * a for a in self.anchor]
        pending = [(t - f) + u for t, f, u in zip(self.theta, floor, update, strict=True)]
        bracket = merged_update(self.method, pending, self.tau, alpha, p, update_kept, tau_kept)
        self.theta = [f + b for f, b in zip(floor, bracket, strict=True)]


def merged_update(
    method: Method,
    update: Sequence[float],
    tau: Sequence[float],
    alpha: float,
    p: float,
    update_kept: Bits | None = None,
    tau_kept: Bits | None = None,
) -> list[float]:
    """((1-alpha) F(update)) (+) (alpha F(tau))."""
    if method.kind == "top" and p != 1:
        k = method.count(len(update), p)
        update_kept, tau_kept = top_mask(update, k), top_mask(tau, k)
    elif method.kind == "none" or p == 1:
        update_kept = tau_kept = None
    first = sparsify(list(update), p, update_kept, method.rescale)
    second = sparsify(list(tau), p, tau_kept, method.rescale)
    if method.clamp is not None:
        bounded = [min(method.clamp, max(-method.clamp, v)) for v in flat(second)]
        second = shaped(bounded, second)
    return flat(consensus([first, second], [1 - alpha, alpha], method.combine))


PAPER = {"ondare": Method("bernoulli", "linear"), "onties": Method("top", "sign")}
RELEASED = {
    "ondare": Method("bernoulli", "linear", rescale="expected", clamp=1.0, decay_last=True),
    "onties": Method("top", "sign_unweighted", clamp=1.0, decay_last=True, count=released_top_count),
}
