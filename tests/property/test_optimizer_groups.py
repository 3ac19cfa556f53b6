"""Whole steps against the oracle: groups, parameters that rest, odd layouts, schedules, fp32 and below."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracle import reference as oracle
from tests.property.runs import Policy, Twin, module_of, normal_grads
from tests.property.strategies import as_float64, same_bits
from trimtab import OnDARE, OnlineMerging, OnTIES, schedule
from trimtab.ops import UPDATE, MaskKey, bernoulli_mask, join_master
from trimtab.optim.precision import residual_bits

FP64 = 1e-12
SHAPES = {"embed": (6, 4), "head": (3, 5), "bias": (9,), "scale": ()}
BOTH = pytest.mark.parametrize(("method", "make"), [("ondare", OnDARE), ("onties", OnTIES)])


def around_adamw(
    parameters: Any, delta: Any, *, lr: float, weight_decay: float = 0.0, **merge: Any
) -> OnlineMerging:
    return OnlineMerging(torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay), delta, **merge)


@BOTH
def test_groups_have_their_own_settings(method: str, make: Any) -> None:
    policy = Policy.make(SHAPES, seed=5)
    named = dict(policy.named())
    own = {
        "embed": {"lr": 0.1, "merge_every": 3, "reserve_rate": 0.4, "merge_weight": 0.2, "weight_decay": 0.5},
        "head": {"lr": 0.01, "merge_every": 1, "reserve_rate": 1.0, "merge_weight": 1.0, "weight_decay": 0.0},
        "bias": {"lr": 0.02, "merge_every": 2, "reserve_rate": 0.9, "merge_weight": 0.0, "weight_decay": 0.1},
    }
    default = {"lr": 0.05, "merge_every": 2, "reserve_rate": 0.6, "merge_weight": 0.3, "weight_decay": 0.2}
    groups = [{"params": [(name, named[name])], **settings} for name, settings in own.items()]
    optimizer = make([*groups, {"params": [("scale", named["scale"])]}], policy.delta, **default, seed=8)

    def settings(name: str) -> dict[str, Any]:
        chosen = dict(own.get(name, default))
        chosen["decay"] = chosen.pop("weight_decay")
        return chosen

    twin = Twin(policy, oracle.PAPER[method], lambda _: oracle.Adam(), settings, seed=8)
    for t in range(7):
        grads = normal_grads(policy, seed=t)
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads)
        twin.check(FP64)
    assert optimizer.pending() == 3  # all but "head", whose K is 1
    assert optimizer.merge_now() == 3
    twin.merge_now()
    twin.check(FP64)


@BOTH
def test_frozen_resting_and_deltaless_parameters(method: str, make: Any) -> None:
    """Frozen ones never move, resting ones keep their own count (which keys their masks and their K)."""
    policy = Policy.make(SHAPES, seed=6)
    extra = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy.module.register_parameter("adapter", torch.nn.Parameter(extra.clone()))
    policy.start["adapter"] = extra
    dict(policy.named())["head"].requires_grad_(False)
    merge = {"lr": 0.03, "merge_every": 2, "reserve_rate": 0.5, "merge_weight": 0.25}
    optimizer = make(
        policy.named(), policy.delta, **merge, weight_decay=0.4, without_delta=["adapter"], measure_every=0
    )
    twin = Twin(
        policy,
        oracle.PAPER[method],
        lambda _: oracle.Adam(),
        lambda _: {**merge, "decay": 0.4},
        plain=["adapter"],
    )
    for t in range(8):
        grads = normal_grads(policy, seed=t)
        if t in (0, 3, 4):
            grads["bias"] = None
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads)
        twin.check(FP64)
    assert [twin.runs[name].count for name in ("embed", "head", "bias", "adapter")] == [8, 0, 5, 8]
    assert torch.equal(policy.values()["head"], policy.start["head"])


@pytest.mark.parametrize("make", [OnDARE, OnTIES, around_adamw])
@pytest.mark.parametrize("gap", [1, 3])
def test_strides_of_parameters_and_gradients_do_not_matter(make: Any, gap: int) -> None:
    """A transposed parameter with a strided gradient moves as its contiguous copy: indices are logical."""
    results = []
    for strided in (False, True):
        policy = Policy.make({"w": (5, 7)}, dtype=torch.float32, seed=7)
        if strided:
            policy.module = module_of({"w": policy.start["w"].t().contiguous().t()})
            assert not dict(policy.named())["w"].is_contiguous()
        optimizer = make(
            policy.named(), policy.delta, lr=0.01, reserve_rate=0.3, merge_weight=0.1, merge_every=gap
        )
        for t in range(4):
            grad = normal_grads(policy, seed=t)["w"]
            wide = torch.zeros(5, 14)
            wide[:, ::2] = grad
            dict(policy.named())["w"].grad = wide[:, ::2] if strided else grad
            optimizer.step()
        results.append(policy.values()["w"].contiguous())
    assert same_bits(*results)


@BOTH
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp32_follows_the_oracle(method: str, make: Any, gap: int, decay: float) -> None:
    """Over 6 steps within 6·2⁻²² of max(1, |θ|): each step rounds θ, the bracket and Δ, four units in all.

    Adam's ε is large here: with a small one the first Δ are all ties, which rounding decides in fp32.
    """
    policy = Policy.make({"w": (20, 30), "b": (40,)}, dtype=torch.float32, seed=8)
    merge = {"lr": 0.01, "merge_every": gap, "reserve_rate": 1 / 3, "merge_weight": 0.02}
    optimizer = make(policy.named(), policy.delta, **merge, weight_decay=decay, eps=0.3, measure_every=0)
    settings = {**merge, "decay": decay}
    twin = Twin(policy, oracle.PAPER[method], lambda _: oracle.Adam(eps=0.3), lambda _: settings)
    for t in range(6):
        grads = normal_grads(policy, seed=t)
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads)
    missed = 0
    for name, p in policy.named():
        error = np.abs(as_float64(p) - oracle.shaped(twin.runs[name].theta, p.detach()))
        missed += int((error > 6 * 2**-22 * np.maximum(1, np.abs(as_float64(p)))).sum())
    assert missed == 0


@pytest.mark.parametrize("make", [OnDARE, around_adamw])
def test_merge_weight_and_reserve_rate_follow_schedules(make: Any) -> None:
    policy = Policy.make(SHAPES, seed=9)
    optimizer = make(policy.named(), policy.delta, lr=0.01, reserve_rate=0.5, merge_weight=0.0)
    schedule(optimizer, "merge_weight", lambda t: 0.1 * t)
    schedule(optimizer, "reserve_rate", lambda t: 1.0 / (1 + t))
    settings = {"lr": 0.01, "reserve_rate": 0.5, "merge_weight": 0.0}
    twin = Twin(policy, oracle.PAPER["ondare"], lambda _: oracle.Adam(), lambda _: settings)
    for t in range(5):
        grads = normal_grads(policy, seed=t)
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads, merge_weight=0.1 * t, reserve_rate=1.0 / (1 + t))
        twin.check(FP64)


@pytest.mark.parametrize("make", [OnDARE, around_adamw])
def test_merge_weight_follows_the_learning_rate_only_when_asked(make: Any) -> None:
    merge = {"reserve_rate": 0.5, "merge_weight": 0.4}
    for follows in (False, True):
        policy = Policy.make(SHAPES, seed=9)
        optimizer = make(policy.named(), policy.delta, lr=0.01, **merge, merge_weight_follows_lr=follows)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        twin = Twin(policy, oracle.PAPER["ondare"], lambda _: oracle.Adam(), lambda _: {"lr": 0.01, **merge})
        for t in range(4):
            grads = normal_grads(policy, seed=t)
            policy.set_grads(grads)
            optimizer.step()
            scheduler.step()
            share = 1 / (1 + t)
            twin.step(grads, lr=0.01 * share, merge_weight=0.4 * (share if follows else 1))
            twin.check(FP64)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_masked_once_is_redrawn_for_the_rate_of_the_day(fidelity: str) -> None:
    """A scheduled p applies to the mask that is drawn once too: nested masks, since the key stays."""
    policy = Policy.make({"w": (12, 12)}, seed=10)
    rescaled = {"paper": "none", "released": "expected"}[fidelity]
    optimizer = OnlineMerging(
        torch.optim.SGD(policy.named(), lr=0.1),
        policy.delta,
        rescale=rescaled,
        redraw=False,
        merge_weight=0.1,
        reserve_rate=0.2,
    )
    schedule(optimizer, "reserve_rate", lambda t: [0.2, 0.6, 1.0, 0.3][t])
    settings = {"lr": 0.1, "reserve_rate": 0.2, "merge_weight": 0.1}
    method = oracle.Method("bernoulli", "linear", rescale=rescaled)
    twin = Twin(policy, method, lambda _: oracle.SGD(), lambda _: settings, redraw=False)
    for t in range(4):
        grads = normal_grads(policy, seed=t)
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads, reserve_rate=[0.2, 0.6, 1.0, 0.3][t])
        twin.check(FP64)


# below fp32


def low_precision_pair(seed: int) -> tuple[Policy, Policy]:
    """Two policies at the same bf16-valued reference, one stored in fp32, one in bf16, with one delta."""
    low = Policy.make({"w": (30, 20), "b": (33,)}, dtype=torch.bfloat16, seed=seed, tau_scale=0.05)
    wide = Policy(module_of({n: v.float() for n, v in low.start.items()}), low.delta, dict(low.start))
    return wide, low


@pytest.mark.parametrize("make", [OnDARE, OnTIES, around_adamw])
@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bf16_with_residual_is_the_fp32_run_bit_for_bit(make: Any, gap: int, decay: float) -> None:
    wide, low = low_precision_pair(seed=11)
    optimizers = []
    for policy in (wide, low):
        merge = {"reserve_rate": 0.5, "merge_weight": 1e-3, "merge_every": gap, "seed": 2, "measure_every": 0}
        optimizers.append(make(policy.named(), policy.delta, lr=1e-4, weight_decay=decay, **merge))
    for t in range(6):
        grads = normal_grads(low, seed=t, dtype=torch.bfloat16)
        for policy, optimizer in zip((wide, low), optimizers, strict=True):
            policy.set_grads(grads)
            optimizer.step()
        for (name, p32), (_, p16) in zip(wide.named(), low.named(), strict=True):
            residual = residual_bits(p16, optimizers[1].state[p16]["merge_residual"])
            assert residual.dtype == torch.int16
            assert same_bits(join_master(p16.detach(), residual), p32.detach()), (t, name)
    for optimizer in optimizers:
        optimizer.merge_now()
    for (name, p32), (_, p16) in zip(wide.named(), low.named(), strict=True):
        residual = residual_bits(p16, optimizers[1].state[p16]["merge_residual"])
        joined = join_master(p16.detach(), residual)
        assert same_bits(joined, p32.detach()), name
        assert not torch.equal(p32.detach(), wide.start[name].float()), "nothing moved: the test saw nothing"


@pytest.mark.parametrize("make", [OnDARE, around_adamw])
def test_stochastic_rounding_repeats_with_its_seed_and_is_unbiased(make: Any) -> None:
    """θ = 1.5 in bf16 (neighbours 2⁻⁷ apart), a step of about 2⁻⁷/10: the mean over entries is that step."""
    n, gap = 40_000, 2.0**-7
    base, reference = (
        torch.full((n,), 1.25, dtype=torch.bfloat16),
        torch.full((n,), 1.5, dtype=torch.bfloat16),
    )
    results = []
    for seed in (3, 3, 4):
        policy = Policy.make({"w": (n,)}, dtype=torch.bfloat16)
        policy.module = module_of({"w": reference.clone()})
        policy.delta = type(policy.delta).between(
            reference=module_of({"w": reference}), base=module_of({"w": base})
        )
        optimizer = make(
            policy.named(),
            policy.delta,
            lr=gap / 10,
            reserve_rate=1.0,
            merge_weight=1e-3,
            rounding="stochastic",
            seed=seed,
            measure_every=0,
        )
        policy.set_grads({"w": -torch.ones(n)})
        optimizer.step()
        results.append(policy.values()["w"])
        assert not any("residual" in key for key in optimizer.state[dict(policy.named())["w"]])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    target = 1.5 + (1 - 1e-3) * gap / 10 + 1e-3 * 0.25
    for result in (results[0], results[2]):
        away = float((result.double() - 1.5).sum()) / gap  # entries that went up
        share = (target - 1.5) / gap
        assert abs(away - n * share) < 5 * math.sqrt(n * share * (1 - share))


def test_masks_of_a_step_are_keyed_by_the_parameters_own_count() -> None:
    """A parameter that rested in the first step draws the masks of its first step in the second."""
    policy = Policy.make({"a": (50,), "b": (50,)}, seed=12)
    optimizer = OnDARE(policy.named(), policy.delta, lr=0.1, reserve_rate=0.5, merge_weight=0.0, seed=4)
    for grads in ({"a": torch.ones(50), "b": None}, {"a": None, "b": torch.ones(50)}):
        policy.set_grads(grads)
        optimizer.step()
    for name, value in policy.values().items():
        mask = bernoulli_mask((50,), 0.5, MaskKey(4, UPDATE, 1, name))
        assert torch.equal(value != policy.start[name], mask)
