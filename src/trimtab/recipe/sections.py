"""The sections of a recipe, one class each: what may be written, what it means, and its default."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import model_validator

from trimtab.recipe.regularisers import ChildTuning, ElasticReset, MovingAverage, Projection, Pull
from trimtab.recipe.reward_source import RewardSource as RewardSource
from trimtab.recipe.reward_source import RewardSources as RewardSources
from trimtab.recipe.section import Section as Section
from trimtab.recipe.section import Source as Source
from trimtab.recipe.section import Sources
from trimtab.recipe.values import (
    Flag,
    NonNegative,
    NonNegativeCount,
    Pattern,
    Patterns,
    Positive,
    PositiveCount,
    PositiveShare,
    Share,
    ShareBelowOne,
    TextOrTexts,
    Texts,
)

MERGING = ("ondare", "onties", "online_merging")
"""The optimizers that merge a reference delta in as they go."""

MERGE_SETTINGS = (
    "reserve_rate",
    "merge_weight",
    "merge_every",
    "fidelity",
    "sparsify",
    "consensus",
    "rescale",
    "redraw",
    "rounding",
    "delta_storage",
    "delta_device",
    "state_dtype",
    "kernel",
    "measure_every",
    "merge_weight_follows_lr",
    "policy_differs",
    "without_delta",
)
"""The settings that only those optimizers have."""

MERGING_DEFAULTS = {
    "reserve_rate": 0.01,
    "merge_weight": 1e-7,
    "merge_every": 1,
    "rounding": "auto",
    "delta_storage": "auto",
    "delta_device": "parameter",
    "kernel": "auto",
    "measure_every": 100,
    "merge_weight_follows_lr": False,
    "policy_differs": False,
    "without_delta": [],
}
"""What the settings of merging are when a merging optimizer is named and they are not given."""

BETAS = (0.9, 0.999)
"""Adam's decay rates when they are not given."""


class Data(Section):
    """What to train on, and what to measure on."""

    train: Sources
    """A path, a hub id, a mapping (path, weight, split, subset, limit), or a list of these."""
    eval: Sources | None = None
    """Held-out rows, written as ``train`` is."""
    format: Literal["auto", "trl", "chat", "alpaca", "sharegpt", "hh", "ranked"] = "auto"
    """How rows are written; auto: told from the columns."""
    max_length: PositiveCount = 1024
    """Longest example in tokens, chat template included."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer ones; either way they are counted."""
    streaming: Flag = False
    """Read rows as they are needed instead of all at once; needs training.max_steps."""


class Adapter(Section):
    """Train a LoRA adapter instead of the weights."""

    r: PositiveCount = 16
    """Rank."""
    alpha: Positive = 32.0
    """Scale: the adapter's product is multiplied by alpha / r."""
    dropout: ShareBelowOne = 0.0
    """Share of the adapter's inputs dropped."""
    target_modules: TextOrTexts = "all-linear"
    """Modules that get an adapter: "all-linear", one regular expression, or a list of names."""
    rslora: Flag = False
    """Scale by alpha / sqrt(r) instead (arXiv 2312.03732)."""
    dora: Flag = False
    """Train a magnitude for each row of the weights beside the adapter (DoRA, arXiv 2402.09353)."""


class Group(Section):
    """Parameters whose names a pattern finds, and what differs for them; the first group that fits counts."""

    pattern: Pattern
    """A regular expression searched for in the parameter's name."""
    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None
    reserve_rate: PositiveShare | None = None
    merge_weight: Share | None = None
    merge_every: PositiveCount | None = None


class GaLore(Section):
    """Adam in a low-rank subspace of each matrix's gradient (GaLore, arXiv 2403.03507)."""

    rank: PositiveCount = 128
    """r: how many singular vectors of the gradient are kept."""
    update_proj_gap: PositiveCount = 200
    """T: steps after which a matrix takes new singular vectors."""
    scale: Positive = 0.25
    """alpha of the paper: factor on what is projected back."""
    plain: Patterns | None = None
    """Regular expressions for matrices that are not projected; null: embeddings and heads."""


Plain = Literal["adamw", "adafactor", "adamw_8bit", "galore"]
"""The optimizers that merge nothing, and that online_merging can wrap."""


class Optimizer(Section):
    """AdamW and its kin, or online merging around one: theta + ((1 - alpha) F(update)) (+) (alpha F(tau))."""

    name: Literal["adamw", "adafactor", "adamw_8bit", "galore", "ondare", "onties", "online_merging"] = (
        "adamw"
    )
    """online_merging takes any pairing of sparsify and consensus, and wraps the optimizer named by inner."""
    inner: Plain | None = None
    """What online_merging wraps; adamw when not given."""
    galore: GaLore | None = None
    """Settings of galore, by name or as inner."""
    lr: NonNegative
    """Learning rate at its peak; default 1e-6 for dpo, ipo, kto, ppo, 1e-5 for reward, 2e-5 for sft, rrhf."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = BETAS
    eps: Positive | None = None
    """Adam's epsilon; given by the fidelity when not set (1e-8; released: 1e-6)."""
    weight_decay: NonNegative = 0.0
    """Decoupled; applied before the update, never sparsified."""
    reserve_rate: PositiveShare | None = None
    """p: share of entries the sparsifier keeps; 0.01 when not given."""
    merge_weight: Share | None = None
    """alpha: how much of the reference delta goes in at every merge; 1e-7 when not given."""
    merge_every: PositiveCount | None = None
    """K: steps between merges; 1 when not given."""
    fidelity: Literal["paper", "released", "mergekit"] | None = None
    """Whose numerics: the paper's equations (when not given), the authors' released code, or mergekit's."""
    sparsify: Literal["none", "bernoulli", "top"] | None = None
    """F; given by the name for ondare (bernoulli) and onties (top)."""
    consensus: Literal["linear", "sign", "sign_unweighted"] | None = None
    """(+); given by name and fidelity when not set (ondare: linear, onties: sign)."""
    rescale: Literal["none", "expected", "l1"] | None = None
    """What makes up for the dropped entries; given by the fidelity when not set."""
    redraw: Flag | None = None
    """Draw tau's mask anew at every merge, or once; given by the fidelity when not set."""
    rounding: Literal["auto", "nearest", "residual", "stochastic"] | None = None
    """How small updates survive rounding; auto (when not given): a 16-bit residual below fp32."""
    delta_storage: Literal["auto", "float32", "bfloat16", "int8", "sparse"] | None = None
    """How tau is held; auto (when not given): exactly, and sparse where that is smaller."""
    delta_device: Literal["parameter", "host"] | None = None
    """Where tau is held: beside the parameter (when not given) or in the host's pinned memory."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Adam's moments (ondare and onties): fp32 (when not given), bf16, or torchao's 8 bits."""
    kernel: Literal["auto", "native", "triton", "torch"] | None = None
    """What runs the step; auto (when not given) is the fastest there is."""
    measure_every: PositiveCount | None = None
    """Steps between measurements of what share of a merge arrives; 100 when not given."""
    merge_weight_follows_lr: Flag | None = None
    """Scale alpha with the learning rate's schedule."""
    policy_differs: Flag | None = None
    """The policy is not the reference when training starts, and that is meant."""
    without_delta: Patterns | None = None
    """Regular expressions for parameters the delta does not have; they take the plain step."""
    groups: tuple[Group, ...] = ()
    """Parameters with their own settings."""
    ema: MovingAverage | None = None
    """Evaluate and keep a moving average of the weights."""
    child_tuning: ChildTuning | None = None
    """Train with a part of the gradient."""
    pull: Pull | None = None
    """Pull the weights to where they started."""
    elastic_reset: ElasticReset | None = None
    """Reset the weights to their moving average from time to time."""
    projection: Projection | None = None
    """Remove from the gradient its part along capability gradients."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Spell out the defaults that depend on the name: those of merging, and of what it wraps."""
        if not isinstance(values, dict):
            return values
        defaults = dict(MERGING_DEFAULTS) if values.get("name") in MERGING else {}
        plain = values.get("name")
        if plain == "online_merging":
            plain = defaults["inner"] = values.get("inner") or "adamw"
            if values.get("sparsify") == "none":
                del defaults["reserve_rate"]
        elif defaults:
            defaults["fidelity"] = "paper"
        if plain == "galore":
            defaults["galore"] = {}
        given = {key: value for key, value in values.items() if value is not None}
        return {**defaults, **given} if defaults else values

    @property
    def merges(self) -> bool:
        """Whether this optimizer merges a reference delta in."""
        return self.name in MERGING

    @property
    def plain(self) -> Plain:
        """Whose update it is that is taken, or merged: OnDARE and OnTIES have AdamW's."""
        if self.name == "ondare" or self.name == "onties":
            return "adamw"
        return self.inner or "adamw" if self.name == "online_merging" else self.name


class Schedule(Section):
    """How a value moves over training, as a factor on what the optimizer section gives.

    A linear warm-up from 0, then from 1 down (or up) to ``end`` at the last step along ``type``.
    """

    type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeCount | None = None
    """Steps of warm-up."""
    warmup_ratio: ShareBelowOne | None = None
    """Warm-up as a share of all steps, rounded up; instead of warmup_steps."""
    end: NonNegative | None = None
    """The factor at the last step; 0 when not given. Has no meaning for constant."""

    def warmup(self, total: int) -> int:
        """Return the steps of warm-up in a training of ``total`` steps."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total)
        return self.warmup_steps or 0

    def factor(self, step: int, total: int) -> float:
        """Return the factor in force for the step after ``step`` finished ones, of ``total``.

        With ``end`` = 0 these are the schedules of the same names in transformers.

        Examples:
            >>> [Schedule(type="linear", warmup_steps=2).factor(step, 6) for step in range(7)]
            [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        warmup = self.warmup(total)
        if step < warmup:
            return step / max(1, warmup)
        if self.type == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        remaining = 1.0 - progress if self.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        end = self.end or 0.0
        return end + (1.0 - end) * remaining


class LearningRateSchedule(Schedule):
    """The learning rate's schedule; linear to 0 unless said otherwise, as in transformers."""

    type: Literal["constant", "linear", "cosine"] = "linear"


class Schedules(Section):
    """Schedules of the learning rate, of alpha and of p."""

    lr: LearningRateSchedule = LearningRateSchedule()
    merge_weight: Schedule | None = None
    reserve_rate: Schedule | None = None
    """Without warm-up: p = 0 would keep nothing."""


class Evaluation(Section):
    """When the held-out rows are measured, and what is generated."""

    every: PositiveCount | None = None
    """Steps between evaluations; null: only before and after training."""
    at_start: Flag = True
    """Measure the model before the first step, so that there is something to compare with."""
    samples: NonNegativeCount = 0
    """Answers generated for this many held-out prompts, before and after training."""
    prompts: Texts = ()
    """More prompts to answer, written out here."""
    max_new_tokens: PositiveCount = 128
    """Longest generated answer."""
