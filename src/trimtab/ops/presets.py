"""The table of methods: each is a row of fields with its source. A new method is a new row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.ops.combine import Operator

Fidelity = Literal["paper", "released", "mergekit"]
Method = Literal["ondare", "onties"]


@dataclass(frozen=True)
class Preset:
    """One row: the operator and where it stands in the step.

    Args:
        operator: F and ⊕ (see :class:`Operator`).
        redraw: whether τ's mask is drawn anew at each merge; else once, at the start. For ``top`` both are
            the same.
        clamp: bound on the entries of F(τ) when it is masked once; None leaves them.
        decay: whether decoupled weight decay acts before the merge (torch.optim.AdamW) or after it.
        eps: Adam's ε.
        eps_placement: ``inside`` adds ε to √v̂ (torch.optim.AdamW); ``outside`` adds it to √v, before the
            bias correction.
        source: where the row comes from.
    """

    operator: Operator
    redraw: bool
    source: str
    clamp: float | None = None
    decay: Literal["before", "after"] = "before"
    eps: float = 1e-8
    eps_placement: Literal["inside", "outside"] = "inside"


PRESETS: dict[tuple[Method, Fidelity], Preset] = {
    ("ondare", "paper"): Preset(
        Operator("bernoulli", "none", "linear"), redraw=True, source="arXiv 2405.17931, Eq. 3 and 4"
    ),
    ("ondare", "released"): Preset(
        Operator("bernoulli", "expected", "linear"),
        redraw=False,
        clamp=1.0,
        decay="after",
        eps=1e-6,
        eps_placement="outside",
        source="the released code of arXiv 2405.17931: dropout rescales by 1/p",
    ),
    ("ondare", "mergekit"): Preset(
        Operator("bernoulli", "l1", "linear"),
        redraw=True,
        source="mergekit's dare_linear, which restores the L1 norm",
    ),
    ("onties", "paper"): Preset(
        Operator("top", "none", "sign"), redraw=True, source="arXiv 2405.17931, Eq. 5 to 7"
    ),
    ("onties", "released"): Preset(
        Operator("top", "none", "sign_unweighted", counting="floor"),
        redraw=False,
        clamp=1.0,
        decay="after",
        eps=1e-6,
        eps_placement="outside",
        source="the released code of arXiv 2405.17931: the vote is taken before weighting, k = int(p·n)",
    ),
    # Without mergekit's `normalize`: divided by its own weight α wherever Δ does not agree, τ would enter
    # whole at each step.
    ("onties", "mergekit"): Preset(
        Operator("top", "none", "sign", counting="floor"),
        redraw=True,
        source="mergekit's ties without normalize; k = int(p·n)",
    ),
}
FIDELITIES: tuple[Fidelity, ...] = ("paper", "released", "mergekit")
