"""What OnDARE, OnTIES and OnlineMerging merge, and how: τ by name, F(τ) where it is fixed, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.delta.held import HeldDelta, Storage, Where
from trimtab.errors import UserError, unknown
from trimtab.ops import DELTA, MaskKey, Operator, Preset, canonical_name
from trimtab.ops.kernels.job import Job, Tau
from trimtab.ops.kernels.torch_engine import update_dtype
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place
from trimtab.ops.select import Part, thinnings
from trimtab.ops.sparsify import Thinning, thin, thinning
from trimtab.optim.jobs import kept_count
from trimtab.optim.precision import ROUNDINGS, Rounding
from trimtab.optim.settling import check_policy

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta

ANCHOR, DECAY, SINCE = "merge_anchor", "merge_decay", "merge_since"


@dataclass
class Merging:
    """What is merged and how; holds τ by canonical name, never in the optimizer's state.

    Args:
        delta: the reference delta τ.
        preset: operator and its place in the step.
        seed: seed of every mask.
        rounding: how parameters are stored (see :mod:`~trimtab.optim.precision`).
        policy_differs: skip the check that a fresh policy equals the reference.
        without_delta: one regular expression, or several, that find (``re.search``) the canonical names of
            the parameters that have no delta and take the plain step.
        force_merge: run the arithmetic where the merge is the identity; for tests.
        delta_storage: how τ is held (see :class:`~trimtab.delta.held.HeldDelta`).
        delta_device: where it is held.

    Raises:
        UserError: a pattern is no regular expression, the seed is out of range, or the rounding unknown.
    """

    delta: ReferenceDelta
    preset: Preset
    seed: int = 0
    rounding: Rounding = "auto"
    policy_differs: bool = False
    without_delta: str | Sequence[str] = ()
    force_merge: bool = False
    delta_storage: Storage = "auto"
    delta_device: Where = "parameter"
    _held: HeldDelta = field(init=False, repr=False)
    _squares: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed must be a whole number in [0, 2^64), got {self.seed!r}")
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)
        given = self.without_delta
        self.without_delta = (given,) if isinstance(given, str) else tuple(given)
        for pattern in self.without_delta:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"without_delta pattern {pattern!r} is no regular expression ({error})"
                ) from error

        self._held = HeldDelta(self.delta, storage=self.delta_storage, device=self.delta_device)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_held"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = HeldDelta(self.delta, storage=self.delta_storage, device=self.delta_device)

    # -- what belongs to what

    def identity(self, merge_every: int) -> str:
        """What a saved state must agree with, readable: τ's content hash and the fields that define the
        merge.
        """
        operator, preset = self.preset.operator, self.preset
        return (
            f"tau={self.delta.fingerprint} sparsify={operator.sparsify} rescale={operator.rescale} "
            f"consensus={operator.consensus} redraw={preset.redraw} merge_every={merge_every} "
            f"seed={self.seed} counting={operator.counting} clamp={preset.clamp} decay={preset.decay} "
            f"eps_placement={preset.eps_placement} storage={self._held.describe()}"
        )

    def merges(self, name: str) -> bool:
        """Whether the parameter has a delta."""
        return name in self.delta

    def check_names(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse parameters that have no delta and match no pattern, shapes that differ, and idle
        patterns.
        """
        parameters = list(parameters)
        patterns = [re.compile(pattern) for pattern in self.without_delta]
        self._refuse_idle(patterns, [name for name, _ in parameters])
        absent = [
            name
            for name, p in parameters
            if p.requires_grad and not self.merges(name) and not any(q.search(name) for q in patterns)
        ]
        if absent:
            raise UserError(
                f"{len(absent)} trained parameters have no reference delta ({_some(absent)}); build the "
                "delta from this model's reference and base, or name them in without_delta to give them the "
                "plain step"
            )
        differing = [
            f"{name} is {tuple(p.shape)}, its delta {tuple(self.delta.shape(name))}"
            for name, p in parameters
            if self.merges(name) and tuple(p.shape) != tuple(self.delta.shape(name))
        ]
        if differing:
            raise UserError(
                f"{len(differing)} parameters differ in shape from the reference delta: {_some(differing)}"
            )

    def _refuse_idle(self, patterns: Iterable[re.Pattern[str]], names: Sequence[str]) -> None:
        for pattern in patterns:
            found = [name for name in names if pattern.search(name)]
            if not found:
                raise UserError(
                    f"without_delta pattern {pattern.pattern!r} matches no parameter of the optimizer"
                )
            if all(map(self.merges, found)):
                raise UserError(
                    f"without_delta pattern {pattern.pattern!r} matches only parameters that have a "
                    f"reference delta ({_some(found)}), so it does nothing; for the plain step put them in a "
                    "group with merge_weight 0 and reserve_rate 1"
                )

    def check_policy(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse a fresh policy that is not the reference: τ would be the wrong direction."""
        if not self.policy_differs:
            check_policy(self.delta, parameters)

    # -- one parameter

    def changes_nothing(self, weights: tuple[float, float], rate: float) -> bool:
        """Whether a merge is the plain step: α = 0 with F the identity."""
        return self.preset.operator.is_identity_on_first(weights, rate) and not self.force_merge

    @property
    def masked_once(self) -> bool:
        """Whether F(τ) is the same at every merge: drawn once, or ``top``, or no F at all."""
        return not self.preset.redraw or self.preset.operator.sparsify == "top"

    @property
    def needs_whole_tensors(self) -> bool:
        """Whether F of an entry depends on the other ones, so that processes with parts must settle it."""
        operator = self.preset.operator
        return operator.sparsify == "top" or (operator.sparsify != "none" and operator.rescale == "l1")

    def attach(self, job: Job, group: dict[str, Any]) -> None:
        """Give a job its τ, as F(τ) where that does not change, and the count k of ``top``."""
        rate, operator = group["reserve_rate"], self.preset.operator
        if operator.sparsify == "top":
            job.count = kept_count(job.layout.total, rate, operator.counting)
        job.tau = self._term(job, rate)

    def streams(self, job: Job) -> bool:
        """Whether τ comes from host memory anew at every step."""
        return self.delta_device == "host" and job.param.device.type != "cpu"

    def prefetch(self, names: Sequence[str]) -> None:
        """Tell in which order the parameters will be stepped, so that a τ in host memory is under way."""
        self._held.prefetch(names)

    def tau_squared(self, name: str) -> float:
        """Σ τ² of one whole parameter."""
        if not self._squares:
            self._squares = {known: one.norm**2 for known, one in self.delta.statistics.items()}
        return self._squares[name]

    def held_bytes(self) -> int:
        """Bytes that τ takes as it is held."""
        return self._held.nbytes()

    def _term(self, job: Job, rate: float) -> Tau:
        operator, clamp = self.preset.operator, self.preset.clamp
        changes = (operator.sparsify != "none" and rate != 1) or clamp is not None
        mask = _FixedMask(job, rate, operator, clamp) if self.masked_once and changes else None
        return self._held.get(
            job.name,
            job.layout,
            device=job.param.device,
            dtype=job.update_dtype or update_dtype(job.param.dtype),
            mask=mask,
            key=None if mask is None else rate,
            mask_at=None if mask is None else mask.at,
        )


@dataclass
class _FixedMask:
    """F(τ) of a τ that is masked once, in a shard as in the whole."""

    job: Job
    rate: float
    operator: Operator
    clamp: float | None
    how: Thinning | None = None

    def __call__(self, tau: Tensor) -> Tensor:
        """F of the local part; processes that share the parameter settle it together."""
        job, kind, rescale = self.job, self.operator.sparsify, self.operator.rescale
        key = MaskKey(job.seed, DELTA, 0, job.name)
        if job.group is None:
            self.how = thinning(tau, kind, self.rate, rescale=rescale, key=key, count=job.count)
        else:
            part = Part(tau, job.layout, self.rate, job.count, key)
            (self.how,) = thinnings([part], kind, rescale, job.group)
        return self.at(tau, job.layout)

    def at(self, tau: Tensor, layout: Layout) -> Tensor:
        """F of another rectangle, once that of the local part is settled."""
        assert self.how is not None
        (kept,) = thin([tau], [self.how], Place(layout))
        return kept if self.clamp is None else kept.clamp(-self.clamp, self.clamp)


def named(groups: Iterable[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """(canonical name, parameter) over all groups, in order."""
    return [
        (canonical_name(name), p)
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def weights(group: dict[str, Any]) -> tuple[float, float]:
    """(1 − α, α) of a group in this step."""
    alpha = group["merge_weight"]
    if group.get("merge_weight_follows_lr"):
        lr, first = float(group["lr"]), group["merge_base_lr"]
        if lr != 0 and first == 0:
            raise UserError(
                "merge_weight_follows_lr scales merge_weight by lr / first lr, and the first lr was 0 "
                f"(now {lr}); build the optimizer with the peak learning rate"
            )
        alpha = alpha * lr / first if lr != 0 else 0.0
    if not 0 <= alpha <= 1:
        raise UserError(
            f"merge_weight is {alpha} in this step (merge_weight_follows_lr scales it by lr / first lr); it "
            "must be in [0, 1]"
        )
    return 1.0 - alpha, alpha


def _some(items: Sequence[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", …" if len(items) > count else "")
