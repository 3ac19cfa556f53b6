"""A library optimizer and the oracle taking the same steps, compared after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracle import reference as oracle
from tests.property.strategies import as_float64
from trimtab import ReferenceDelta
from trimtab.ops import DELTA, UPDATE, MaskKey, bernoulli_mask

Grads = Mapping[str, Tensor | None]


def module_of(values: Mapping[str, Tensor]) -> torch.nn.Module:
    """A module with the given parameters (strides kept), under their names."""
    module = torch.nn.Module()
    for name, value in values.items():
        module.register_parameter(name, torch.nn.Parameter(value))
    return module


def random_like(shape: Sequence[int], seed: int, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """Normal numbers on a grid of 2⁻¹², so that differences of two of them are exact in fp32."""
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return ((x * 4096).round() / 4096).to(dtype)


@dataclass
class Policy:
    """Parameters at the reference, and the delta they are trained with."""

    module: torch.nn.Module
    delta: ReferenceDelta
    start: dict[str, Tensor]

    @classmethod
    def make(
        cls,
        shapes: Mapping[str, Sequence[int]],
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        tau_scale: float = 0.5,
        delta_dtype: torch.dtype | None = None,
    ) -> Policy:
        base, reference = {}, {}
        for i, (name, shape) in enumerate(shapes.items()):
            base[name] = random_like(shape, 2 * i + 1000 * seed, dtype)
            change = random_like(shape, 2 * i + 1 + 1000 * seed, dtype, scale=tau_scale)
            reference[name] = base[name] + change
        wide = delta_dtype or dtype
        delta = ReferenceDelta.between(
            reference=module_of({n: v.to(wide) for n, v in reference.items()}),
            base=module_of({n: v.to(wide) for n, v in base.items()}),
            allow_zero=True,
        )
        module = module_of({n: v.clone() for n, v in reference.items()})
        return cls(module, delta, {n: v.clone() for n, v in reference.items()})

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.module.named_parameters())

    def tau(self, name: str) -> list[float]:
        return oracle.flat(as_float64(self.delta.tensor(name)))

    def set_grads(self, grads: Grads) -> None:
        for name, parameter in self.named():
            grad = grads.get(name)
            parameter.grad = None if grad is None else grad.to(parameter.dtype)

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named()}


def normal_grads(policy: Policy, seed: int, *, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """One step's gradients for every parameter that takes one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype or p.dtype)
        for name, p in policy.named()
        if p.requires_grad
    }


@dataclass
class Twin:
    """The oracle's side: one oracle parameter for each of the policy's, with that parameter's settings."""

    policy: Policy
    method: oracle.Method
    inner: Callable[[str], Any]
    settings: Callable[[str], dict[str, Any]]
    seed: int = 0
    redraw: bool = True
    plain: Sequence[str] = ()
    runs: dict[str, oracle.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = {}
        for name, p in self.policy.named():
            tau = None if name in self.plain else self.policy.tau(name)
            theta = oracle.flat(as_float64(p))
            self.runs[name] = oracle.Parameter(theta, tau, self.inner(name), self.method)

    def step(self, grads: Grads, **change: Any) -> None:
        """Take one step. ``change`` overrides settings of all parameters in it."""
        for name, run in self.runs.items():
            grad = grads.get(name)
            settings = {**self.settings(name), **change}
            kept = self.kept(name, settings["reserve_rate"], run.count + 1)
            values = None if grad is None else oracle.flat(as_float64(grad))
            run.step(values, **settings, update_kept=kept[0], tau_kept=kept[1])

    def merge_now(self) -> None:
        for name, run in self.runs.items():
            settings = self.settings(name)
            p = settings["reserve_rate"]
            run.merge_now(settings["merge_weight"], p, *self.kept(name, p, run.count))

    def kept(self, name: str, p: float, count: int) -> tuple[list[bool], list[bool]]:
        """The bits of both masks at this parameter's step ``count``; τ's at 0 where it is masked once."""
        shape = self.policy.start[name].shape
        update = MaskKey(self.seed, UPDATE, count, name)
        tau = MaskKey(self.seed, DELTA, count if self.redraw else 0, name)
        return tuple(bernoulli_mask(shape, p, key).reshape(-1).tolist() for key in (update, tau))

    def check(self, tolerance: float) -> None:
        """Assert that every parameter is the oracle's within ``tolerance``·max(1, |θ|), NaN where that is."""
        for name, p in self.policy.named():
            got, expected = as_float64(p), oracle.shaped(self.runs[name].theta, p.detach())
            with np.errstate(invalid="ignore"):
                error = np.abs(got - expected)
                fine = (error <= tolerance * np.maximum(1, np.abs(expected))) | (got == expected)
            fine |= np.isnan(got) & np.isnan(expected)
            assert fine.all(), f"{name}: {got[~fine]} should be {expected[~fine]}"
