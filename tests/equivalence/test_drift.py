"""What Σ α·F(τ) comes to over T steps: it is no restoring force, it adds up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.property.runs import Policy, module_of
from trimtab import OnDARE, ReferenceDelta
from trimtab.ops import DELTA, MaskKey, bernoulli_mask


def drift(optimizer_of: Callable[[Policy], Any], count: int) -> tuple[Tensor, Tensor]:
    """(θ_T − θ_r, τ) after ``count`` steps without gradient signal."""
    base = torch.zeros(40_000, dtype=torch.float64)
    start = torch.full_like(base, 0.25)
    module = module_of({"w": start.clone()})
    delta = ReferenceDelta.between(reference=module, base=module_of({"w": base}))
    policy = Policy(module, delta, {"w": start})
    optimizer = optimizer_of(policy)
    for _ in range(count):
        policy.set_grads({"w": torch.zeros_like(base)})
        optimizer.step()
    return policy.values()["w"] - policy.start["w"], policy.delta.tensor("w")


@pytest.mark.parametrize(("rescale", "share"), [("none", 0.2), ("expected", 1.0)])
def test_drift_of_redrawn_masks(rescale: str, share: float) -> None:
    """α·p·T·τ without rescaling, α·T·τ with: the mean over 40,000 entries within 5 standard deviations."""
    alpha, p, count = 1e-3, 0.2, 20
    total, tau = drift(
        lambda q: OnDARE(q.named(), q.delta, reserve_rate=p, merge_weight=alpha, rescale=rescale), count
    )
    unit = alpha * float(tau[0]) * (1 if rescale == "none" else 1 / p)
    kept = total / unit  # how often each entry was kept
    assert float((kept - kept.round()).abs().max()) < 1e-9
    assert abs(float(kept.mean()) - p * count) < 5 * math.sqrt(count * p * (1 - p) / kept.numel())
    assert float(total.mean()) == pytest.approx(alpha * share * count * float(tau[0]), rel=0.02)


def test_drift_of_a_mask_drawn_once() -> None:
    """α·T/p·τ on the kept entries (expected), α·T·τ (none); 0 elsewhere, for ever."""
    alpha, p, count = 1e-3, 0.2, 20
    for rescale, factor in (("none", 1.0), ("expected", 5.0)):
        total, tau = drift(
            lambda q, r=rescale: OnDARE(
                q.named(), q.delta, reserve_rate=p, merge_weight=alpha, rescale=r, redraw=False
            ),
            count,
        )
        kept = bernoulli_mask((40_000,), p, MaskKey(0, DELTA, 0, "w"))
        assert bool((total[~kept] == 0).all())
        torch.testing.assert_close(total[kept], alpha * count * factor * tau[kept], rtol=1e-9, atol=0)
