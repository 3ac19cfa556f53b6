"""The identities that define online merging: where it must be something simpler, it is that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.property.runs import Policy, normal_grads
from tests.property.strategies import same_bits
from trimtab import OnDARE, OnlineMerging, OnTIES
from trimtab.ops import DELTA, UPDATE, MaskKey, Operator, bernoulli_mask, merge

SHAPES = {"w": (20, 30), "b": (30,), "s": ()}
LR = 1e-3
DECAYS = pytest.mark.parametrize("decay", [0.0, 0.1])
GAPS = pytest.mark.parametrize("gap", [1, 5])
KINDS = pytest.mark.parametrize("kind", ["ondare", "onties", "bernoulli around", "top around"])


def make(kind: str, policy: Policy, *, decay: float = 0.0, lr: float = LR, **merging: Any) -> Any:
    """OnDARE or OnTIES, or the same merge around torch's AdamW."""
    merging.setdefault("measure_every", 0)
    if kind in ("ondare", "onties"):
        chosen = {"ondare": OnDARE, "onties": OnTIES}[kind]
        return chosen(policy.named(), policy.delta, lr=lr, weight_decay=decay, **merging)
    inner = torch.optim.AdamW(policy.named(), lr=lr, weight_decay=decay)
    operator = (
        {"sparsify": "bernoulli"}
        if kind.startswith("bernoulli")
        else {"sparsify": "top", "consensus": "sign"}
    )
    return OnlineMerging(inner, policy.delta, **operator, **merging)


def steps(policies: list[Policy], optimizers: list[Any], count: int) -> Iterator[int]:
    """Step all of them with the same gradients, and yield after each step."""
    for t in range(count):
        grads = normal_grads(policies[0], seed=300 + t)
        for policy, optimizer in zip(policies, optimizers, strict=True):
            policy.set_grads(grads)
            optimizer.step()
        yield t


def equal(first: Policy, second: Policy) -> bool:
    mine, theirs = first.values(), second.values()
    return all(same_bits(mine[name], theirs[name]) for name in mine)


def moved(policy: Policy) -> bool:
    return any(not torch.equal(value, policy.start[name]) for name, value in policy.values().items())


def fresh(dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
    return Policy.make(SHAPES, dtype=dtype, seed=20, **settings)


# alpha = 0, p = 1: the wrapped optimizer


@KINDS
@GAPS
@DECAYS
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_weight_on_tau_and_with_everything_kept_it_is_adamw_bit_for_bit(
    kind: str, gap: int, decay: float, foreach: bool, dtype: torch.dtype
) -> None:
    policy, plain = fresh(dtype), fresh(dtype)
    optimizer = make(kind, policy, decay=decay, reserve_rate=1.0, merge_weight=0.0, merge_every=gap)
    adamw = torch.optim.AdamW(plain.named(), lr=LR, weight_decay=decay, foreach=foreach)
    for t in steps([policy, plain], [optimizer, adamw], 12):
        assert equal(policy, plain), t
    optimizer.merge_now()
    assert equal(policy, plain)
    assert moved(policy)


WRAPPED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda q: torch.optim.SGD(q, lr=LR, momentum=0.9, weight_decay=0.1),
    "adam": lambda q: torch.optim.Adam(q, lr=LR, weight_decay=0.1),
    "adamw fused": lambda q: torch.optim.AdamW(q, lr=LR, weight_decay=0.1, fused=True),
    "adafactor": lambda q: torch.optim.Adafactor(q, lr=LR, weight_decay=0.1),
    "rmsprop": lambda q: torch.optim.RMSprop(q, lr=LR, momentum=0.9),
    "nadam": lambda q: torch.optim.NAdam(q, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("name", WRAPPED)
@GAPS
def test_around_any_optimizer_it_is_that_optimizer(name: str, gap: int) -> None:
    policy, plain = fresh(), fresh()
    inner, alone = WRAPPED[name](policy.named()), WRAPPED[name](plain.named())
    optimizer = OnlineMerging(
        inner, policy.delta, sparsify="none", reserve_rate=1.0, merge_weight=0.0, merge_every=gap
    )
    for t in steps([policy, plain], [optimizer, alone], 11):
        assert equal(policy, plain), t
    assert moved(policy)


@KINDS
@GAPS
@DECAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forced_through_the_arithmetic_it_holds_within_one_unit(
    kind: str, gap: int, decay: float, dtype: torch.dtype
) -> None:
    """One unit in the last place of max(|θ|, |anchor|) per merge; then both go on from one."""
    policy, plain = fresh(dtype), fresh(dtype)
    optimizer = make(
        kind, policy, decay=decay, reserve_rate=1.0, merge_weight=0.0, merge_every=gap, force_merge=True
    )
    adamw = torch.optim.AdamW(plain.named(), lr=LR, weight_decay=decay)
    anchor = policy.values()
    compared, off = 0, 0
    rounds = gap == 5 and kind in ("ondare", "onties")  # around: θ − c·anchor is exact almost everywhere
    for t in steps([policy, plain], [optimizer, adamw], 3 * gap):
        if (t + 1) % gap:
            assert equal(policy, plain), "between merges the optimizer runs as it is"
            continue
        for (name, p), (_, q) in zip(policy.named(), plain.named(), strict=True):
            size = torch.maximum(torch.maximum(q.detach().abs(), p.detach().abs()), anchor[name].abs())
            unit = torch.nextafter(size, torch.full_like(size, math.inf)) - size
            assert bool(((p.detach() - q.detach()).abs() <= unit).all()), name
            off += int((p != q).sum())
            compared += p.numel()
            q.data.copy_(p.data)
        anchor = policy.values()
    assert compared == 3 * 631
    if rounds:
        assert off > 0, "the arithmetic was not run: after a roll back some entry must round"


# alpha = 1: tau


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_all_weight_on_tau_and_everything_kept_a_step_moves_by_tau(
    kind: str, dtype: torch.dtype
) -> None:
    policy = fresh(dtype)
    optimizer = make(kind, policy, reserve_rate=1.0, merge_weight=1.0)
    for t in steps([policy], [optimizer], 3):
        for name, value in policy.values().items():
            tau = policy.delta.tensor(name, dtype)
            assert same_bits(value, policy.start[name] + tau), (t, name)
            policy.start[name] = value


@pytest.mark.parametrize("fidelity", ["released", "mergekit"])
@pytest.mark.parametrize("kind", ["ondare", "onties"])
def test_it_moves_by_tau_in_every_fidelity(kind: str, fidelity: str) -> None:
    policy = fresh(torch.float64, tau_scale=0.1)  # |tau| < 1: the released clamp does not show
    optimizer = make(kind, policy, reserve_rate=1.0, merge_weight=1.0, fidelity=fidelity)
    for _ in steps([policy], [optimizer], 1):
        for name, value in policy.values().items():
            tau = policy.delta.tensor(name)
            assert float(tau.abs().max()) < 1
            assert same_bits(value, policy.start[name] + tau)


# K = all: the offline merge anchored at the reference

OPERATORS = {
    "ondare": Operator("bernoulli", "none", "linear"),
    "onties": Operator("top", "none", "sign"),
    "bernoulli around": Operator("bernoulli", "none", "linear"),
    "top around": Operator("top", "none", "sign"),
}


def offline(
    policy: Policy, name: str, accumulated: Tensor, kind: str, count: int, p: float, alpha: float
) -> Tensor:
    """The one function of online and offline merging, anchored at θ_r, with the masks of step ``count``."""
    keys = [MaskKey(6, stream, count, name) for stream in (UPDATE, DELTA)]
    tau = policy.delta.tensor(name, accumulated.dtype)
    return merge(policy.start[name], [accumulated, tau], [1 - alpha, alpha], [p, p], OPERATORS[kind], keys)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_merging_once_at_the_end_is_the_offline_merge_anchored_at_the_reference(
    kind: str, dtype: torch.dtype, p: float
) -> None:
    """K beyond the run, then merge_now: Δ_c = θ − θ_r, whatever the offline merge would be given."""
    policy, plain = fresh(dtype), fresh(dtype)
    optimizer = make(kind, policy, reserve_rate=p, merge_weight=0.4, merge_every=1000, seed=6)
    adamw = torch.optim.AdamW(plain.named(), lr=LR, weight_decay=0.0)
    for _ in steps([policy, plain], [optimizer, adamw], 7):
        assert equal(policy, plain)
    assert optimizer.merge_now() == len(SHAPES)
    for name, trained in plain.values().items():
        expected = offline(policy, name, trained - policy.start[name], kind, 7, p, 0.4)
        assert same_bits(policy.values()[name], expected), name
        assert not torch.equal(expected, trained)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_of_all_steps_is_the_offline_merge_given_the_same_update(kind: str, dtype: torch.dtype) -> None:
    """The K-th Δ is taken on weights of 0 (OnDARE, OnTIES), or is θ_T − θ_r as a whole (around)."""
    count = 6
    policy, plain = fresh(dtype), fresh(dtype)
    optimizer = make(kind, policy, reserve_rate=0.3, merge_weight=0.4, merge_every=count, seed=6)
    adamw = torch.optim.AdamW(plain.named(), lr=LR, weight_decay=0.0)
    for _ in steps([policy, plain], [optimizer, adamw], count - 1):
        assert equal(policy, plain)
    before, grads = plain.values(), normal_grads(plain, seed=999)
    around = kind.endswith("around")
    if not around:
        for _, q in plain.named():
            q.data.zero_()
    for p, o in ((policy, optimizer), (plain, adamw)):
        p.set_grads(grads)
        o.step()
    assert optimizer.pending() == 0
    for name, last in plain.values().items():
        start = policy.start[name]
        accumulated = last - start if around else (before[name] - start) + last
        assert same_bits(policy.values()[name], offline(policy, name, accumulated, kind, count, 0.3, 0.4)), (
            name
        )


def test_k_of_all_is_not_the_classic_merge_anchored_at_the_base() -> None:
    policy, plain = fresh(torch.float64), fresh(torch.float64)
    optimizer = make("onties", policy, reserve_rate=0.3, merge_weight=0.4, merge_every=3, seed=6)
    adamw = torch.optim.AdamW(plain.named(), lr=LR, weight_decay=0.0)
    for _ in steps([policy, plain], [optimizer, adamw], 3):
        pass
    name = "w"
    base = policy.start[name] - policy.delta.tensor(name)
    deltas = [plain.values()[name] - base, policy.delta.tensor(name)]
    classic = merge(base, deltas, [0.6, 0.4], [0.3, 0.3], OPERATORS["onties"], [None, None])
    assert float((classic - policy.values()[name]).abs().max()) > 0.1


# alpha = 0 with masks: masked SGD, and why OnDARE is not ChildTuning


def child_tuning_step(policy: Policy, optimizer: torch.optim.Optimizer, t: int, p: float) -> None:
    """ChildTuning-F without rescaling: the mask falls on the gradient, before any moment (2109.05687)."""
    for name, parameter in policy.named():
        mask = bernoulli_mask(parameter.shape, p, MaskKey(6, UPDATE, t + 1, name))
        parameter.grad = torch.where(mask, parameter.grad, 0)
    optimizer.step()


def test_ondare_without_tau_around_sgd_is_masked_sgd() -> None:
    """Δ = −lr·g, so masking the update and masking the gradient are one; to one unit of θ, since Δ is a
    difference."""
    policy, masked = fresh(), fresh()
    optimizer = OnlineMerging(
        torch.optim.SGD(policy.named(), lr=0.1), policy.delta, reserve_rate=0.3, merge_weight=0.0, seed=6
    )
    sgd = torch.optim.SGD(masked.named(), lr=0.1)
    for t in range(6):
        grads, before = normal_grads(policy, seed=t), policy.values()
        for side in (policy, masked):
            side.set_grads(grads)
        optimizer.step()
        child_tuning_step(masked, sgd, t, 0.3)
        for (name, p), (_, q) in zip(policy.named(), masked.named(), strict=True):
            size = torch.maximum(before[name].abs(), q.detach().abs())
            error = (p.detach() - q.detach()).abs()
            assert bool((error <= torch.finfo(torch.float32).eps * size).all()), (t, name)
            q.data.copy_(p.data)
    assert moved(policy)


def test_ondare_without_tau_is_not_child_tuning_on_adam() -> None:
    """In the first step they agree (masked moments of one gradient give the masked update); then the moments
    remember which entries were dropped, and they part."""
    policy, child = fresh(torch.float64), fresh(torch.float64)
    optimizer = make("ondare", policy, reserve_rate=0.3, merge_weight=0.0, seed=6)
    adam = torch.optim.Adam(child.named(), lr=LR)
    gaps = []
    for t in range(5):
        grads = normal_grads(policy, seed=t)
        for side in (policy, child):
            side.set_grads(grads)
        optimizer.step()
        child_tuning_step(child, adam, t, 0.3)
        gaps.append(float((policy.values()["w"] - child.values()["w"]).abs().max()))
    assert gaps[0] < 1e-15
    assert min(gaps[1:]) > 0.3 * LR
    # OnDARE's moments are Adam's, masks or not
    free = fresh(torch.float64)
    plain = torch.optim.Adam(free.named(), lr=LR)
    for t in range(5):
        free.set_grads(normal_grads(free, seed=t))
        plain.step()
    for (_, p), (_, q) in zip(policy.named(), free.named(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert same_bits(optimizer.state[p][moment], plain.state[q][moment])


@pytest.mark.parametrize("p", [0.3, 0.05])
def test_ondare_without_tau_is_adam_with_masked_updates(p: float) -> None:
    """Entry by entry: θ moves by Adam's update where this step's mask keeps it, and else not at all."""
    policy, free = fresh(torch.float64), fresh(torch.float64)
    optimizer = make("ondare", policy, reserve_rate=p, merge_weight=0.0, seed=6)
    adam = torch.optim.Adam(free.named(), lr=LR)
    for t in range(4):
        before, theirs = policy.values(), free.values()
        grads = normal_grads(policy, seed=t)
        for side, stepper in ((policy, optimizer), (free, adam)):
            side.set_grads(grads)
            stepper.step()
        for name, value in policy.values().items():
            mask = bernoulli_mask(value.shape, p, MaskKey(6, UPDATE, t + 1, name))
            assert same_bits(value[~mask], before[name][~mask])
            update = free.values()[name] - theirs[name]
            np.testing.assert_allclose((value - before[name])[mask], update[mask], rtol=0, atol=1e-14)


# released at K = 1


def released_formula(
    kind: str, theta: np.ndarray, moments: tuple[np.ndarray, np.ndarray], g: np.ndarray, tau: np.ndarray,
    masks: tuple[np.ndarray, np.ndarray], t: int, p: float, alpha: float, decay: float,
) -> np.ndarray:  # fmt: skip
    """The released optimizers in one breath, in the order of their fields; moments change in place."""
    m, v = moments
    m[...] = 0.9 * m + 0.1 * g
    v[...] = 0.999 * v + 0.001 * g * g
    update = -LR * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
    if kind == "ondare":
        thinned = [np.where(mask, x, 0) / p for mask, x in zip(masks, (update, tau), strict=True)]
        step = (1 - alpha) * thinned[0] + alpha * np.clip(thinned[1], -1, 1)
    else:
        k = int(p * update.size) or update.size
        trimmed = []
        for x in (update, tau):
            order = np.lexsort((np.arange(x.size), -np.abs(x.ravel())))
            keep = np.zeros(x.size, dtype=bool)
            keep[order[:k]] = True
            trimmed.append(np.where(keep.reshape(x.shape), x, 0))
        trimmed[1] = np.clip(trimmed[1], -1, 1)
        elected = np.where(trimmed[0] + trimmed[1] >= 0, 1, -1)
        weighted = ((1 - alpha) * trimmed[0], alpha * trimmed[1])
        step = sum(np.where(np.sign(w) == elected, w, 0) for w in weighted)
    return (theta + step) * (1 - LR * decay)


@pytest.mark.parametrize("kind", ["ondare", "onties"])
@pytest.mark.parametrize("p", [0.4, 0.001, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_released_at_k_1_is_the_formula_of_its_fields(kind: str, p: float, decay: float) -> None:
    """p = 0.001 keeps int(0.6) = 0 entries: OnTIES goes dense. Some |τ| exceed 1: the clamp shows."""
    policy, alpha = fresh(torch.float64, tau_scale=1.5), 0.05
    optimizer = make(
        kind, policy, decay=decay, reserve_rate=p, merge_weight=alpha, seed=6, fidelity="released"
    )
    theta = {name: value.numpy().copy() for name, value in policy.start.items()}
    moments = {name: (np.zeros(value.shape), np.zeros(value.shape)) for name, value in theta.items()}
    for t in range(1, 6):
        grads = normal_grads(policy, seed=t)
        policy.set_grads(grads)
        optimizer.step()
        for name in theta:
            keys = MaskKey(6, UPDATE, t, name), MaskKey(6, DELTA, 0, name)
            masks = tuple(bernoulli_mask(theta[name].shape, p, key).numpy() for key in keys)
            tau = policy.delta.tensor(name).numpy()
            g = grads[name].numpy()
            theta[name] = released_formula(
                kind, theta[name], moments[name], g, tau, masks, t, p, alpha, decay
            )
            np.testing.assert_allclose(policy.values()[name].numpy(), theta[name], rtol=0, atol=1e-13)
    assert float(policy.delta.tensor("w").abs().max()) > 2


# lr = 0


@KINDS
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "auto"),
        (torch.float32, "residual"),
        (torch.float32, "stochastic"),
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "nearest"),
        (torch.float16, "auto"),
    ],
)
@pytest.mark.parametrize("halted", [0, 1, 2])
def test_a_step_at_lr_zero_moves_nothing(
    kind: str, gap: int, dtype: torch.dtype, rounding: str, halted: int
) -> None:
    """At the first step, in the middle of a gap, and when a merge is due; with decay, and α far from 0."""
    policy = fresh(dtype)
    merging = {"reserve_rate": 0.5, "merge_weight": 0.5, "merge_every": gap, "rounding": rounding}
    optimizer = make(kind, policy, decay=0.5, **merging)
    for t in range(halted + 1):
        before = policy.values()
        residuals = [optimizer.state[p].get("merge_residual") for _, p in policy.named()]
        residuals = [None if r is None else r.clone() for r in residuals]
        group = (optimizer.optimizer if kind.endswith("around") else optimizer).param_groups[0]
        group["lr"] = 0.0 if t == halted else LR
        policy.set_grads(normal_grads(policy, seed=t))
        optimizer.step()
        if t < halted:
            assert any(not same_bits(v, before[name]) for name, v in policy.values().items())
    assert all(same_bits(value, before[name]) for name, value in policy.values().items())
    for old, (_, p) in zip(residuals, policy.named(), strict=True):
        if old is not None:
            assert same_bits(optimizer.state[p]["merge_residual"], old)


@KINDS
@pytest.mark.parametrize("gap", [1, 3])
def test_training_at_lr_zero_leaves_nothing_to_merge(kind: str, gap: int) -> None:
    policy = fresh()
    optimizer = make(kind, policy, lr=0.0, reserve_rate=0.5, merge_weight=0.5, merge_every=gap)
    for _ in steps([policy], [optimizer], 4):
        pass
    assert optimizer.pending() == 0
    assert optimizer.merge_now() == 0
    assert not moved(policy)


# decay


@KINDS
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_decay_comes_first_and_is_neither_sparsified_nor_scaled(kind: str, alpha: float) -> None:
    """With Δ = 0 and τ dropped almost everywhere, a step is θ ← (1 − lr·λ)·θ exactly, for any α and p."""
    policy = fresh()
    optimizer = make(kind, policy, decay=0.5, lr=0.1, reserve_rate=0.01, merge_weight=alpha, seed=6)
    policy.set_grads({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    optimizer.step()
    touched = 0
    for name, value in policy.values().items():
        decayed = policy.start[name] * (1 - 0.1 * 0.5)
        touched += int((value != decayed).sum())
        change = (value.double() - decayed.double()).abs()
        tau = policy.delta.tensor(name).double().abs()
        assert bool((change <= alpha * tau + 1e-6).all())
    expected = 6 + 1 + 1 if kind in ("onties", "top around") else None  # ⌈0.01·600⌉, ⌈0.3⌉, 1
    if alpha == 0:
        assert touched == 0
    elif expected is not None:
        assert touched == expected
    else:
        keys = {name: MaskKey(6, DELTA, 1, name) for name in SHAPES}
        assert touched == sum(int(bernoulli_mask(SHAPES[n], 0.01, key).sum()) for n, key in keys.items())


def test_released_decays_after_the_merge() -> None:
    results = {}
    for fidelity in ("paper", "released"):
        policy = fresh(torch.float64, tau_scale=0.1)
        optimizer = make(
            "ondare", policy, decay=0.5, lr=0.1, reserve_rate=1.0, merge_weight=1.0, fidelity=fidelity
        )
        policy.set_grads({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        optimizer.step()
        results[fidelity] = policy.values()["w"]
        tau, start = policy.delta.tensor("w"), policy.start["w"]
    torch.testing.assert_close(results["paper"], 0.95 * start + tau, rtol=0, atol=1e-15)
    torch.testing.assert_close(results["released"], 0.95 * (start + tau), rtol=0, atol=1e-15)


@KINDS
def test_decay_in_a_gap_is_not_part_of_what_is_merged(kind: str) -> None:
    """With Δ = 0 throughout, K steps of decay pass through a merge whole: Δ_c = θ − c·anchor is 0."""
    policy = fresh(torch.float64)
    optimizer = make(kind, policy, decay=0.5, lr=0.1, reserve_rate=0.01, merge_weight=0.0, merge_every=4)
    for _ in range(4):
        policy.set_grads({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        optimizer.step()
    for name, value in policy.values().items():
        torch.testing.assert_close(value, policy.start[name] * 0.95**4, rtol=1e-14, atol=0)
