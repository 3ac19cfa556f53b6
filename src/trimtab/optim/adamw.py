"""OnDARE and OnTIES: AdamW whose every step is blended with the reference delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from trimtab.errors import UserError, unknown
from trimtab.ops import FIDELITIES, PRESETS, Consensus, Fidelity, Rescale, canonical_name
from trimtab.ops.presets import Method
from trimtab.optim.merging import DECAY, SINCE, Merging
from trimtab.optim.precision import (
    Rounding,
    read_master,
    resolve_rounding,
    rounding_key,
    update_dtype,
    write_master,
)
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
    ) -> None:
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
        )
        self._start(merging, measure_every)
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
        ours = ("merging", "measure_every", "_schedules", "_arrival", "_warned", "_measure_from")
        return super().__getstate__() | {key: self.__dict__[key] for key in ours} | {"_names_checked": False}

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
        self._restore_dtypes(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None and p.requires_grad:
                    self._step_parameter(canonical_name(name), p, group)
        self._after_step()
        return loss

    @torch.no_grad()
    def merge_now(self) -> int:
        """Merge what is pending in intervals of K > 1 steps. Returns the number of parameters merged."""
        merged = 0
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if self.state[p].get(SINCE, 0) > 0:
                    self._finish_interval(canonical_name(name), p, group)
                    merged += 1
        return merged

    def _finish_interval(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        state, merging = self.state[p], self.merging
        rounding = resolve_rounding(merging.rounding, p.dtype)
        master = read_master(p, state, rounding)
        if not merging.skips(name, group):
            base, update = merging.accumulated(state, master, None)
            self._merge(name, p, group, master, base, update, rounding)
        merging.open_interval(state, master)
        write_master(p, state, master, rounding, rounding_key(merging.seed, int(state["step"]), name))

    def _step_parameter(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        state, merging = self.state[p], self.merging
        _init_adam_state(state, p, group)
        rounding = resolve_rounding(merging.rounding, p.dtype)
        master = read_master(p, state, rounding)
        gap = group["merge_every"] > 1 and merging.merges(name)
        if gap and SINCE not in state:
            merging.open_interval(state, master)
        due = moves(group) and (not gap or state[SINCE] + 1 >= group["merge_every"])
        if due and not merging.skips(name, group):
            self._merging_step(name, p, group, master, rounding, gap=gap)
        else:
            self._plain_step(name, p, group, master)
            if gap:
                state[SINCE] += int(moves(group))
                state[DECAY] *= _decay(group)
        if gap and due:
            merging.open_interval(state, master)
        write_master(p, state, master, rounding, rounding_key(merging.seed, int(state["step"]), name))

    def _merging_step(
        self, name: str, p: Tensor, group: dict[str, Any], master: Tensor, rounding: Rounding, *, gap: bool
    ) -> None:
        state, before = self.state[p], self.merging.preset.decay == "before"
        update = self._adam_update(name, p, group)
        base = master
        if before and group["weight_decay"] != 0:
            master.mul_(_decay(group))
        if gap:
            if before:
                state[DECAY] *= _decay(group)
            base, update = self.merging.accumulated(state, master, update)
        self._merge(name, p, group, master, base, update, rounding)
        if not before and group["weight_decay"] != 0:
            master.mul_(_decay(group))

    def _merge(
        self,
        name: str,
        p: Tensor,
        group: dict[str, Any],
        master: Tensor,
        base: Tensor,
        update: Tensor,
        rounding: Rounding,
    ) -> None:
        stored = p.dtype if rounding == "nearest" else master.dtype
        step = int(self.state[p]["step"])
        self.merging.merge_into(master, base, update, name=name, group=group, step=step, stored=stored)

    def _plain_step(self, name: str, p: Tensor, group: dict[str, Any], master: Tensor) -> None:
        """AdamW's own step, by torch's own code: bit for bit torch.optim.AdamW where nothing is added."""
        before = self.merging.preset.decay == "before"
        if before and master.dtype == update_dtype(p):
            self._adam(master, name, p, group, group["weight_decay"])
            return
        # Decay after the step, or an fp32 parameter whose master is wider than Adam's arithmetic.
        update = self._adam_update(name, p, group)
        if before and group["weight_decay"] != 0:
            master.mul_(_decay(group))
        master.add_(update)
        if not before and group["weight_decay"] != 0:
            master.mul_(_decay(group))

    def _adam_update(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        update = torch.zeros_like(p, dtype=update_dtype(p))
        self._adam(update, name, p, group, weight_decay=0.0)
        return update

    def _adam(self, target: Tensor, name: str, p: Tensor, group: dict[str, Any], weight_decay: float) -> None:
        """Torch's AdamW on ``target``: the parameter's master, or zeros, which become Δ."""
        state, (beta1, beta2), eps = self.state[p], group["betas"], group["eps"]
        if self.merging.preset.eps_placement == "outside":
            # √v + ε, then the bias correction, is √v̂ + ε/√(1 − β₂ᵗ).
            eps = eps / (1.0 - beta2 ** (int(state["step"]) + 1)) ** 0.5
        adamw(
            [target],
            [dense_grad(name, p).to(target.dtype)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            foreach=False,
            fused=False,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=weight_decay,
            eps=eps,
            maximize=group["maximize"],
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


def _init_adam_state(state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    if "step" in state:
        return
    state["step"] = torch.tensor(0.0, dtype=torch.float32)
    moments = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
    for key in moments:
        state[key] = torch.zeros_like(p, dtype=update_dtype(p), memory_format=torch.preserve_format)


def _decay(group: dict[str, Any]) -> float:
    return 1.0 - float(group["lr"]) * float(group["weight_decay"])
