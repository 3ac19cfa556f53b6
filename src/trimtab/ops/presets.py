"""The table of methods: each is a row of fields with its source. A new method is a new row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.ops.combine import Operator
from trimtab.ops.sparsify import Rescale

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
        Operator("top", "none", "sign", counting="truncate"),
        redraw=True,
        source="mergekit's ties without normalize; k = max(1, int(p·n))",
    ),
}
FIDELITIES: tuple[Fidelity, ...] = ("paper", "released", "mergekit")

MergeMethod = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "hma"]
MergeFidelity = Literal["paper", "mergekit"]


@dataclass(frozen=True)
class MergePreset:
    """One row of the offline methods: anchor + λ·⊕_w(F(δ₁), F(δ₂), …), or the weighted sum of the models.

    Args:
        operator: F and ⊕; None for ``slerp``, which is neither.
        anchored: whether the terms are deltas to a base, and the result is added to it. Else the terms are
            the models.
        rescaled: what ``rescale: true`` means.
        source: where the row comes from.
        stored: whether the arithmetic is in the dtype that the models are read in, each operation rounded
            to it. Else it is in fp32 (fp64 where a model is), and the result is rounded once.
        scope: over what ``top`` ranks the entries: each tensor on its own, or all of a model's together.
    """

    operator: Operator | None
    anchored: bool
    rescaled: Rescale
    source: str
    stored: bool = False
    scope: Literal["tensor", "model"] = "tensor"


_SUM, _MEAN = Operator(), Operator(normalize=True)

MERGES: dict[tuple[MergeMethod, MergeFidelity], MergePreset] = {
    ("linear", "paper"): MergePreset(_MEAN, False, "none", "arXiv 2203.05482 (model soups)"),
    ("task_arithmetic", "paper"): MergePreset(_SUM, True, "none", "arXiv 2212.04089"),
    ("ties", "paper"): MergePreset(
        Operator("top", "none", "sign", normalize=True),
        True,
        "l1",
        "arXiv 2306.01708, Algorithm 1",
        scope="model",
    ),
    ("dare_linear", "paper"): MergePreset(
        Operator("bernoulli", "expected"), True, "expected", "arXiv 2311.03099, Eq. 2 and 3"
    ),
    ("dare_ties", "paper"): MergePreset(
        Operator("bernoulli", "expected", "sign", normalize=True),
        True,
        "expected",
        "arXiv 2311.03099, Eq. 2 and 3, then the election and the mean of arXiv 2306.01708",
    ),
    ("slerp", "paper"): MergePreset(None, False, "none", "Shoemake, SIGGRAPH 1985"),
    ("hma", "paper"): MergePreset(_SUM, False, "none", "arXiv 2309.06256, heterogeneous model averaging"),
    ("linear", "mergekit"): MergePreset(_MEAN, False, "none", "mergekit's linear"),
    ("task_arithmetic", "mergekit"): MergePreset(
        _SUM, True, "none", "mergekit's task_arithmetic", stored=True
    ),
    ("ties", "mergekit"): MergePreset(
        Operator("top", "none", "sign_or_plus", normalize=True, counting="truncate"),
        True,
        "l1",
        "mergekit's ties",
        stored=True,
    ),
    ("dare_linear", "mergekit"): MergePreset(
        Operator("bernoulli", "l1"), True, "l1", "mergekit's dare_linear", stored=True
    ),
    ("dare_ties", "mergekit"): MergePreset(
        Operator("bernoulli", "l1", "sign_or_plus"), True, "l1", "mergekit's dare_ties", stored=True
    ),
    ("slerp", "mergekit"): MergePreset(None, False, "none", "mergekit's slerp"),
    ("hma", "mergekit"): MergePreset(_SUM, False, "none", "arXiv 2309.06256; mergekit has none"),
}
