"""What OnDARE, OnTIES and OnlineMerging have in common as torch optimizers: groups, schedules, saved
state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import IncompatibleState, UserError, unknown
from trimtab.ops import canonical_name
from trimtab.ops.kernels.sums import SUMS
from trimtab.optim.arrival import Arrival, warn_if_lost
from trimtab.optim.diagnostics import Diagnostics
from trimtab.optim.jobs import Kernel, Runner, Slot
from trimtab.optim.measuring import DiagnosticsMeter
from trimtab.optim.merging import SINCE, Merging, named
from trimtab.optim.precision import restore_dtypes
from trimtab.optim.settling import check_gradients, measure_together
from trimtab.optim.sharding import ShardGroup, aligned_grad, local_part, refuse_flattened

SCHEDULED = ("merge_weight", "reserve_rate")
_OWN = (
    "merging",
    "measure_every",
    "_runner",
    "_meter",
    "_schedules",
    "_diagnostics",
    "_warned",
    "_policy_checked",
)
_IDENTITY, _CHECKED, _STEP = "merge_identity", "merge_policy_checked", "merge_step"


class MergingShell(Optimizer):
    """The part of an online merging optimizer that is not its step.

    Subclasses call :meth:`_start` when they are built, :meth:`_prepare_groups` when groups are added,
    :meth:`_before_step` and :meth:`_after_step` around their step.
    """

    merging: Merging
    measure_every: int
    _schedules: list[tuple[str, Callable[[int], float], int | None]]
    _diagnostics: Diagnostics | None
    _warned: bool
    _names_checked: bool
    _agreed = True
    """Whether the processes that share parameters have found that they step the same ones."""

    def _start(self, merging: Merging, measure_every: int, kernel: Kernel) -> None:
        self.merging, self.measure_every = merging, measure_every
        self._runner = Runner(kernel, merging.preset.operator)
        self._meter = DiagnosticsMeter(merging.preset.operator, not merging.masked_once, measure_every)
        self._schedules, self._diagnostics, self._warned = [], None, False
        self._names_checked = False
        self._policy_checked = set[str]()  # beside the groups' mark: parameters may move to a new group
        self._forget_jobs()

    def _forget_jobs(self) -> None:
        """Make all jobs anew: state or parameters may be other tensors now."""
        self._slots: dict[Tensor, Slot] = {}
        self._entries: dict[int, tuple[int, int]] = {}

    def _own_state(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in _OWN} | {"_names_checked": False}

    @property
    def diagnostics(self) -> Diagnostics | None:
        """What the last measured merge looked like; None before the first."""
        return self._diagnostics

    @property
    def arrival(self) -> Arrival | None:
        """Shares of α·F(τ) and of Δ that arrived in the parameters, at the last step that measured them."""
        return None if self._diagnostics is None else self._diagnostics.arrival

    def merge_now(self) -> int:
        """Merge what is pending in intervals of K > 1 steps. Returns the number of parameters merged."""
        raise NotImplementedError

    def pending(self) -> int:
        """Number of parameters that have moved since their last merge (always 0 for K = 1)."""
        return sum(
            1 for group in self.param_groups for p in group["params"] if self.state[p].get(SINCE, 0) > 0
        )

    # -- groups

    def _prepare_groups(self, defaults: dict[str, Any]) -> None:
        for group in self.param_groups:
            if "param_names" not in group:
                raise UserError(
                    "online merging finds τ by name: pass model.named_parameters(), or groups of "
                    "(name, parameter) pairs, instead of model.parameters()"
                )
            for key, value in defaults.items():
                group.setdefault(key, value)
            _check_group(group)
            lr = group.get("lr")
            group.setdefault("merge_base_lr", float(lr) if lr is not None else 1.0)
            group.setdefault(_IDENTITY, None)
            group.setdefault(_CHECKED, False)
            group.setdefault(_STEP, 0)
        self._names_checked = False

    def _before_step(self) -> None:
        self._agreed = False
        if not self._names_checked:
            refuse_flattened(self.param_groups)
            parameters = named(self.param_groups)
            _refuse_unsupported(parameters)
            self.merging.check_names(parameters)
            measure_together(self.merging.delta, parameters)
            self._write_identities()
            self._names_checked = True
        for group in self.param_groups:
            if not group[_CHECKED] and moves(group):
                fresh = [(name, p) for name, p in named([group]) if name not in self._policy_checked]
                self.merging.check_policy(fresh)
                self._policy_checked.update(name for name, _ in fresh)
                group[_CHECKED] = True
        self._apply_schedules()

    def _after_step(self) -> None:
        for group in self.param_groups:
            group[_STEP] += 1

    def _steps(self) -> int:
        return max((group[_STEP] for group in self.param_groups), default=0)

    def _give_delta(self, slot: Slot, group: dict[str, Any]) -> None:
        """Give a job that merges its τ, where the one it has is not the right one."""
        if not self._agreed:
            if self.merging.needs_whole_tensors:
                check_gradients(named(self.param_groups))
            self._agreed = True
        if slot.rate != group["reserve_rate"] and not self.merging.streams(slot.job):
            self.merging.attach(slot.job, group)
            slot.rate = group["reserve_rate"]

    def _run(self, slots: Sequence[Slot], step: int) -> None:
        """Take the step of every job, follow the drift, and measure the merges where that is due.

        Args:
            slots: what to step.
            step: the optimizer's step that this belongs to, from 1.
        """
        merging = [slot for slot in slots if slot.job.settings.merge]
        due, sums = self._meter.begin(self.param_groups, step), None
        # A group may stay due for ever: one that never merges. Others must not be measured in its stead.
        if due and any(self._meter.wants(slot.group) for slot in merging):
            sums = torch.zeros(len(slots), len(SUMS), dtype=torch.float64, device="cpu")
        if self.merging.delta_device == "host" and any(self.merging.streams(slot.job) for slot in merging):
            self._run_one_by_one(slots, sums)
        else:
            self._runner.run(slots, sums=sums)
        if merging:
            self._note_merges(merging)
        if sums is not None:
            self._note_sums(slots, sums)
        found = self._meter.end(self.param_groups)
        if found is not None:
            self._diagnostics = found
            self._warned = self._warned or warn_if_lost(found.arrival)

    def _run_one_by_one(self, slots: Sequence[Slot], sums: Tensor | None) -> None:
        """Step in order: a τ that comes from the host stays beside its parameter for a while only."""
        self.merging.prefetch([slot.name for slot in slots if slot.job.settings.merge])
        for row, slot in enumerate(slots):
            if slot.job.settings.merge:
                self.merging.attach(slot.job, self.param_groups[slot.group])
            self._runner.run([slot], sums=None if sums is None else sums[row : row + 1])

    def _note_merges(self, merging: Sequence[Slot]) -> None:
        """Tell the meter which groups merge, and how much of each: all of it, in almost every step."""
        by_group: dict[int, list[Slot]] = {}
        for slot in merging:
            by_group.setdefault(slot.group, []).append(slot)
        for index, slots in by_group.items():
            count, entries = self._with_delta(index)
            partly = len(slots) < count
            share = sum(slot.job.layout.total for slot in slots) / max(entries, 1) if partly else 1.0
            settings = slots[0].job.settings
            self._meter.merges(index, settings.weights[1], settings.rate, share)

    def _note_sums(self, slots: Sequence[Slot], sums: Tensor) -> None:
        """Hand on what was measured, each row added up over the processes that share the parameter."""
        shared: dict[ShardGroup, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot.job.group is not None:
                shared.setdefault(slot.job.group, []).append(row)
        for group, rows in shared.items():
            sums[rows] = group(sums[rows])
        rows = [i for i, one in enumerate(slots) if one.job.settings.merge and self._meter.wants(one.group)]
        squares = [self.merging.tau_squared(slots[i].name) for i in rows]
        self._meter.add([slots[i].group for i in rows], sums[rows], squares)

    def _with_delta(self, index: int) -> tuple[int, int]:
        """How many parameters with a delta a group has, and how many entries they have."""
        if index not in self._entries:
            own = [
                p.numel()
                for name, p in named([self.param_groups[index]])
                if p.requires_grad and self.merging.merges(name)
            ]
            self._entries[index] = len(own), sum(own)
        return self._entries[index]

    def _apply_schedules(self) -> None:
        for key, fn, only in self._schedules:
            for i, group in enumerate(self.param_groups):
                if only is None or i == only:
                    group[key] = float(fn(group[_STEP]))
                    _check_group(group)

    # -- saved state

    def _write_identities(self) -> None:
        for group in self.param_groups:
            group[_IDENTITY] = self.merging.identity(group["merge_every"])

    def _check_identities(self, state_dict: dict[str, Any]) -> None:
        for i, (ours, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            identity = self.merging.identity(ours["merge_every"])
            found = saved.get(_IDENTITY)
            if found is None:
                raise IncompatibleState(
                    f"the saved optimizer state (group {i}) was not written by an online merging optimizer; "
                    "resume with the optimizer that wrote it, or start a new run"
                )
            if found != identity:
                pairs = zip(found.split(), identity.split(), strict=False)
                differing = [f"{a} (here {b.split('=')[1]})" for a, b in pairs if a != b]
                raise IncompatibleState(
                    f"the saved optimizer state (group {i}) belongs to another merge: it has "
                    f"{', '.join(differing)}; resume with the same delta, method and seed, or start a new run"
                )
            _check_saved_names(i, ours["param_names"], saved.get("param_names", ours["param_names"]))

    def _after_load(self, state_dict: dict[str, Any]) -> None:
        restore_dtypes(self, state_dict)
        self._forget_jobs()
        checked = [group for group in self.param_groups if group.get(_CHECKED)]
        self._policy_checked.update(name for name, _ in named(checked))


def schedule(
    optimizer: Optimizer, key: str, fn: Callable[[int], float], *, group: int | None = None
) -> Optimizer:
    """Let ``merge_weight`` or ``reserve_rate`` follow a function of the step; torch's schedulers reach ``lr``
    only.

    Before each step, ``param_groups[i][key] = fn(t)`` with t = 0, 1, … the number of steps taken. The value
    and t are saved with the optimizer and t continues after a resume; ``fn`` is code and is registered anew.

    Args:
        optimizer: an online merging optimizer, or a wrapper (accelerate's) around one.
        key: ``merge_weight`` or ``reserve_rate``.
        fn: step → value, in the key's range.
        group: index of the only param group it acts on; default all.

    Returns:
        The optimizer.

    Raises:
        UserError: unknown key, no online merging optimizer, or a value out of range.

    Examples:
        >>> import trimtab
        >>> # α warms up over 100 steps:
        >>> # trimtab.schedule(opt, "merge_weight", lambda t: 1e-7 * min(1, t / 100))
    """
    inner = optimizer
    while not isinstance(inner, MergingShell) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, MergingShell):
        raise UserError(f"schedule needs OnDARE, OnTIES or OnlineMerging, got {type(optimizer).__name__}")
    if key not in SCHEDULED:
        raise unknown("scheduled key", key, SCHEDULED)
    if group is not None and not 0 <= group < len(inner.param_groups):
        raise UserError(f"group {group} does not exist: the optimizer has {len(inner.param_groups)} groups")
    inner._schedules.append((key, fn, group))
    inner._apply_schedules()
    return optimizer


def _check_group(group: dict[str, Any]) -> None:
    if not 0 < group["reserve_rate"] <= 1:
        raise UserError(f"reserve_rate must be in (0, 1], got {group['reserve_rate']}")
    if not 0 <= group["merge_weight"] <= 1:
        raise UserError(f"merge_weight must be in [0, 1], got {group['merge_weight']}")
    if not isinstance(group["merge_every"], int) or group["merge_every"] < 1:
        raise UserError(f"merge_every must be an integer ≥ 1, got {group['merge_every']!r}")


def _check_saved_names(group: int, ours: Sequence[str], saved: Sequence[str]) -> None:
    """Refuse a state with its parameters in another order: torch goes by place and takes the saved names."""
    for position, (here, there) in enumerate(zip(ours, saved, strict=False)):
        if canonical_name(here) != canonical_name(there):
            raise IncompatibleState(
                f"the saved optimizer state (group {group}) has the parameter {there!r} at place {position}, "
                f"where this optimizer has {here!r}; build it from the same parameters in the same order"
            )


def _refuse_unsupported(parameters: Iterable[tuple[str, Tensor]]) -> None:
    for name, p in parameters:
        if not p.dtype.is_floating_point or p.dtype.itemsize < 2:
            raise UserError(
                f"{name} has dtype {p.dtype}; online merging trains fp64, fp32, bf16 and fp16 parameters"
            )
        if p.requires_grad:
            try:
                local_part(p)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None


def moves(group: dict[str, Any]) -> bool:
    """Whether a step with this group's learning rate may move weights: lr = 0 moves nothing.

    Checkpoint loaders take a phantom step at lr = 0 to make an optimizer create its state.
    """
    lr = group.get("lr")  # None or absent where the optimizer finds its own, as transformers' Adafactor does
    return lr is None or float(lr) != 0


def dense_grad(name: str, p: Tensor) -> Tensor:
    """The parameter's gradient, sharded as the parameter is; a sparse one is refused."""
    grad = aligned_grad(p)
    if grad.layout != torch.strided:
        raise UserError(
            f"{name} has a sparse gradient; online merging needs dense ones (Embedding(sparse=False))"
        )
    return grad
