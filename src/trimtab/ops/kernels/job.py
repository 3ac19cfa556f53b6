"""What an engine needs for one step of one parameter: storage, settings, the place in the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trimtab.ops.layout import Layout
from trimtab.ops.sparsify import Cut

Stored = Literal["nearest", "residual", "stochastic"]

__all__ = ["Cut", "Job", "Settings", "Stored", "Tau"]


class Tau(Protocol):
    """A reference delta as it is held (see :mod:`trimtab.ops.formats`): one parameter's local part."""

    @property
    def masked(self) -> bool:
        """Whether these values are F(τ) already, so that nothing is to be sparsified any more."""

    def dense(self, low: int, high: int) -> Tensor:
        """The values of the local range ``low … high−1``, flat, in fp32 (fp64 where held so)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step's arithmetic depends on beside the entries; shared by the parameters it is equal for.

    Args:
        merge: merge in this step; else the plain step (Adam and decay alone).
        weights: (1 − α, α).
        rate: p, the reserve rate.
        decay: 1 − lr·λ; 1 where there is no decay.
        decay_after: decay after the merge (``released``) instead of before it.
        step: Adam's step count t ≥ 1 (this step included); also the step of every mask's key.
        lr: learning rate of Adam.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: ε added to √v̂ (where the preset adds it to √v, the caller has divided it by √(1 − β₂ᵗ)).
        maximize: whether the gradient's sign is turned.
        reopen: after the step, copy the new master into the anchor: the next interval begins.
    """

    merge: bool
    weights: tuple[float, float]
    rate: float
    decay: float = 1.0
    decay_after: bool = False
    step: int = 1
    lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    maximize: bool = False
    reopen: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """One parameter's local part in one step. All tensors have the local shape.

    The first block of fields never changes while the job lives (a changed parameter gets a new job), so an
    engine may keep in ``cache`` what it derives from them; the second block is set before every step.

    With θ the master (the parameter in its working dtype, joined with its residual), entry by entry:

        θ' = decay·θ                                             (unless decay_after)
        u  = Adam's update from ``grad`` and the moments         (0 where grad is None)
        plain:  θ ← θ' + u
        merge:  base = anchor_decay·anchor where there is an anchor, else θ'
                Δ    = (θ' − base) + u  where there is an anchor, else u
                θ ← base + ((1−α)·F(Δ)) ⊕ (α·F(τ))
        θ ← decay·θ                                              (if decay_after)

    Args:
        name: canonical name, part of every mask's key.
        seed: seed of every mask.
        layout: the local part's place in the unsharded tensor.
        param: fp32, bf16, fp16 or fp64; written in place.
        stored: how the master is kept: the parameter alone, with ``residual``, or rounded stochastically.
        residual: 16 bits beside each entry of ``param`` (``ops.split_master``), for ``stored="residual"``.
        exp_avg: Adam's first moment (fp32, bf16, or what :mod:`~trimtab.ops.formats` holds).
        exp_avg_sq: Adam's second moment.
        max_exp_avg_sq: AMSGrad's maximum of it; None without AMSGrad.
        group: the process group that the parameter is sharded over; None where the layout is whole.
        update_dtype: dtype of Δ; default max(fp32, the parameter's). A wider master that stands in for an
            fp32 parameter says fp32.
        kept_dtype: dtype in which the sum is kept, for what is measured of rounding; default that of
            ``param`` (of the master where there is a rounding help). A master that stands in says its
            parameter's.
        settings: this step's settings.
        grad: the gradient in any floating dtype; None where Δ is θ' − base alone.
        anchor: θ at the last merge (step-K) or before the wrapped optimizer's step, in the master's dtype.
        anchor_decay: c.
        tau: the reference delta; None only for plain steps.
        count: k of the top sparsifier, for the unsharded tensor.
        update: Δ in full, where it has been formed already (flat, local).
        cuts: where top cuts Δ and τ; None lets the engine find it (whole layouts only).
        factors: what F multiplies kept entries of Δ and τ with (rescaling); None lets the engine find it.
        cache: the engine's own.
    """

    name: str
    seed: int
    layout: Layout
    param: Tensor
    stored: Stored
    residual: Tensor | None = None
    exp_avg: Any = None
    exp_avg_sq: Any = None
    max_exp_avg_sq: Tensor | None = None
    group: Any = None
    update_dtype: torch.dtype | None = None
    kept_dtype: torch.dtype | None = None

    settings: Settings = field(default=Settings(False, (1.0, 0.0), 1.0))
    grad: Tensor | None = None
    anchor: Tensor | None = None
    anchor_decay: float = 1.0
    tau: Tau | None = None
    count: int = 0
    update: Tensor | None = None
    cuts: tuple[Cut | None, Cut | None] = (None, None)
    factors: tuple[float, float] | None = None
    cache: Any = None
