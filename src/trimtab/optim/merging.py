"""The merge that OnDARE, OnTIES and OnlineMerging share: τ by name, masks by key, one bracket added once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import UserError, unknown
from trimtab.ops import DELTA, UPDATE, MaskKey, Preset, canonical_name, combine, combine_parts, sparsify
from trimtab.optim.arrival import ArrivalMeter
from trimtab.optim.precision import ROUNDINGS, Rounding

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
    meter: ArrivalMeter | None = field(default=None, repr=False)
    _tau: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _fixed: dict[str, tuple[float, Tensor]] = field(default_factory=dict, repr=False)

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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tau": {}, "_fixed": {}, "meter": None}

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
            f"eps_placement={preset.eps_placement}"
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
            self.delta.check_policy([(name, p.detach()) for name, p in parameters])

    # -- one parameter

    def skips(self, name: str, group: dict[str, Any]) -> bool:
        """Whether the plain step is the whole step: no delta, or α = 0 with F the identity."""
        if not self.merges(name):
            return True
        identity = self.preset.operator.is_identity_on_first(_weights(group), group["reserve_rate"])
        return identity and not self.force_merge

    def open_interval(self, state: dict[str, Any], master: Tensor) -> None:
        """Begin an interval of K steps at ``master``: keep the anchor, no decay yet, no step yet."""
        state[ANCHOR] = master.detach().clone()
        state[DECAY] = 1.0
        state[SINCE] = 0

    def accumulated(
        self, state: dict[str, Any], master: Tensor, update: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (c·anchor, Δ_c = (θ − c·anchor) + Δ) for the interval in ``state``."""
        anchor: Tensor = state[ANCHOR].to(master.dtype)
        base = anchor if state[DECAY] == 1.0 else anchor * state[DECAY]
        moved = master - base
        if update is None:
            return base, moved.to(torch.float64 if moved.dtype == torch.float64 else torch.float32)
        return base, moved.to(update.dtype) + update

    def merge_into(
        self,
        master: Tensor,
        base: Tensor,
        update: Tensor,
        *,
        name: str,
        group: dict[str, Any],
        step: int,
        stored: torch.dtype,
    ) -> None:
        """Set ``master ← base + ((1−α)·F(Δ)) ⊕ (α·F(τ))``, the bracket formed in Δ's dtype and added once.

        Args:
            master: where the result goes.
            base: θ after decay, or c·anchor.
            update: Δ or Δ_c; its dtype is that of the arithmetic.
            name: canonical parameter name.
            group: its param group: α and p.
            step: the parameter's own step count, which keys the masks.
            stored: dtype in which the sum is kept, for the arriving share.
        """
        tau, tau_rate = self._delta_term(name, update, group["reserve_rate"])
        keys = [MaskKey(self.seed, UPDATE, step, name), MaskKey(self.seed, DELTA, step, name)]
        arguments = (
            [update, tau],
            _weights(group),
            [group["reserve_rate"], tau_rate],
            self.preset.operator,
            keys,
        )
        if self.meter is None:
            bracket = combine(*arguments)
        else:
            parts = combine_parts(*arguments)
            bracket = parts[0] + parts[1]
            self.meter.add(base, parts, stored)
        torch.add(base, bracket, out=master)

    def _delta_term(self, name: str, like: Tensor, rate: float) -> tuple[Tensor, float]:
        """τ with the rate it is still to be sparsified at: 1 where F(τ) does not change and was kept."""
        if self.preset.redraw and self.preset.operator.sparsify != "top":
            return self._values(name, like), rate
        at, kept = self._fixed.get(name, (None, None))
        if kept is None or at != rate or not _alike(kept, like):
            kept = self._sparsified_once(name, self._values(name, like), rate)
            self._fixed[name] = (rate, kept)
            if at is None:  # τ itself is needed again only where p moves, which is not known yet
                del self._tau[name]
        return kept, 1.0

    def _values(self, name: str, like: Tensor) -> Tensor:
        tau = self._tau.get(name)
        if tau is None or not _alike(tau, like):
            tau = self._tau[name] = self.delta.tensor(name, dtype=like.dtype).to(like.device)
        return tau

    def _sparsified_once(self, name: str, tau: Tensor, rate: float) -> Tensor:
        operator, clamp, key = self.preset.operator, self.preset.clamp, MaskKey(self.seed, DELTA, 0, name)
        kept = sparsify(
            tau, operator.sparsify, rate, rescale=operator.rescale, key=key, counting=operator.counting
        )
        return kept if clamp is None else kept.clamp(-clamp, clamp)


def named(groups: Iterable[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """(canonical name, parameter) over all groups, in order."""
    return [
        (canonical_name(name), p)
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.device, one.dtype) == (other.device, other.dtype)


def _weights(group: dict[str, Any]) -> tuple[float, float]:
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
