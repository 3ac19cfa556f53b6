"""GaLore: AdamW whose moments live in a low-rank subspace of each matrix's gradient."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from trimtab.errors import UserError
from trimtab.ops import canonical_name
from trimtab.ops.kernels.torch_engine import write_master
from trimtab.ops.masks import ROUNDING, MaskKey, Place
from trimtab.optim.precision import RESIDUAL, anchor_like, residual_bits, residual_like, restore_dtypes
from trimtab.optim.sharding import local_part
from trimtab.optim.subspace import leading_vectors

Parameters = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

PLAIN = (r"embed|\bwte\b|\bwpe\b", r"(^|\.)(lm_head|score|classifier|value_head)\.")
"""Finds what takes plain AdamW by default: embeddings and heads, which the paper does not project either."""

PROJECTOR, OFFSET = "projector", "projector_offset"


class ProjectorWarning(UserWarning):
    """Singular vectors could not be found in the usual way."""


class GaLoreAdamW(Optimizer):
    """AdamW on gradients that are projected to a low rank (GaLore, arXiv 2403.03507, Algorithm 2).

    For a matrix W of shape (m, n) with gradient G, and P the first r left singular vectors of a gradient
    (m ≤ n; else the right ones, and everything is transposed):

        R = Pᵀ G                                     (r, n)
        M, V ← Adam's moments of R
        N = M̂ / (√V̂ + ε)
        W ← (1 − lr·λ)·W − lr · scale · P N

    P is (m, r) and M and V are (r, n), instead of twice (m, n). Each matrix gets a new P from its gradient at
    its first step and then every ``update_proj_gap`` steps, each at its own time: matrix i of N at steps that
    leave the rest ⌊i·gap/N⌋, so that no step pays for all decompositions (the first apart). The moments live
    on across a change of P, as in the paper. While a matrix has only had gradients of zeros (a LoRA A whose B
    is 0), there is no P yet and it does not move.

    Vectors, and what ``plain`` finds, take the step of torch.optim.AdamW. Parameters below fp32 are stepped
    as fp32 masters, of which they carry the rest as a 16-bit residual; P and the moments are fp32.
    ``state_dict`` holds tensors and numbers only, and a resumed run goes on bit for bit.

    Args:
        params: named parameters, or groups of them with their own ``rank``, ``update_proj_gap``, ``scale``.
        lr: learning rate.
        betas: Adam's β₁ and β₂.
        eps: Adam's ε, inside the subspace.
        weight_decay: decoupled, of the whole matrix, before the step.
        rank: r; a matrix with a shorter side below it keeps its full rank.
        update_proj_gap: T, steps between two projectors of one matrix; 200 in the paper.
        scale: α of the paper, a factor on what is projected back; 0.25 in the paper's pretraining.
        plain: pattern, or patterns, for canonical names that take plain AdamW; default :data:`PLAIN`.

    Attributes:
        fallbacks: how often singular vectors were not found by the SVD: ``gesvd`` and ``eigh`` found them,
            ``kept`` means that the projector before was kept (at the first step: the axes were taken).

    Raises:
        UserError: parameters without names, sharded ones, a number out of range, a pattern that finds none.

    Examples:
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=4)
        >>> model(torch.ones(64)).sum().backward()
        >>> optimizer.step()
        >>> [tuple(optimizer.state[model.weight][key].shape) for key in ("projector", "exp_avg")]
        [(32, 4), (4, 64)]
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        plain: str | Sequence[str] | None = None,
    ) -> None:
        self.plain = PLAIN if plain is None else (plain,) if isinstance(plain, str) else tuple(plain)
        _check_patterns(self.plain)
        self.fallbacks: Counter[str] = Counter()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        if plain is not None:
            self._refuse_idle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be (name, parameter) pairs."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "param_names" not in group:
            raise UserError(
                "GaLoreAdamW tells by name what it projects: pass model.named_parameters(), or groups of "
                "(name, parameter) pairs, instead of model.parameters()"
            )
        _check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"plain": self.plain, "fallbacks": self.fallbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but exact: fp32 state of bf16 parameters stays fp32."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            whole: list[tuple[str, Tensor]] = []
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is None:
                    continue
                if isinstance(p, DTensor):
                    raise UserError(
                        f"{name} is sharded, and GaLore needs whole matrices for their singular vectors; "
                        "train with DDP instead of FSDP2, or take AdamW"
                    )
                if is_projected(name, p.shape, self.plain):
                    self._step_projected(name, p, group)
                else:
                    whole.append((name, p))
            self._step_whole(whole, group)
        return loss

    def _step_whole(self, pairs: Sequence[tuple[str, Tensor]], group: dict[str, Any]) -> None:
        """The step of torch.optim.AdamW."""
        masters = [self._master(p) for _, p in pairs]
        states = [self.state[p] for _, p in pairs]
        for state, master in zip(states, masters, strict=True):
            _start(state, master.shape, master)
        grads = [_gradient(name, p, master) for (name, p), master in zip(pairs, masters, strict=True)]
        _adam(masters, grads, states, group, weight_decay=group["weight_decay"])
        for (name, p), master in zip(pairs, masters, strict=True):
            self._store(name, p, master)

    def _step_projected(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        state, master = self.state[p], self._master(p)
        grad, left = _gradient(name, p, master), p.shape[0] <= p.shape[1]
        rank = min(group["rank"], *p.shape)
        _start(state, (rank, p.shape[1]) if left else (p.shape[0], rank), master)
        projector = self._projector(name, p, grad, group)
        master.mul_(1 - group["lr"] * group["weight_decay"])
        if projector is None:
            state["step"] += 1
        else:
            low = projector.T @ grad if left else grad @ projector
            update = torch.zeros_like(low)  # Adam's step from 0: −lr · N
            _adam([update], [low], [state], group, weight_decay=0.0)
            factors = (projector, update) if left else (update, projector.T)
            master.addmm_(*factors, alpha=group["scale"])
        self._store(name, p, master)

    def _projector(self, name: str, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The matrix's projector, a new one where that is due; None while all gradients have been zero."""
        state, gap = self.state[p], group["update_proj_gap"]
        if OFFSET not in state:
            state[OFFSET] = self._offset(p, gap)
        kept: Tensor | None = state.get(PROJECTOR)
        if kept is not None and int(state["step"]) % gap != state[OFFSET] % gap:
            return kept
        if not bool(grad.any()):
            return kept
        found = leading_vectors(grad, group["rank"])
        if found is None:
            self._note("kept", name)
            rank = min(group["rank"], *p.shape)
            axes = torch.eye(min(p.shape), rank, dtype=grad.dtype, device=grad.device)
            state[PROJECTOR] = axes if kept is None else kept
        else:
            state[PROJECTOR], how = found
            if how != "svd":
                self._note(how, name)
        return state[PROJECTOR]  # type: ignore[no-any-return]

    def _offset(self, p: Tensor, gap: int) -> int:
        """At which rest of the step count the matrix's projector is renewed: spread evenly over the gap."""
        projected = [
            other
            for group in self.param_groups
            for name, other in zip(group["param_names"], group["params"], strict=True)
            if is_projected(name, other.shape, self.plain)
        ]
        place = next(i for i, other in enumerate(projected) if other is p)
        return place * gap // len(projected)

    def _note(self, how: str, name: str) -> None:
        """Count what had to stand in for the SVD, and say so the first time."""
        if not self.fallbacks:
            what = {
                "gesvd": "the driver gesvd found its singular vectors",
                "eigh": "they were taken from its Gram matrix",
                "kept": "its last projector was kept (the axes, where it had none)",
            }
            warnings.warn(
                f"the SVD of the gradient of {name} failed, and {what[how]}; this is said once and counted "
                "in the optimizer's fallbacks",
                ProjectorWarning,
                stacklevel=4,
            )
        self.fallbacks[how] += 1

    def _master(self, p: Tensor) -> Tensor:
        """The parameter itself, or below fp32 its fp32 master."""
        if not _is_narrow(p):
            return p
        state = self.state[p]
        residual = state.get(RESIDUAL)
        if residual is None:
            residual = state[RESIDUAL] = residual_like(p)
        return anchor_like(p, residual, "residual")

    def _store(self, name: str, p: Tensor, master: Tensor) -> None:
        if master is p:
            return
        local, layout, _ = local_part(p)
        key = MaskKey(0, ROUNDING, 0, canonical_name(name))  # a residual is exact: nothing is drawn
        write_master(local, residual_bits(p, self.state[p][RESIDUAL]), master, "residual", key, Place(layout))

    def _refuse_idle(self) -> None:
        names = [canonical_name(name) for group in self.param_groups for name in group["param_names"]]
        for pattern in self.plain:
            if not any(re.search(pattern, name) for name in names):
                raise UserError(
                    f"plain pattern {pattern!r} finds none of the {len(names)} parameters; they are called "
                    f"like {names[0]!r}"
                )


def is_projected(name: str, shape: Sequence[int], plain: Sequence[str] = PLAIN) -> bool:
    """Whether GaLore projects a parameter: a matrix that no pattern finds.

    Args:
        name: as ``named_parameters()`` gives it.
        shape: the parameter's.
        plain: patterns for canonical names that take plain AdamW.

    Examples:
        >>> is_projected("model.layers.0.mlp.up_proj.weight", (8, 4)), is_projected("lm_head.weight", (8, 4))
        (True, False)
    """
    name = canonical_name(name)
    return len(shape) == 2 and 0 not in shape and not any(re.search(pattern, name) for pattern in plain)


def _is_narrow(p: Tensor) -> bool:
    return p.dtype in (torch.bfloat16, torch.float16)


def _gradient(name: str, p: Tensor, master: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.layout != torch.strided:
        raise UserError(f"{name} has a sparse gradient; GaLore needs dense ones (Embedding(sparse=False))")
    return p.grad.to(master.dtype)


def _start(state: dict[str, Any], shape: Sequence[int], like: Tensor) -> None:
    """Adam's state of a shape, at the first step."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)


def _adam(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    *,
    weight_decay: float,
) -> None:
    """Take torch's own step of AdamW on these tensors, in place."""
    if not parameters:
        return
    beta1, beta2 = group["betas"]
    adam(
        parameters,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _check_patterns(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"plain pattern {pattern!r} is no regular expression ({error})") from error


def _check_group(group: dict[str, Any]) -> None:
    for key, minimum in (("lr", 0), ("eps", 0), ("weight_decay", 0)):
        if not group[key] >= minimum:
            raise UserError(f"{key} must be ≥ {minimum}, got {group[key]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise UserError(f"betas must be in [0, 1), got {group['betas']}")
    for key in ("rank", "update_proj_gap"):
        if isinstance(group[key], bool) or not isinstance(group[key], int) or group[key] < 1:
            raise UserError(f"{key} must be a whole number ≥ 1, got {group[key]!r}")
    if not group["scale"] > 0:
        raise UserError(f"scale must be above 0, got {group['scale']}")
