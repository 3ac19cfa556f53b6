"""What an online merging optimizer tells about its merges, and how far they have carried the model.

**Drift.** α·F(τ) is no restoring force: every merge adds some more, wherever the model is. What matters is
S = Σ α·F(τ) over all merges so far (what the vote let through of it), in units of τ: ‖S‖ / ‖τ‖. S would
take one more copy of the model, so its norm is followed in two numbers per param group instead.

Let one merge of a group add α·G, where G is F(τ) with zeros where the vote was lost. With a mask that is
redrawn and no vote (``linear``), entry i of G is τᵢ·f·mᵢ, with mᵢ independent over merges and 1 with
probability p: mean q·τᵢ with q = f·p, and mean square r·τᵢ² with r = f²·p (f = 1 without rescaling, 1/p
with). Hence

    E‖S‖² = ‖τ‖² · [(Σ α·q)² + Σ α²·(r − q²)],

the first sum growing like T and the second, the noise of the masks, like √T; many entries make ‖S‖² its
expectation. With a mask that is the same in every merge (``top``, ``none``, or drawn once) G is the same
vector, so that ‖S‖ = ‖τ‖ · Σ α·√κ exactly, κ = ‖F(τ)‖²/‖τ‖². Both are

    ‖S‖² = ‖τ‖² · (along² + spread),    along = Σ α·q, spread = Σ α²·(r − q²),

with q = √κ and r = κ for fixed masks.

A vote (``sign``) lets a share v = ‖G‖²/‖F(τ)‖² of τ's part through. Given the votes, the mean of S over the
masks has at most the norm ‖τ‖ · Σ α·q·√v (triangle inequality; equal where the same entries lose every time)
and at least ‖τ‖ · Σ α·q·v (its component along τ; equal where every entry loses equally often). Therefore

    along += α·q·√v,    spread += α²·v·(r − q²)

is exact without a vote, and with one **the most that the drift can be**, too large by 1/√v at most. A merge
that leaves out some of a group's parameters (no gradient) counts likewise, with their share of the entries
in v.

q and r are known for redrawn masks (for ``l1`` they are those of 1/p, which its factor tends to in large
tensors); v, and κ of fixed masks, are measured at the measuring steps and held in between. The sums are plain
numbers in the param groups, so that they are saved and resumed with the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.ops import Operator
from trimtab.ops.kernels.sums import SUMS
from trimtab.optim.arrival import Arrival

ALONG, SPREAD = "merge_drift_along", "merge_drift_spread"
SURVIVING, KEPT = "merge_surviving", "merge_kept"
TAU, MEASURED = "merge_tau_squared", "merge_measured"
_FRESH = {ALONG: 0.0, SPREAD: 0.0, SURVIVING: 1.0, KEPT: -1.0, TAU: 0.0, MEASURED: 0}
"""What a param group starts with: κ and ‖τ‖² are not known yet, and nothing was measured at any step."""


@dataclass(frozen=True)
class Diagnostics:
    """What one merge looked like: one param group's, or all groups' together.

    Norms are over all entries of the group; NaN stands where something is not defined (the angle with a zero
    vector, a share of nothing).

    Args:
        step: the optimizer's step at which it was measured, from 1.
        update: ‖Δ‖.
        kept_update: ‖F(Δ)‖.
        delta: ‖α·F(τ)‖, before the vote.
        cosine: of the angle between (1 − α)·F(Δ) and α·F(τ), before the vote.
        conflicts: share of the entries where F(Δ) and F(τ) have different signs, of those where neither is 0.
        survived: share of ‖α·F(τ)‖² that the vote let through; 1 where there is none.
        arrived_update: share of (1 − α)·F(Δ), of its L1 mass, that was not lost to rounding.
        arrived_delta: the same share of α·F(τ).
        drift: ‖Σ α·F(τ)‖ / ‖τ‖ over all merges so far (see the module's docstring).
        groups: for all groups together: the same of each, None where a group has not merged yet.
    """

    step: int
    update: float
    kept_update: float
    delta: float
    cosine: float
    conflicts: float
    survived: float
    arrived_update: float
    arrived_delta: float
    drift: float
    groups: tuple[Diagnostics | None, ...] = ()

    @property
    def arrival(self) -> Arrival:
        """The two shares that arrived."""
        return Arrival(self.step, delta=self.arrived_delta, update=self.arrived_update)


def one_merge(operator: Operator, redraw: bool, rate: float, kept: float = -1.0) -> tuple[float, float]:
    """What a merge with α = 1 adds to the drift where nothing is outvoted: (q, r) of the module's docstring.

    Args:
        operator: F and ⊕.
        redraw: whether τ's mask is drawn anew at each merge.
        rate: p.
        kept: κ = ‖F(τ)‖²/‖τ‖² of a mask that stays the same, where it is known. Where it is not (negative):
            what a random mask keeps on average; for ``top`` the most it can.

    Returns:
        (q, r), in units of ‖τ‖ and ‖τ‖².

    Examples:
        >>> one_merge(Operator("bernoulli"), True, 0.25), one_merge(Operator("bernoulli"), False, 0.25)
        ((0.25, 0.25), (0.5, 0.25))
    """
    rescales = operator.rescale != "none"
    bernoulli = operator.sparsify == "bernoulli" and rate < 1
    if bernoulli and redraw:
        return (1.0, 1 / rate) if rescales else (rate, rate)
    if kept < 0:
        kept = (1 / rate if rescales else rate) if bernoulli else 1.0
    return math.sqrt(kept), kept


def drift(groups: Iterable[Mapping[str, Any]]) -> float:
    """‖Σ α·F(τ)‖ / ‖τ‖ so far, over some of an optimizer's param groups.

    Args:
        groups: param groups of an online merging optimizer; those that no measurement has seen yet (their ‖τ‖
            is not known) are left out.

    Returns:
        The drift; NaN before the first measurement.

    Examples:
        >>> seen = {"merge_drift_along": 0.03, "merge_drift_spread": 0.0, "merge_tau_squared": 4.0}
        >>> drift([seen]), drift([seen, {"merge_drift_along": 0.0, "merge_tau_squared": 32.0}])
        (0.03, 0.01)
    """
    squares = [
        (group[TAU], group.get(ALONG, 0.0) ** 2 + group.get(SPREAD, 0.0))
        for group in groups
        if group.get(TAU)
    ]
    whole = sum(tau for tau, _ in squares)
    return math.sqrt(sum(tau * square for tau, square in squares) / whole) if whole else math.nan


class DiagnosticsMeter:
    """Measures merges at their interval, and follows the drift at every one.

    A step goes ``begin``, then per group that merges ``merges`` (and ``add`` where the group ``wants`` it),
    then ``end``. What it must remember is in the param groups, under ``merge_…`` keys of plain numbers.

    Args:
        operator: F and ⊕.
        redraw: whether τ's mask is drawn anew at each merge.
        every: steps between measurements of a group; 0 measures nothing.

    Examples:
        >>> from trimtab.ops.kernels.sums import measure
        >>> groups = [{"params": []}]
        >>> meter = DiagnosticsMeter(Operator("bernoulli"), redraw=True)
        >>> meter.begin(groups, step=1), meter.wants(0)
        (True, True)
        >>> meter.merges(0, weight=0.1, rate=0.5)
        >>> one, tau = torch.ones(4), torch.tensor([2.0, 0.0, -2.0, 2.0])
        >>> sums = measure(one, one, one, tau, [0.9 * one, 0.1 * tau], torch.float32)
        >>> meter.add([0], sums.unsqueeze(0), [16.0])
        >>> found = meter.end(groups)
        >>> round(found.conflicts, 3), round(found.cosine, 3), round(found.drift, 3)
        (0.333, 0.289, 0.071)
    """

    def __init__(self, operator: Operator, redraw: bool, every: int = 100) -> None:
        self.operator, self.redraw, self.every = operator, redraw, every
        self._latest: dict[int, _Latest] = {}
        self._step, self._due = 0, frozenset[int]()
        self._merged: dict[int, tuple[float, float, float]] = {}
        self._rows: list[tuple[Sequence[int], Tensor, Sequence[float]]] = []
        self._advanced: dict[int, _Advanced] = {}

    def begin(self, groups: Sequence[dict[str, Any]], step: int) -> bool:
        """Open step number ``step`` (from 1). Returns whether any group's merges are to be measured in it.

        A step may be opened again for parameters of which it has not seen a merge yet (``merge_now``); that
        is not measured.
        """
        self._step, self._merged, self._rows = step, {}, []
        for group in groups:
            for key, value in _FRESH.items():
                group.setdefault(key, value)
        self._due = frozenset(i for i, group in enumerate(groups) if self._is_due(group))
        return bool(self._due)

    def _is_due(self, group: Mapping[str, Any]) -> bool:
        last = group[MEASURED]
        again = self._step <= group.get("merge_step", 0)
        return self.every > 0 and not again and (last == 0 or self._step >= last + self.every)

    def wants(self, group: int) -> bool:
        """Whether merges of this group are to be measured in this step."""
        return group in self._due

    def merges(self, group: int, weight: float, rate: float, share: float = 1.0) -> None:
        """Note that a group merges in this step, in whole or in parts one after the other.

        Args:
            group: its index.
            weight: α in this step.
            rate: p.
            share: how much of the group merges, as a share of its entries that have a delta.
        """
        before = self._merged[group][2] if group in self._merged else 0.0
        self._merged[group] = (weight, rate, before + share)

    def add(self, groups: Sequence[int], sums: Tensor, tau_squared: Sequence[float]) -> None:
        """Take what was measured.

        Args:
            groups: the group of each row.
            sums: :func:`trimtab.ops.kernels.sums.measure` of each whole parameter, (rows, SUMS): of a sharded
                one, added up over the processes that have its parts.
            tau_squared: Σ τ² of each row's parameter, before F.
        """
        self._rows.append((groups, sums, tau_squared))

    def end(self, groups: Sequence[dict[str, Any]]) -> Diagnostics | None:
        """Close the step: advance the drift. Returns what was measured, or None where nothing was."""
        measured = sorted(self._due & self._merged.keys()) if self._rows else []
        if measured:
            table = self._table(len(groups))
            for i in measured:
                self._keep(i, groups[i], table[i])
        for i, (weight, rate, share) in self._merged.items():
            self._advance(i, groups[i], weight, rate, share)
        self._due, self._merged, self._rows = frozenset(), {}, []
        return self._result(groups) if measured else None

    def _table(self, count: int) -> list[list[float]]:
        """Per group: the sums over its rows, and Σ τ²."""
        table = torch.zeros(count, len(SUMS) + 1, dtype=torch.float64, device="cpu")
        for groups, sums, tau_squared in self._rows:
            tau = torch.tensor(tau_squared, dtype=torch.float64, device="cpu").unsqueeze(1)
            table.index_add_(0, torch.tensor(groups, device="cpu"), torch.cat([sums.cpu(), tau], dim=1))
        return [[float(value) for value in row] for row in table.tolist()]

    def _keep(self, index: int, group: dict[str, Any], row: list[float]) -> None:
        """Remember a group's sums, and what follows from them for the drift of the next merges."""
        weight = self._merged[index][0]
        sums, tau = dict(zip(SUMS, row[:-1], strict=True)), row[-1]
        self._latest[index] = _Latest(self._step, weight, sums)
        group[MEASURED] = self._step
        group[TAU] = max(group[TAU], tau)  # a measured merge may have left parameters out
        kept = _share(sums["kept_tau"], tau)
        surviving = _share(sums["surviving_tau"], weight**2 * sums["kept_tau"])
        if math.isfinite(kept):
            group[KEPT] = kept
        if self.operator.consensus != "linear" and math.isfinite(surviving):
            group[SURVIVING] = min(surviving, 1.0)

    def _advance(self, index: int, group: dict[str, Any], weight: float, rate: float, share: float) -> None:
        start, last = (group[ALONG], group[SPREAD]), self._advanced.get(index)
        if last is not None and last.step == self._step and last.end == start:
            # Other parameters of the group have merged in this step: they count together.
            start, share = last.start, share + last.share
        mean, square = one_merge(self.operator, self.redraw, rate, group[KEPT])
        survived = group[SURVIVING] * min(share, 1.0)
        group[ALONG] = start[0] + weight * mean * math.sqrt(survived)
        group[SPREAD] = start[1] + weight**2 * survived * max(square - mean**2, 0.0)
        self._advanced[index] = _Advanced(self._step, share, start, (group[ALONG], group[SPREAD]))

    def _result(self, groups: Sequence[Mapping[str, Any]]) -> Diagnostics:
        each = tuple(
            _diagnostics(self._latest[i].step, self._latest[i].weighted(), drift([group]))
            if i in self._latest
            else None
            for i, group in enumerate(groups)
        )
        together = [latest.weighted() for latest in self._latest.values()]
        total = {name: sum(sums[name] for sums in together) for name in together[0]}
        return _diagnostics(self._step, total, drift(groups), each)


@dataclass(frozen=True)
class _Advanced:
    """A group's last merge: its step, how much of the group it was, and (along, spread) before and after."""

    step: int
    share: float
    start: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True)
class _Latest:
    """The last sums of a group, with the α they were measured at."""

    step: int
    weight: float
    sums: Mapping[str, float]

    def weighted(self) -> dict[str, float]:
        """The sums with both terms weighted, as several groups' can be added up."""
        one, other = 1 - self.weight, self.weight
        return {
            **self.sums,
            "weighted_update": one**2 * self.sums["kept_update"],
            "weighted_tau": other**2 * self.sums["kept_tau"],
            "product": one * other * self.sums["product"],
        }


def _diagnostics(
    step: int, sums: Mapping[str, float], far: float, groups: tuple[Diagnostics | None, ...] = ()
) -> Diagnostics:
    return Diagnostics(
        step,
        update=math.sqrt(sums["update"]),
        kept_update=math.sqrt(sums["kept_update"]),
        delta=math.sqrt(sums["weighted_tau"]),
        cosine=_share(sums["product"], math.sqrt(sums["weighted_update"]) * math.sqrt(sums["weighted_tau"])),
        conflicts=_share(sums["conflicts"], sums["both"]),
        survived=min(_share(sums["surviving_tau"], sums["weighted_tau"]), 1.0),
        arrived_update=_share(sums["arrived_update"], sums["wanted_update"]),
        arrived_delta=_share(sums["arrived_tau"], sums["wanted_tau"]),
        drift=far,
        groups=groups,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
