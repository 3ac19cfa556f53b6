"""OnlineMerging: the merge around any torch optimizer, through its step hooks."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.delta.held import Storage, Where
from trimtab.errors import UserError
from trimtab.ops import Consensus, Operator, Preset, Rescale, Sparsifier, canonical_name
from trimtab.ops.kernels.copying import copy_all
from trimtab.ops.kernels.job import Job, Settings
from trimtab.ops.kernels.torch_engine import update_dtype, write_master
from trimtab.ops.masks import ROUNDING, MaskKey, Place
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
from trimtab.optim.regulariser import Regulariser, attached
from trimtab.optim.sharding import local_of, local_part, set_data
from trimtab.optim.shell import MergingShell, moves

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta

COUNT = "merge_count"
_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)


class OnlineMerging(MergingShell):
    """Blend every K-th step of any torch optimizer with the reference delta (arXiv 2405.17931).

    Δ is what the wrapped optimizer added, θ_after − (1 − lr·λ)·θ_before, where λ is its decoupled weight
    decay (0 if it has none or a coupled one, which stays in Δ as L2); then, as in :class:`~trimtab.OnDARE`,

        θ ← (1 − lr·λ)·θ_before + ((1−α)·F(Δ)) ⊕ (α·F(τ)).

    The merge hangs on the wrapped optimizer's step hooks, so calling either object's ``step`` merges. (Call
    this one's where a step may raise: it gives parameters below fp32 back even then.) Groups,
    state and ``state_dict`` are the wrapped optimizer's own, with a few entries more. For parameters below
    fp32 the wrapped optimizer is shown fp32 masters and gradients during its step; since a closure would then
    run the model on them, it is evaluated before (LBFGS asks for it again and again, and does so on them).

    Args:
        optimizer: any torch optimizer built from named parameters.
        delta: the reference delta τ = θ_sft − θ_base.
        sparsify: F: ``bernoulli`` (as OnDARE), ``top`` (as OnTIES) or ``none``.
        consensus: ⊕: ``linear`` (as OnDARE), ``sign`` (as OnTIES) or ``sign_unweighted``.
        rescale: ``none``, ``expected`` or ``l1``.
        reserve_rate: p in (0, 1]; also per param group.
        merge_weight: α in [0, 1]; also per param group.
        merge_every: K ≥ 1 steps between merges; also per param group.
        redraw: draw τ's mask anew at each merge, or once.
        seed: seed of all masks.
        rounding: see :class:`~trimtab.OnDARE`.
        merge_weight_follows_lr: scale α by lr_t / lr_0.
        policy_differs: allow a start from something other than the delta's reference.
        without_delta: pattern, or patterns, of the parameters that take the plain step.
        decoupled_decay: whether the wrapped optimizer's weight decay multiplies θ by 1 − lr·λ before its
            step; None reads it off the
            optimizer (AdamW, Adafactor, Muon, and a group's ``decoupled_weight_decay``).
        measure_every: steps between measurements of the arriving share; 0 turns it off.
        delta_storage: see :class:`~trimtab.OnDARE`.
        delta_device: see :class:`~trimtab.OnDARE`.
        kernel: see :class:`~trimtab.OnDARE`.
        force_merge: run the arithmetic even where it is the identity; for tests.

    Raises:
        UserError: an argument out of range, parameters without names or without delta.

    Examples:
        >>> import torch, trimtab
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = trimtab.ReferenceDelta.between(reference=reference, base=base)
        >>> sgd = torch.optim.SGD(reference.named_parameters(), lr=0.1, momentum=0.9)
        >>> opt = OnlineMerging(sgd, delta, sparsify="top", consensus="sign", merge_weight=0.01)
        >>> reference(torch.ones(4)).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        delta: ReferenceDelta,
        *,
        sparsify: Sparsifier = "bernoulli",
        consensus: Consensus = "linear",
        rescale: Rescale = "none",
        reserve_rate: float = 0.01,
        merge_weight: float = 1e-7,
        merge_every: int = 1,
        redraw: bool = True,
        seed: int = 0,
        rounding: Rounding = "auto",
        merge_weight_follows_lr: bool = False,
        policy_differs: bool = False,
        without_delta: str | Sequence[str] = (),
        decoupled_decay: bool | None = None,
        measure_every: int = 100,
        force_merge: bool = False,
        delta_storage: Storage = "auto",
        delta_device: Where = "parameter",
        kernel: Kernel = "auto",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"OnlineMerging wraps a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, MergingShell):
            raise UserError(f"{type(optimizer).__name__} merges already; wrap a plain optimizer")
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), OnlineMerging) for hook in hooks):
            raise UserError(
                f"this {type(optimizer).__name__} is wrapped in OnlineMerging already, and each step would "
                "merge twice; build a new optimizer to wrap"
            )
        if attached(optimizer, Regulariser):
            raise UserError(
                f"this {type(optimizer).__name__} has regularisers, which would act before the merge; "
                "wrap it first, and attach them to the OnlineMerging"
            )
        self.optimizer = optimizer
        merging = Merging(
            delta,
            Preset(Operator(sparsify, rescale, consensus), redraw=redraw, source="OnlineMerging"),
            seed=seed,
            rounding=rounding,
            policy_differs=policy_differs,
            without_delta=without_delta,
            force_merge=force_merge,
            delta_storage=delta_storage,
            delta_device=delta_device,
        )
        self._start(merging, measure_every, kernel)
        self.decoupled_decay = decoupled_decay
        self._group_defaults = {
            "reserve_rate": reserve_rate,
            "merge_weight": merge_weight,
            "merge_every": merge_every,
            "merge_weight_follows_lr": merge_weight_follows_lr,
        }
        self._prepare_groups(self._group_defaults)
        self._attach()

    # -- being an Optimizer around another

    def _attach(self) -> None:
        # Kept from step to step: memory that is mapped anew at every step costs more than the copy into it.
        self._before: dict[Tensor, Tensor] = {}
        self._forget_jobs()
        self._swapped: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._names_checked = False
        self._patch_step_function()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._pre_step),
            self.optimizer.register_step_post_hook(self._post_step),
            self.optimizer.register_load_state_dict_pre_hook(self._pre_load),
            self.optimizer.register_load_state_dict_post_hook(self._post_load),
        ]

    def __getstate__(self) -> dict[str, Any]:
        dropped = (
            "_before",
            "_slots",
            "_swapped",
            "step",  # a learning rate scheduler's patch, which is bound to this object
            "_handles",
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
        )
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def __repr__(self) -> str:
        operator = self.merging.preset.operator
        return f"OnlineMerging({operator.sparsify}, {operator.consensus}) around {self.optimizer!r}"

    def __getattr__(self, name: str) -> Any:
        """Hooks on state dicts are the wrapped optimizer's: it is the one that saves and loads."""
        if name.startswith("_optimizer_") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Read through at every use: load_state_dict replaces the wrapped optimizer's list and state.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its parameters must be (name, parameter) pairs."""
        self.optimizer.add_param_group(param_group)
        self._prepare_groups(self._group_defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; the groups carry what the merge is, τ itself is not saved."""
        self._write_identities()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the wrapped optimizer, exactly (fp32 state of bf16 parameters stays fp32).

        Raises:
            IncompatibleState: the state belongs to another delta, method, K or seed.
        """
        self.optimizer.load_state_dict(state_dict)

    def _pre_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._check_identities(state_dict)
        self._loading = state_dict

    def _post_load(self, _: Optimizer) -> None:
        self._after_load(self._loading)
        del self._loading

    # -- the step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of the wrapped optimizer and merge."""
        required = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        try:
            if closure is None:
                return self.optimizer.step()
            # LBFGS calls it repeatedly
            if required is not None and required.default is inspect.Parameter.empty:
                return self.optimizer.step(closure)
            with torch.enable_grad():
                loss = closure()
            self.optimizer.step()
            return loss
        finally:
            self._swap_back()

    @torch.no_grad()
    def merge_now(self) -> int:
        """Merge what is pending in intervals of K > 1 steps. Returns the number of parameters merged."""
        merged = 0
        for frame in self._frames():
            for name, p in frame.parameters():
                state = self.state[p]
                if state.get(SINCE, 0) > 0:
                    master = self._master(p)
                    self._run([self._closing(name, p, state, frame, master, p)], self._steps())
                    if master is not p:
                        self._write(name, p, p.detach(), master)
                    merged += 1
        return merged

    @torch.no_grad()
    def _pre_step(self, *_: Any) -> None:
        self._swap_back()
        self._before_step()
        kept = []
        for frame in self._frames():
            for name, p in frame.parameters():
                if not p.requires_grad:
                    self._hide_gradient(p)
                    continue
                if _has_master(self.merging.rounding, p.dtype):
                    self._show_master(p)
                if self._keeps_before(name, p, frame):
                    kept.append(p)
        self._keep_before(kept)

    @torch.no_grad()
    def _post_step(self, *_: Any) -> None:
        # Around a fused optimizer a GradScaler calls even the step that is to be skipped, and says so here.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._swap_back()
            return
        states, slots, shown = self.state, [], []
        for frame in self._frames():
            for name, p in frame.parameters():
                if p.grad is None:
                    continue
                slot = self._advance(name, p, states[p], frame)
                if slot is not None:
                    slots.append(slot)
                if self._swapped and p in self._swapped:
                    shown.append((name, p))
        self._run(slots, self._steps() + 1)
        for name, p in shown:
            self._store_swapped(name, p)
        self._swap_back()
        self._after_step()

    def _advance(self, name: str, p: Tensor, state: dict[str, Any], frame: _Frame) -> Slot | None:
        """Count the step that the wrapped optimizer has just taken; the merge that is due now, if one is."""
        state[COUNT] = state.get(COUNT, 0) + 1
        if not self.merging.merges(name):
            return None
        stored = self._swapped[p][0] if self._swapped and p in self._swapped else p
        if frame.every == 1:
            if not frame.moves or frame.skips:
                return None
            slot = self._slot(name, p, frame, p, stored)
            return self._merging(slot, frame, state[COUNT], self._before[p], frame.decay)
        if SINCE not in state:
            state[ANCHOR] = self._before.pop(p)
            state[DECAY], state[SINCE] = 1.0, 0
        state[SINCE] += int(frame.moves)
        state[DECAY] *= frame.decay
        due = state[SINCE] >= frame.every and frame.moves
        return self._closing(name, p, state, frame, p, stored) if due else None

    def _closing(
        self, name: str, p: Tensor, state: dict[str, Any], frame: _Frame, master: Tensor, stored: Tensor
    ) -> Slot:
        """The merge that ends an interval of K steps, and begins the next."""
        slot = self._slot(name, p, frame, master, stored)
        self._merging(slot, frame, state[COUNT], state[ANCHOR], state[DECAY], reopen=True)
        state[DECAY], state[SINCE] = 1.0, 0
        return slot

    def _merging(
        self, slot: Slot, frame: _Frame, step: int, anchor: Tensor, decay: float, *, reopen: bool = False
    ) -> Slot:
        """Set what the slot's job needs for a merge."""
        slot.job.settings = frame.settings(step, reopen)
        slot.job.anchor, slot.job.anchor_decay = local_of(anchor), decay
        if not frame.skips:
            self._give_delta(slot, frame.group)
        return slot

    def _slot(self, name: str, p: Tensor, frame: _Frame, master: Tensor, stored: Tensor) -> Slot:
        """The parameter's slot: the one that was kept, if it still tells the truth."""
        slot = self._slots.get(p)
        if slot is None or slot.pointer != local_of(master).data_ptr() or slot.group != frame.index:
            local, layout, shards = local_part(master)
            job = Job(
                name,
                self.merging.seed,
                layout,
                local,
                "nearest",
                group=shards,
                update_dtype=update_dtype(stored.dtype),
                kept_dtype=stored.dtype if self._rounding(stored) == "nearest" else master.dtype,
            )
            slot = self._slots[p] = Slot(name, job, local.data_ptr(), merges=True, group=frame.index)
        return slot

    # -- masters of parameters below fp32, and of those with a rounding help

    def _rounding(self, stored: Tensor) -> Rounding:
        return resolve_rounding(self.merging.rounding, stored.dtype)

    def _master(self, p: Tensor) -> Tensor:
        """The parameter's exact value: itself, or a wider copy."""
        rounding = self._rounding(p)
        residual = self.state.get(p, {}).get(RESIDUAL)
        if rounding == "residual" and residual is None:
            rounding = "stochastic"  # nothing is left over yet: the value alone, in the master's dtype
        if rounding == "nearest" and update_dtype(p.dtype) == p.dtype:
            return p
        return anchor_like(p, residual, stored_as(rounding))

    def _show_master(self, p: Tensor) -> None:
        """Let the wrapped optimizer see the wide master and gradient instead of the stored parameter."""
        master = self._master(p)
        weight, grad = p.data, p.grad
        self._swapped[p] = (weight, grad)
        p.grad = None
        set_data(p, master)
        p.grad = None if grad is None else grad.to(master.dtype)

    def _store_swapped(self, name: str, p: Tensor) -> None:
        """Store the master that was moved, and show the parameter again."""
        weight, grad = self._swapped.pop(p)
        master = p.data
        p.grad = None
        set_data(p, weight)
        p.grad = grad
        self._write(name, p, weight, master)

    def _write(self, name: str, p: Tensor, weight: Tensor, master: Tensor) -> None:
        state, rounding = self.state[p], self._rounding(weight)
        if rounding == "residual" and RESIDUAL not in state:
            state[RESIDUAL] = residual_like(weight)
        local, layout, _ = local_part(weight)
        rest = residual_bits(weight, state[RESIDUAL]) if rounding == "residual" else None
        key = MaskKey(self.merging.seed, ROUNDING, state[COUNT], name)
        write_master(local.detach(), rest, local_of(master), stored_as(rounding), key, Place(layout))

    def _hide_gradient(self, p: Tensor) -> None:
        """Keep the gradient that a frozen parameter has left over from the wrapped optimizer."""
        if p.grad is not None:
            self._swapped[p] = (p.data, p.grad)
            p.grad = None

    def _swap_back(self) -> None:
        """Undo :meth:`_hide_gradient`, and :meth:`_show_master` where a step did not come to its end."""
        for p, (weight, grad) in self._swapped.items():
            p.grad = None
            set_data(p, weight)
            p.grad = grad
        self._swapped = {}

    def _keep_before(self, parameters: Sequence[Tensor]) -> None:
        """Keep the parameters' values, in the memory of the last step's where there is one that fits."""
        pairs = []
        for p in parameters:
            kept = self._before.get(p)
            if kept is None or (kept.shape, kept.dtype, kept.device) != (p.shape, p.dtype, p.device):
                self._before[p] = p.detach().clone(memory_format=torch.contiguous_format)
            else:
                pairs.append((local_of(kept), local_of(p)))
        copy_all(pairs, native=self._runner.kernel != "torch")

    def _keeps_before(self, name: str, p: Tensor, frame: _Frame) -> bool:
        if not self.merging.merges(name):
            return False
        if frame.every > 1:
            return SINCE not in self.state.get(p, {})
        return not frame.skips

    def _frames(self) -> list[_Frame]:
        return [_Frame(self, index, group) for index, group in enumerate(self.param_groups)]


class _Frame:
    """What one group's parameters share in one step."""

    def __init__(self, optimizer: OnlineMerging, index: int, group: dict[str, Any]) -> None:
        self.index, self.group = index, group
        self.every, self.moves = group["merge_every"], moves(group)
        self._weights = weights(group)
        self.skips = optimizer.merging.changes_nothing(self._weights, group["reserve_rate"])
        decoupled = optimizer.decoupled_decay
        if decoupled is None:
            inner = isinstance(optimizer.optimizer, _DECOUPLED)
            decoupled = bool(group.get("decoupled_weight_decay", inner))
        self.decay = 1.0 - float(group["lr"]) * float(group.get("weight_decay", 0)) if decoupled else 1.0
        self._made: dict[tuple[int, bool], Settings] = {}

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, parameter)."""
        return zip(map(canonical_name, self.group["param_names"]), self.group["params"], strict=True)

    def settings(self, step: int, reopen: bool) -> Settings:
        """The settings of a merge; made once for all parameters that have taken as many steps."""
        made = self._made.get((step, reopen))
        if made is None:
            made = self._made[step, reopen] = Settings(
                merge=not self.skips,
                weights=self._weights,
                rate=self.group["reserve_rate"],
                step=step,
                reopen=reopen,
            )
        return made


@lru_cache(maxsize=64)
def _has_master(rounding: Rounding, dtype: torch.dtype) -> bool:
    """Whether the wrapped optimizer is shown something wider than a parameter of this dtype."""
    return resolve_rounding(rounding, dtype) != "nearest" or update_dtype(dtype) != dtype
