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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.ops import Operator
from trimtab.ops.kernels.sums import SUMS
from trimtab.optim.arrival import Arrival

HARM_BEGAN = 0.4
"""Drift, in units of τ, from which on the lab's models lost a point of capability or more by it, on average
over three SFT models, in training and by extrapolation alike (``scripts/measure_drift.py``)."""
DRIFT_WARNS = 0.2
"""Above this drift there is a warning: the largest drift measured below :data:`HARM_BEGAN` in both."""

ALONG, SPREAD = "merge_drift_along", "merge_drift_spread"
SURVIVING, KEPT = "merge_surviving", "merge_kept"
TAU, MEASURED = "merge_tau_squared", "merge_measured"
_FRESH = {ALONG: 0.0, SPREAD: 0.0, SURVIVING: 1.0, KEPT: -1.0, TAU: 0.0, MEASURED: 0}
"""What a param group starts with: κ and ‖τ‖² are not known yet, and nothing was measured at any step."""


class DriftWarning(UserWarning):
    """The merges have carried the model so far along the reference delta that its abilities may suffer."""


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
        survived: share of ‖α·F(τ)‖² that the vote let through; 1 (but for rounding) where there is none.
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


class DiagnosticsMeter:
    """Measures merges at their interval, and follows the drift at every one.

    A step goes ``begin``, then per group that merges ``merges`` (and ``add`` where the group ``wants`` it),
    then ``end``. What it must remember is in the param groups, under ``merge_…`` keys of plain numbers.

    Args:
        operator: F and ⊕.
        redraw: whether τ's mask is drawn anew at each merge.
        every: steps between measurements of a group; 0 measures nothing.
        reduce: adds a float64 tensor up over the processes that hold shards and returns it; None where one
            process holds everything. Called by all of them in the same steps.

    Examples:
        >>> from trimtab.ops.kernels.sums import measure
        >>> groups = [{"params": []}]
        >>> meter = DiagnosticsMeter(Operator("bernoulli"), redraw=True)
        >>> meter.begin(groups, step=1), meter.wants(0)
        (True, True)
        >>> one, tau = torch.ones(4), torch.tensor([2.0, 0.0, -2.0, 2.0])
        >>> meter.merges(0, weight=0.1, rate=0.5)
        >>> sums = measure(one, one, one, tau, [0.9 * one, 0.1 * tau], torch.float32)
        >>> meter.add([0], sums.unsqueeze(0), [16.0])
        >>> found = meter.end(groups)
        >>> round(found.conflicts, 3), round(found.cosine, 3), round(found.drift, 3)
        (0.333, 0.289, 0.071)
    """

    def __init__(
        self,
        operator: Operator,
        redraw: bool,
        every: int = 100,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.operator, self.redraw, self.every, self.reduce = operator, redraw, every, reduce
        self._latest: dict[int, _Latest] = {}
        self._step, self._due = 0, frozenset[int]()
        self._merged: dict[int, tuple[float, float, float]] = {}
        self._rows: list[tuple[Sequence[int], Tensor, Sequence[float]]] = []

    def begin(self, groups: Sequence[dict[str, Any]], step: int) -> bool:
        """Open step number ``step`` (from 1). Returns whether any group's merges are to be measured in it."""
        self._step, self._merged, self._rows = step, {}, []
        for group in groups:
            for key, value in _FRESH.items():
                group.setdefault(key, value)
        self._due = frozenset(i for i, group in enumerate(groups) if self._is_due(group))
        return bool(self._due)

    def _is_due(self, group: Mapping[str, Any]) -> bool:
        last = group[MEASURED]
        return self.every > 0 and (last == 0 or self._step >= last + self.every)

    def wants(self, group: int) -> bool:
        """Whether merges of this group are to be measured in this step."""
        return group in self._due

    def merges(self, group: int, weight: float, rate: float, share: float = 1.0) -> None:
        """Note that a group merges in this step.

        Args:
            group: its index.
            weight: α in this step.
            rate: p.
            share: how much of the group merges, as a share of its entries that have a delta.
        """
        self._merged[group] = (weight, rate, share)

    def add(self, groups: Sequence[int], sums: Tensor, tau_squared: Sequence[float]) -> None:
        """Take what was measured.

        Args:
            groups: the group of each row.
            sums: :func:`trimtab.ops.kernels.sums.measure` of each parameter's local part, (rows, SUMS).
                Where n processes hold the same part, it is to come divided by n, like ``tau_squared``.
            tau_squared: Σ τ² of each row's local part, before F
                (:func:`trimtab.ops.kernels.sums.squared_norm`).
        """
        self._rows.append((groups, sums, tau_squared))

    def end(self, groups: Sequence[dict[str, Any]]) -> Diagnostics | None:
        """Close the step: advance the drift. Returns what was measured, or None where nothing was."""
        measured = sorted(self._due & self._merged.keys())
        if measured:
            table = self._table(len(groups))
            for i in measured:
                self._keep(i, groups[i], table[i])
        for i, (weight, rate, share) in self._merged.items():
            self._advance(groups[i], weight, rate, share)
        self._due, self._merged, self._rows = frozenset(), {}, []
        return self._result(groups) if measured else None

    def _table(self, count: int) -> list[list[float]]:
        """Per group: the sums over its rows and over all processes, and Σ τ²."""
        device = self._rows[0][1].device if self._rows else None
        table = torch.zeros(count, len(SUMS) + 1, dtype=torch.float64, device=device)
        for groups, sums, tau_squared in self._rows:
            tau = torch.tensor(tau_squared, dtype=torch.float64, device=sums.device)
            rows = torch.cat([sums, tau.unsqueeze(1)], dim=1)
            table.index_add_(0, torch.tensor(groups, device=sums.device), rows)
        whole = table if self.reduce is None else self.reduce(table)
        return [[float(value) for value in row] for row in whole.tolist()]

    def _keep(self, index: int, group: dict[str, Any], row: list[float]) -> None:
        """Remember a group's sums, and what follows from them for the drift of the next merges."""
        weight = self._merged[index][0]
        sums, tau = dict(zip(SUMS, row[:-1], strict=True)), row[-1]
        self._latest[index] = _Latest(self._step, weight, sums)
        group[MEASURED] = self._step
        group[TAU] = max(group[TAU], tau)  # a measured merge may have left parameters out
        kept, surviving = (
            _share(sums["kept_tau"], tau),
            _share(sums["surviving_tau"], weight**2 * sums["kept_tau"]),
        )
        if math.isfinite(kept):
            group[KEPT] = kept
        if self.operator.consensus != "linear" and math.isfinite(surviving):
            group[SURVIVING] = min(surviving, 1.0)

    def _advance(self, group: dict[str, Any], weight: float, rate: float, share: float) -> None:
        mean, square = self._one_merge(rate, group[KEPT])
        survived = group[SURVIVING] * share
        group[ALONG] += weight * mean * math.sqrt(survived)
        group[SPREAD] += weight**2 * survived * max(square - mean**2, 0.0)

    def _one_merge(self, rate: float, kept: float) -> tuple[float, float]:
        """(q, r) of one merge without a vote."""
        rescales = self.operator.rescale != "none"
        bernoulli = self.operator.sparsify == "bernoulli" and rate < 1
        if bernoulli and self.redraw:
            return (1.0, 1 / rate) if rescales else (rate, rate)
        # Before anything was measured: what a random mask keeps; top keeps at most everything.
        if kept < 0:
            kept = (1 / rate if rescales else rate) if bernoulli else 1.0
        return math.sqrt(kept), kept

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
        survived=_share(sums["surviving_tau"], sums["weighted_tau"]),
        arrived_update=_share(sums["arrived_update"], sums["wanted_update"]),
        arrived_delta=_share(sums["arrived_tau"], sums["wanted_tau"]),
        drift=far,
        groups=groups,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


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
    return math.sqrt(_share(sum(t * s for t, s in squares), sum(t for t, _ in squares)))


def far_sentence(step: int, far: float) -> str:
    """What is said about a drift above :data:`DRIFT_WARNS`."""
    return (
        f"at step {step} the merges have added up to {far:.2g} τ; on trimtab's lab models abilities suffered "
        f"from about {HARM_BEGAN:g} τ on, so consider a smaller merge_weight"
    )


def log_values(optimizer: Optimizer, since: int = 0) -> dict[str, float]:
    """What an online merging optimizer has to say, by the names it is logged under; nothing for others.

    ``merge/weight`` and ``merge/reserve_rate`` are α and p of the first group, ``merge/drift`` the drift so
    far. The rest was measured at the last measuring step: ``merge/cosine``, ``merge/conflicts``,
    ``merge/survived``, ``merge/arrived_delta``, ``merge/arrived_update``, ``merge/update_norm``,
    ``merge/kept_update_norm`` and ``merge/delta_norm``; with several groups also the drift and the norms of
    each, as ``merge/group_0/update_norm`` and so on. What is not defined is left out.

    Args:
        optimizer: any optimizer, or a wrapper (accelerate's) around one.
        since: what was measured is given only if that was after this step.
    """
    inner = unwrapped(optimizer)
    first = inner.param_groups[0]
    if "merge_weight" not in first:
        return {}
    logs = {"weight": float(first["merge_weight"]), "reserve_rate": float(first["reserve_rate"])}
    far = drift(inner.param_groups)
    logs["drift"] = far
    found: Diagnostics | None = getattr(inner, "diagnostics", None)
    if found is not None and found.step > since:
        logs |= {"cosine": found.cosine, "conflicts": found.conflicts}
        logs |= {"survived": found.survived}
        logs |= {"arrived_delta": found.arrived_delta, "arrived_update": found.arrived_update}
        logs |= _norms(found)
        for i, group in enumerate(found.groups if len(found.groups) > 1 else ()):
            if group is not None:
                own = {"drift": group.drift, **_norms(group)}
                logs |= {f"group_{i}/{name}": value for name, value in own.items()}
    return {f"merge/{name}": value for name, value in logs.items() if not math.isnan(value)}


def _norms(found: Diagnostics) -> dict[str, float]:
    return {
        "update_norm": found.update,
        "kept_update_norm": found.kept_update,
        "delta_norm": found.delta,
    }


def log_line(optimizer: Optimizer) -> str:
    """One line about the last measured merge, for a training loop of one's own.

    Args:
        optimizer: an online merging optimizer, or a wrapper (accelerate's) around one.

    Returns:
        The line; it says so where nothing has been measured.

    Examples:
        >>> import torch, trimtab
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = trimtab.ReferenceDelta.between(reference=reference, base=base)
        >>> named = reference.named_parameters()
        >>> opt = trimtab.OnDARE(named, delta, lr=1e-3, reserve_rate=0.5, merge_weight=1e-4)
        >>> log_line(opt)
        'no merge measured yet'
    """
    inner = unwrapped(optimizer)
    found: Diagnostics | None = getattr(inner, "diagnostics", None)
    if found is None:
        return "no merge measured yet"
    far = drift(inner.param_groups)
    words = [
        f"step {found.step}: ‖Δ‖ {found.update:.3g}",
        f"‖F(Δ)‖ {found.kept_update:.3g}",
        f"‖α·F(τ)‖ {found.delta:.3g}",
        f"cosine {found.cosine:.3f}",
        f"conflicts {found.conflicts:.1%}",
        f"arrived: Δ {found.arrived_update:.1%}, τ {found.arrived_delta:.1%}",
        f"drift {far:.3g} τ"
        + (f" (above {DRIFT_WARNS:g}: abilities may suffer)" if far > DRIFT_WARNS else ""),
    ]
    return ", ".join(words)


def unwrapped(optimizer: Any) -> Any:
    """The online merging optimizer inside of wrappers such as accelerate's; the innermost without one."""
    while not hasattr(optimizer, "merging") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
