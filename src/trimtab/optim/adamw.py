"""OnDARE and OnTIES: AdamW whose every step is blended with the reference delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.delta.held import Storage, Where
from trimtab.errors import UserError, unknown
from trimtab.ops import FIDELITIES, PRESETS, Consensus, Fidelity, Rescale, canonical_name, moments
from trimtab.ops.kernels.job import Job, Settings
from trimtab.ops.kernels.torch_engine import update_dtype
from trimtab.ops.moments import StateDtype
from trimtab.ops.presets import Method
from trimtab.optim.jobs import Kernel, Slot, stored_as
from trimtab.optim.merging import ANCHOR, DECAY, SINCE, Merging, weights
from trimtab.optim.precision import (
    RESIDUAL,
    Rounding,
    anchor_like,
    residual_bits,
    residual_like,
    resolve_rounding,
)
from trimtab.optim.sharding import local_of, local_part
from trimtab.optim.shell import MergingShell, dense_grad, moves

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta

Parameters = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class OnlineMergingAdamW(MergingShell):
    """AdamW with a merge in every K-th step; :class:`OnDARE` and :class:`OnTIES` are its two presets.

    Per parameter, with lr, λ and the AdamW update Δ (bias-corrected, as torch.optim.AdamW forms it):

        θ ← (1 − lr·λ)·θ
        θ ← θ + ((1−α)·F(Δ)) ⊕ (α·F(τ))                      (arXiv 2405.17931, Eq. 3 to 7)

    step-K (K > 1): between merges AdamW runs as it is; at the K-th step, with the anchor (θ after the last
    merge), c = Π(1 − lr·λ) since then, and Δ_c = (θ − c·anchor) + Δ,

        θ ← c·anchor + ((1−α)·F(Δ_c)) ⊕ (α·F(τ)).

    Untouched: parameters without ``requires_grad`` and, in a step, those without a gradient. lr = 0 moves
    nothing, and such a step does not count towards K.
    """

    method: Method

    def __init__(
        self,
        params: Parameters,
        delta: ReferenceDelta,
        *,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        reserve_rate: float = 0.01,
        merge_weight: float = 1e-7,
        merge_every: int = 1,
        seed: int = 0,
        fidelity: Fidelity = "paper",
        rescale: Rescale | None = None,
        consensus: Consensus | None = None,
        redraw: bool | None = None,
        rounding: Rounding = "auto",
        merge_weight_follows_lr: bool = False,
        policy_differs: bool = False,
        without_delta: str | Sequence[str] = (),
        measure_every: int = 100,
        amsgrad: bool = False,
        maximize: bool = False,
        force_merge: bool = False,
        delta_storage: Storage = "auto",
        delta_device: Where = "parameter",
        state_dtype: StateDtype = "float32",
        kernel: Kernel = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        refused = {"capturable": capturable, "differentiable": differentiable}
        for name in [name for name, wanted in refused.items() if wanted]:
            raise UserError(f"{type(self).__name__} has no {name} step; leave {name} out")
        if fidelity not in FIDELITIES:
            raise unknown("fidelity", fidelity, FIDELITIES)
        if not lr >= 0:
            raise UserError(f"lr must be ≥ 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"betas must be in [0, 1), got {betas}")
        if not weight_decay >= 0:
            raise UserError(f"weight_decay must be ≥ 0, got {weight_decay}")
        row = PRESETS[self.method, fidelity]
        operator = replace(
            row.operator,
            rescale=row.operator.rescale if rescale is None else rescale,
            consensus=row.operator.consensus if consensus is None else consensus,
        )
        preset = replace(
            row,
            operator=operator,
            redraw=row.redraw if redraw is None else redraw,
            eps=row.eps if eps is None else eps,
        )
        merging = Merging(
            delta,
            preset,
            seed=seed,
            rounding=rounding,
            policy_differs=policy_differs,
            without_delta=without_delta,
            force_merge=force_merge,
            delta_storage=delta_storage,
            delta_device=delta_device,
        )
        moments.check_state_dtype(state_dtype)
        self.state_dtype = state_dtype
        self._start(merging, measure_every, kernel)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": preset.eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "reserve_rate": reserve_rate,
            "merge_weight": merge_weight,
            "merge_every": merge_every,
            "merge_weight_follows_lr": merge_weight_follows_lr,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be (name, parameter) pairs."""
        super().add_param_group(param_group)
        self._prepare_groups({})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | self._own_state() | {"state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_jobs()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the groups carry what the merge is (τ's content hash included), τ itself is not
        saved.
        """
        self._write_identities()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but exact: fp32 state of bf16 parameters stays fp32.

        Raises:
            IncompatibleState: the state belongs to another delta, method, K or seed.
        """
        self._check_identities(state_dict)
        super().load_state_dict(state_dict)
        self._after_load(state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        slots = [
            self._prepared(name, p, frame)
            for index, group in enumerate(self.param_groups)
            for frame in [_Frame(self, index, group)]
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if p.grad is not None and p.requires_grad
        ]
        if slots:
            torch._foreach_add_([slot.count for slot in slots], 1)
        self._run(slots, self._steps() + 1)
        self._after_step()
        return loss

    @torch.no_grad()
    def merge_now(self) -> int:
        """Merge what is pending in intervals of K > 1 steps. Returns the number of parameters merged."""
        slots = []
        for index, group in enumerate(self.param_groups):
            frame = _Frame(self, index, group)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if self.state[p].get(SINCE, 0) > 0:
                    slots.append(self._closing(self._slot(name, p, frame), self.state[p], frame))
        self._run(slots, self._steps())
        return len(slots)

    def _prepared(self, name: str, p: Tensor, frame: _Frame) -> Slot:
        """The parameter's job with this step's fields set, and its interval one step further."""
        slot, group = self._slot(name, p, frame), frame.group
        job, step = slot.job, slot.steps + 1
        job.grad, job.anchor = local_of(dense_grad(slot.name, p)), None
        slot.steps = step
        gap = group["merge_every"] > 1 and slot.merges
        if not gap:
            job.settings = frame.settings(step, frame.moves and slot.merges)
            if job.settings.merge:
                self._give_delta(slot, group)
            return slot
        state = self.state[p]
        if SINCE not in state:
            self._open_interval(state, p, job)
        due = frame.moves and state[SINCE] + 1 >= group["merge_every"]
        if due:
            return self._due(slot, state, frame, step)
        job.settings = frame.settings(step, False)
        state[SINCE] += int(frame.moves)
        state[DECAY] *= frame.decay
        return slot

    def _due(self, slot: Slot, state: dict[str, Any], frame: _Frame, step: int) -> Slot:
        """The last step of an interval: Δ_c against the anchor, and the next interval begins."""
        job = slot.job
        job.settings = frame.settings(step, True, reopen=True)
        job.anchor = local_of(state[ANCHOR])
        job.anchor_decay = state[DECAY] * (1.0 if job.settings.decay_after else frame.decay)
        if job.settings.merge:
            self._give_delta(slot, frame.group)
        state[DECAY], state[SINCE] = 1.0, 0
        return slot

    def _closing(self, slot: Slot, state: dict[str, Any], frame: _Frame) -> Slot:
        """The merge of an interval that is pending, without a step."""
        job = slot.job
        job.grad, job.anchor, job.anchor_decay = None, local_of(state[ANCHOR]), state[DECAY]
        job.settings = replace(frame.settings(slot.steps, True, reopen=True), decay=1.0)
        if job.settings.merge:
            self._give_delta(slot, frame.group)
        state[DECAY], state[SINCE] = 1.0, 0
        return slot

    def _open_interval(self, state: dict[str, Any], p: Tensor, job: Job) -> None:
        """Begin the first interval of K steps: keep the anchor, no decay yet, no step yet."""
        state[ANCHOR] = anchor_like(p, state.get(RESIDUAL), job.stored)
        state[DECAY], state[SINCE] = 1.0, 0

    def _slot(self, name: str, p: Tensor, frame: _Frame) -> Slot:
        """The parameter's slot: the one that was kept, if it still tells the truth."""
        slot, state = self._slots.get(p), self.state[p]
        if (
            slot is None
            or slot.pointer != local_of(p).data_ptr()
            or slot.group != frame.index
            or not _is_made_from(slot.made_from, state)
        ):
            slot = self._slots[p] = self._new_slot(canonical_name(name), p, state, frame)
        return slot

    def _new_slot(self, name: str, p: Tensor, state: dict[str, Any], frame: _Frame) -> Slot:
        rounding = resolve_rounding(self.merging.rounding, p.dtype)
        self._init_state(state, p, frame.group, rounding)
        local, layout, shards = local_part(p)
        greatest = state.get("max_exp_avg_sq")
        job = Job(
            name=name,
            seed=self.merging.seed,
            layout=layout,
            param=local,
            stored=stored_as(rounding),
            residual=residual_bits(p, state[RESIDUAL]) if rounding == "residual" else None,
            exp_avg=local_of(state["exp_avg"]),
            exp_avg_sq=local_of(state["exp_avg_sq"]),
            max_exp_avg_sq=None if greatest is None else local_of(greatest),
            group=shards,
        )
        return Slot(
            name,
            job,
            local.data_ptr(),
            count=state["step"],
            made_from=tuple(map(state.get, _JOB_STATE)),
            steps=int(state["step"]),
            merges=self.merging.merges(name),
            group=frame.index,
        )

    def _init_state(
        self, state: dict[str, Any], p: Tensor, group: dict[str, Any], rounding: Rounding
    ) -> None:
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            state["exp_avg"] = moments.new_moment(p, self.state_dtype, signed=True)
            state["exp_avg_sq"] = moments.new_moment(p, self.state_dtype, signed=False)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p, dtype=update_dtype(p.dtype))
        if rounding == "residual" and RESIDUAL not in state:
            state[RESIDUAL] = residual_like(p)


_JOB_STATE = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", RESIDUAL)
"""State that jobs hold; where a state holds another tensor under one of these keys, its job is made anew."""


def _is_made_from(made_from: tuple[Any, ...], state: dict[str, Any]) -> bool:
    """Asked for each parameter in each step: without a loop it takes a third of the time."""
    count, first, second, greatest, residual = made_from
    get = state.get
    return (
        get("step") is count
        and get("exp_avg") is first
        and get("exp_avg_sq") is second
        and get("max_exp_avg_sq") is greatest
        and get(RESIDUAL) is residual
    )


class _Frame:
    """What one group's parameters share in one step."""

    def __init__(self, optimizer: OnlineMergingAdamW, index: int, group: dict[str, Any]) -> None:
        self.merging, self.index, self.group = optimizer.merging, index, group
        self.after = self.merging.preset.decay == "after"
        self.outside = self.merging.preset.eps_placement == "outside"
        self.lr = float(group["lr"])
        self.decay = 1.0 - self.lr * float(group["weight_decay"])
        self.moves = moves(group)
        self._weights = weights(group)
        self._skips = self.merging.changes_nothing(self._weights, group["reserve_rate"])
        self._made: dict[tuple[int, bool, bool], Settings] = {}

    def settings(self, step: int, merge: bool, *, reopen: bool = False) -> Settings:
        """The settings of a step; made once for all parameters that have taken as many."""
        key = (step, merge, reopen)
        if key not in self._made:
            self._made[key] = self._make(step, merge and not self._skips, reopen)
        return self._made[key]

    def _make(self, step: int, merge: bool, reopen: bool) -> Settings:
        group, (beta1, beta2) = self.group, self.group["betas"]
        eps = group["eps"]
        if self.outside:  # √v + ε, then the bias correction, is √v̂ + ε/√(1 − β₂ᵗ)
            eps = eps / (1.0 - float(beta2) ** step) ** 0.5
        return Settings(
            merge=merge,
            weights=self._weights if merge else (1.0, 0.0),
            rate=group["reserve_rate"],
            decay=self.decay,
            decay_after=self.after,
            step=step,
            lr=self.lr,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=eps,
            maximize=group["maximize"],
            reopen=reopen,
        )


class OnDARE(OnlineMergingAdamW):
    """AdamW whose update and reference delta are both randomly thinned and added (arXiv 2405.17931, Eq. 3 and
    4).

    F keeps each entry with probability p, ⊕ is the sum: θ ← θ + (1−α)·F(Δ) + α·F(τ).

    Args:
        params: ``model.named_parameters()``, or groups of (name, parameter) pairs with their own ``lr``,
            ``weight_decay``, ``reserve_rate``, ``merge_weight``, ``merge_every``.
        delta: the reference delta τ = θ_sft − θ_base.
        lr: learning rate ≥ 0.
        betas: Adam's decay rates, in [0, 1).
        eps: Adam's ε; default 1e-8 (1e-6 for ``released``).
        weight_decay: λ ≥ 0, decoupled.
        reserve_rate: p in (0, 1].
        merge_weight: α in [0, 1]. Not scaled by lr.
        merge_every: K ≥ 1 steps between merges.
        seed: seed of all masks, in [0, 2^64).
        fidelity: ``paper``, ``released`` (the authors' code, field by field) or ``mergekit``; see
            ``ops.PRESETS``.
        rescale: overrides the preset's rescaling.
        consensus: overrides the preset's consensus.
        redraw: overrides whether τ's mask is redrawn at each merge.
        rounding: ``nearest``, ``residual`` (16 bits beside each parameter), ``stochastic``; ``auto`` is
            ``residual`` below fp32.
        merge_weight_follows_lr: scale α by lr_t / lr_0.
        policy_differs: allow training to start from something other than the delta's reference.
        without_delta: pattern, or patterns, of the parameters that take the plain step because they have no
            delta.
        measure_every: steps between measurements of the arriving share (``opt.arrival``); 0 turns it off.
        amsgrad: as in torch.optim.AdamW.
        maximize: as in torch.optim.AdamW.
        delta_storage: how τ is held: ``float32``, ``bfloat16``, ``int8`` (a scale per 128 entries), or
            ``sparse`` (where F(τ) is fixed: indices and values, exact); ``auto`` is sparse where F(τ) is
            fixed and keeps at most a quarter, else as the parameter needs.
        delta_device: ``parameter``, or ``host``: pinned memory, copied one parameter ahead.
        state_dtype: Adam's moments in ``float32``, ``bfloat16`` (rounded stochastically) or ``int8``
            (torchao's).
        kernel: ``auto`` takes the fastest engine that can run a parameter; ``native``, ``triton`` and
            ``torch`` name one. All give the same numbers.
        foreach: accepted for torch.optim.AdamW's sake; ``kernel`` chooses the implementation.
        fused: likewise.
        capturable: False only: the step count that keys the masks is the host's.
        differentiable: False only.
        force_merge: run the arithmetic even where it is the identity; for tests.

    Raises:
        UserError: an argument out of range, parameters without names or without delta.

    Examples:
        >>> import torch, trimtab
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = trimtab.ReferenceDelta.between(reference=reference, base=base)
        >>> opt = OnDARE(reference.named_parameters(), delta, lr=1e-3, reserve_rate=0.5, merge_weight=1e-4)
        >>> reference(torch.ones(4)).sum().backward()
        >>> _ = opt.step()
        >>> opt.arrival.step
        1
    """

    method = "ondare"


class OnTIES(OnlineMergingAdamW):
    """AdamW whose update and reference delta are trimmed to their largest entries and vote (arXiv 2405.17931,
    Eq. 5 to 7).

    F keeps the ⌈p·n⌉ entries of largest magnitude of each tensor; ⊕ elects, entry by entry, the sign of the
    weighted sum and adds only the terms that have it. Arguments as for :class:`OnDARE`.

    Examples:
        >>> import torch, trimtab
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = trimtab.ReferenceDelta.between(reference=reference, base=base)
        >>> opt = OnTIES(reference.named_parameters(), delta, lr=1e-3, reserve_rate=0.5, merge_weight=1e-4)
    """

    method = "onties"
