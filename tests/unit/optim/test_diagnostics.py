"""The diagnostics of merges: shares and norms by hand, and the drift against Σ α·F(τ) kept in full."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import OnDARE, OnlineMerging, OnTIES, ReferenceDelta
from trimtab.ops import DELTA, UPDATE, MaskKey, Operator, agreeing_terms, sparsify
from trimtab.ops.kernels.sums import measure, squared_norm
from trimtab.optim.diagnostics import drift
from trimtab.optim.measuring import DiagnosticsMeter

SIZES = {"a": 6_000, "b": 2_500}
STEPS = 60


def taus() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(n, generator=generator) * (1 + i) for i, (name, n) in enumerate(SIZES.items())}


Updates = Callable[[int, str], Tensor]


def coins(step: int, name: str) -> Tensor:
    """Updates that vote anew at every step, of about the size of α·τ."""
    generator = torch.Generator().manual_seed(step * 7 + len(name) + ord(name))
    return torch.randn(SIZES[name], generator=generator) * 2e-3


def persistent(step: int, name: str) -> Tensor:
    """Updates that vote the same at every step."""
    return coins(0, name)


def alpha_of(step: int) -> float:
    return 1e-3 * (1.5 - step / STEPS)


class Tracked:
    """Two parameters in one group, merged as optimizers merge, with Σ α·F(τ) kept in full."""

    def __init__(self, operator: Operator, redraw: bool, every: int = 7, rate: float = 0.4) -> None:
        self.operator, self.redraw, self.rate = operator, redraw, rate
        self.meter = DiagnosticsMeter(operator, redraw, every)
        self.groups: list[dict[str, Any]] = [{}]
        self.tau = taus()
        self.sums = {name: torch.zeros(n, dtype=torch.float64) for name, n in SIZES.items()}
        self.found = None
        self.alpha_of = alpha_of

    def thinned(self, x: Tensor, stream: int, step: int, name: str) -> Tensor:
        operator, key = self.operator, MaskKey(3, stream, step, name)
        return sparsify(x, operator.sparsify, self.rate, rescale=operator.rescale, key=key)

    def step(self, step: int, updates: Updates, names: tuple[str, ...] = tuple(SIZES)) -> None:
        alpha = self.alpha_of(step)
        self.meter.begin(self.groups, step)
        share = sum(SIZES[name] for name in names) / sum(SIZES.values())
        self.meter.merges(0, alpha, self.rate, share)
        for name in names:
            update = updates(step, name)
            kept = self.thinned(update, UPDATE, step, name)
            tau = self.thinned(self.tau[name], DELTA, step if self.redraw else 0, name)
            parts = agreeing_terms([kept, tau], [1 - alpha, alpha], self.operator.consensus)
            self.sums[name] += parts[1].double()
            if self.meter.wants(0):
                row = measure(torch.zeros_like(update), update, kept, tau, parts, torch.float32)
                self.meter.add([0], row.unsqueeze(0), [squared_norm(self.tau[name])])
        self.found = self.meter.end(self.groups) or self.found

    def exact(self) -> float:
        moved = sum(squared_norm(total) for total in self.sums.values())
        return math.sqrt(moved / sum(squared_norm(tau) for tau in self.tau.values()))

    def run(self, updates: Updates, count: int = STEPS) -> tuple[float, float]:
        """(Σ α·F(τ) as it is, as it is estimated), both in units of ‖τ‖."""
        for step in range(1, count + 1):
            self.step(step, updates)
        return self.exact(), drift(self.groups)


@pytest.mark.parametrize("rescale", ["none", "expected"])
@pytest.mark.parametrize("count", [1, STEPS])
def test_drift_of_redrawn_masks_is_its_expectation(rescale: str, count: int) -> None:
    """Within the noise of 8,500 entries' masks, which is most of the drift at one step."""
    tracked = Tracked(Operator("bernoulli", rescale, "linear"), redraw=True)
    exact, estimated = tracked.run(coins, count)
    assert estimated == pytest.approx(exact, rel=0.04 if count == 1 else 0.005)
    along, spread = tracked.groups[0]["merge_drift_along"] ** 2, tracked.groups[0]["merge_drift_spread"]
    assert spread / (along + spread) == pytest.approx(0.6 if count == 1 else 0.025, rel=0.2)


def test_redrawn_masks_that_restore_the_l1_norm() -> None:
    exact, estimated = Tracked(Operator("bernoulli", "l1", "linear"), redraw=True).run(coins)
    assert estimated == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("operator", "redraw"),
    [
        (Operator("bernoulli", "none", "linear"), False),
        (Operator("bernoulli", "expected", "linear"), False),
        (Operator("bernoulli", "l1", "linear"), False),
        (Operator("top", "none", "linear"), True),
        (Operator("top", "l1", "linear"), False),
        (Operator("none", "none", "linear"), True),
    ],
)
def test_drift_of_fixed_masks_is_exact(operator: Operator, redraw: bool) -> None:
    exact, estimated = Tracked(operator, redraw).run(coins)
    assert estimated == pytest.approx(exact, rel=1e-6)


VOTES = [
    (Operator("bernoulli", "none", "sign"), True),
    (Operator("bernoulli", "expected", "sign"), True),
    (Operator("bernoulli", "none", "sign"), False),
    (Operator("top", "none", "sign"), True),
    (Operator("top", "none", "sign"), False),
    (Operator("none", "none", "sign"), True),
    (Operator("top", "none", "sign_unweighted"), False),
]


@pytest.mark.parametrize(("operator", "redraw"), VOTES)
@pytest.mark.parametrize("updates", [coins, persistent])
def test_a_vote_makes_it_an_upper_bound_that_is_never_far_off(
    operator: Operator, redraw: bool, updates: Updates
) -> None:
    tracked = Tracked(operator, redraw)
    exact, estimated = tracked.run(updates)
    survived = tracked.found.survived
    if operator.consensus == "sign":
        assert 0.4 < survived < 0.95  # the vote matters
    # The share that survives moves a little between measurements, and masks are random.
    assert exact < 1.02 * estimated
    assert exact > 0.97 * math.sqrt(survived) * estimated


@pytest.mark.parametrize(("operator", "redraw"), [row for row in VOTES if row[0].sparsify != "bernoulli"])
def test_the_bound_is_reached_where_votes_stay_as_they_are(operator: Operator, redraw: bool) -> None:
    tracked = Tracked(operator, redraw)
    tracked.alpha_of = lambda step: 1e-3
    exact, estimated = tracked.run(persistent)
    assert exact == pytest.approx(estimated, rel=1e-6)


def test_parameters_that_are_left_out_count_by_their_share() -> None:
    tracked = Tracked(Operator("bernoulli", "none", "linear"), redraw=True)
    for step in range(1, STEPS + 1):
        tracked.step(step, coins, names=("a", "b") if step % 2 else ("a",))
    everything, _ = Tracked(Operator("bernoulli", "none", "linear"), redraw=True).run(coins)
    assert tracked.exact() < everything
    assert tracked.exact() / 1.02 < drift(tracked.groups) < everything * 1.02


def test_drift_goes_on_where_it_was_saved() -> None:
    whole, halves = (Tracked(Operator("top", "none", "sign"), redraw=True) for _ in range(2))
    whole.run(coins)
    halves.run(coins, STEPS // 2)
    saved = [
        {key: value for key, value in group.items() if key.startswith("merge_")} for group in halves.groups
    ]
    assert all(type(value) in (int, float) for value in saved[0].values())
    resumed = Tracked(halves.operator, redraw=True)
    resumed.groups = saved
    for step in range(STEPS // 2 + 1, STEPS + 1):
        resumed.step(step, coins)
    assert resumed.groups == whole.groups


def test_a_merge_weight_of_zero_and_numbers_that_are_none_do_not_spoil_it() -> None:
    tracked = Tracked(Operator("top", "none", "sign"), redraw=True, every=1)
    tracked.run(coins, 10)
    tracked.step(11, lambda step, name: coins(step, name) * math.nan)
    assert math.isnan(tracked.found.update)
    assert all(math.isfinite(value) for value in tracked.groups[0].values())
    before = dict(tracked.groups[0])
    meter, groups = tracked.meter, tracked.groups
    meter.begin(groups, 12)
    meter.merges(0, 0.0, 0.4)
    one, tau = coins(12, "a"), tracked.tau["a"]
    row = measure(one, one, one, tau, [one, 0 * tau], torch.float32)
    meter.add([0], row.unsqueeze(0), [squared_norm(tau)])
    far = drift(groups)
    found = meter.end(groups)
    assert (found.delta, found.drift) == (0, far)
    assert math.isnan(found.cosine)
    assert groups[0]["merge_surviving"] == before["merge_surviving"]


def one_row(update: list[float], kept: list[float], tau: list[float], alpha: float) -> Tensor:
    x, f, t = (torch.tensor(v, dtype=torch.float64) for v in (update, kept, tau))
    return measure(torch.zeros(len(update)).double(), x, f, t, [(1 - alpha) * f, alpha * t], torch.float64)


def test_what_one_merge_of_two_groups_looks_like() -> None:
    """By hand: norms, angle, conflicts, and both groups together."""
    meter = DiagnosticsMeter(Operator("bernoulli"), redraw=True)
    groups: list[dict[str, Any]] = [{}, {}]
    meter.begin(groups, 1)
    meter.merges(0, 0.1, 0.5)
    meter.merges(1, 0.2, 0.5)
    first = one_row([3.0, 4.0, 0.0], [3.0, 0.0, 0.0], [-2.0, 5.0, 1.0], 0.1)
    second = one_row([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], 0.2)
    meter.add([0, 1], torch.stack([first, second]), [40.0, 2.0])
    meter.add([1], one_row([2.0], [2.0], [-1.0], 0.2).unsqueeze(0), [1.0])
    found = meter.end(groups)
    one, other = found.groups
    assert (one.update, one.kept_update, one.delta) == pytest.approx((5, 3, 0.1 * math.sqrt(30)))
    assert one.cosine == pytest.approx(-6 / (3 * math.sqrt(30)))
    assert (one.conflicts, other.conflicts, found.conflicts) == pytest.approx((1, 1 / 3, 1 / 2))
    assert other.cosine == pytest.approx(0.0)
    assert found.update == pytest.approx(math.sqrt(25 + 6))
    assert found.delta == pytest.approx(math.sqrt(0.3 + 0.12))
    lengths = math.sqrt(0.81 * 9 + 0.64 * 6) * math.sqrt(0.3 + 0.12)
    assert found.cosine == pytest.approx(-0.09 * 6 / lengths)
    assert (found.survived, found.arrived_delta, found.arrived_update) == pytest.approx((1, 1, 1))
    far = [math.sqrt((a * 0.5) ** 2 + a * a * 0.25) for a in (0.1, 0.2)]
    assert (one.drift, other.drift) == pytest.approx(far)
    assert found.drift == pytest.approx(math.sqrt((far[0] ** 2 * 40 + far[1] ** 2 * 3) / 43))
    assert found.arrival.delta == found.arrived_delta


def measured_steps(every: int, gaps: list[int], count: int) -> list[list[int]]:
    """At which steps each of several groups, which merge every ``gaps[i]`` steps, is measured."""
    meter = DiagnosticsMeter(Operator("none"), redraw=True, every=every)
    groups: list[dict[str, Any]] = [{} for _ in gaps]
    row = one_row([1.0], [1.0], [1.0], 0.1).unsqueeze(0)
    seen: list[list[int]] = [[] for _ in gaps]
    for step in range(1, count + 1):
        meter.begin(groups, step)
        for i, gap in enumerate(gaps):
            if step % gap == 0:
                meter.merges(i, 0.1, 1.0)
                if meter.wants(i):
                    meter.add([i], row, [1.0])
        found = meter.end(groups)
        now = [i for i, group in enumerate(groups) if group["merge_measured"] == step]
        assert (found is not None) == bool(now)
        for i in now:
            seen[i].append(found.groups[i].step)
    return seen


def test_each_group_is_measured_at_its_interval_and_at_its_merges() -> None:
    assert measured_steps(5, [1, 3], 12) == [[1, 6, 11], [3, 9]]
    assert measured_steps(1, [1, 5], 10) == [list(range(1, 11)), [5, 10]]
    assert measured_steps(0, [1], 5) == [[]]


def test_groups_that_merge_in_parts_and_parameters_in_rows_add_up() -> None:
    """One group's parameters in one call or in several: the same diagnostics, and the same drift."""
    generator = torch.Generator().manual_seed(8)
    drawn = [torch.randn(2, 300, generator=generator, dtype=torch.float64).tolist() for _ in range(3)]
    rows = [one_row(update, update, tau, 0.3) for update, tau in drawn]
    squares = [sum(x * x for x in tau) for _, tau in drawn]
    results, states = [], []
    for together in (True, False):
        meter, groups = DiagnosticsMeter(Operator("none"), redraw=True), list[dict[str, Any]]([{}])
        meter.begin(groups, 1)
        if together:
            meter.merges(0, 0.3, 1.0)
            meter.add([0, 0, 0], torch.stack(rows), squares)
        else:
            for row, square in zip(rows, squares, strict=True):
                meter.merges(0, 0.3, 1.0, share=1 / 3)
                meter.add([0], row.unsqueeze(0), [square])
        results.append(meter.end(groups))
        states.append(groups[0])
    for field in ("update", "kept_update", "delta", "cosine", "conflicts", "arrived_delta", "drift"):
        assert getattr(results[1], field) == pytest.approx(getattr(results[0], field), rel=1e-12), field
    assert states[0] == pytest.approx(states[1], rel=1e-12)
    assert results[0].drift == pytest.approx(0.3)


def test_a_step_that_is_opened_again_counts_once_and_one_that_is_repeated_too() -> None:
    meter, groups = DiagnosticsMeter(Operator("none"), redraw=True), list[dict[str, Any]]([{"merge_step": 0}])

    def merge(step: int, share: float) -> None:
        meter.begin(groups, step)
        meter.merges(0, 0.1, 1.0, share)
        meter.end(groups)

    merge(1, 1.0)
    saved = dict(groups[0])
    for _ in range(4):
        merge(2, 0.25)
    assert groups[0]["merge_drift_along"] == pytest.approx(0.2)
    groups[:] = [saved]  # back to an earlier state, as load_state_dict does
    merge(2, 1.0)
    assert groups[0]["merge_drift_along"] == pytest.approx(0.2)
    groups[0]["merge_step"] = 2
    assert meter.begin(groups, 3)
    assert not meter.begin(groups, 2)


# -- in the optimizers


def linear_layers(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(120, 90), torch.nn.Linear(90, 60)).double()


def set_grads(model: torch.nn.Module, step: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


Build = Callable[[torch.nn.Module, ReferenceDelta], Any]
COMMON: dict[str, Any] = {"merge_weight": 3e-3, "reserve_rate": 0.3, "measure_every": 4}
BUILDS: dict[str, Build] = {
    "ondare": lambda m, d: OnDARE(m.named_parameters(), d, lr=1e-3, **COMMON),
    "ondare released": lambda m, d: OnDARE(m.named_parameters(), d, lr=1e-3, fidelity="released", **COMMON),
    "onties": lambda m, d: OnTIES(m.named_parameters(), d, lr=1e-3, **COMMON),
    "onties of 3 steps": lambda m, d: OnTIES(m.named_parameters(), d, lr=1e-3, merge_every=3, **COMMON),
    "around sgd": lambda m, d: OnlineMerging(
        torch.optim.SGD(m.named_parameters(), lr=0.1), d, sparsify="top", consensus="linear", **COMMON
    ),
    "around sgd of 4 steps": lambda m, d: OnlineMerging(
        torch.optim.SGD(m.named_parameters(), lr=0.1), d, merge_every=4, rescale="expected", **COMMON
    ),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_the_drift_of_an_optimizer_is_how_far_it_went(kind: str) -> None:
    """Without gradients all that moves is α·F(τ). What is pending at the end is merged, after a resume."""
    model, base = linear_layers(1), linear_layers(0)
    delta = ReferenceDelta.between(reference=model, base=base)
    start, tau = flat(model), flat(model) - flat(base)
    optimizer = BUILDS[kind](model, delta)
    for step in range(1, 12):
        if step == 7:
            saved = optimizer.state_dict()
            optimizer = BUILDS[kind](model, delta)
            optimizer.load_state_dict(saved)
        set_grads(model, step, 0.0)
        optimizer.step()
    optimizer.merge_now()
    exact = float((flat(model) - start).norm() / tau.norm())
    random = ("dare" in kind and "released" not in kind) or kind == "around sgd of 4 steps"
    assert drift(optimizer.param_groups) == pytest.approx(exact, rel=0.02 if random else 1e-6)
    assert optimizer.diagnostics.step == (9 if "3 steps" in kind else 8 if "4 steps" in kind else 9)


def test_diagnostics_of_a_step_are_those_of_its_vectors() -> None:
    """Around SGD without F: Δ = −lr·g and F(τ) = τ, so that everything can be worked out beside it."""
    model, base = linear_layers(1), linear_layers(0)
    delta = ReferenceDelta.between(reference=model, base=base)
    tau = flat(model) - flat(base)
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "merge_weight": 0.25}, {"params": named[1:], "merge_weight": 0.5}]
    sgd = torch.optim.SGD(groups, lr=0.1)
    optimizer = OnlineMerging(sgd, delta, sparsify="none", consensus="sign", reserve_rate=1.0)
    set_grads(model, 1, 0.3)
    update = torch.cat([-0.1 * p.grad.reshape(-1) for p in model.parameters()])
    optimizer.step()
    cut = named[0][1].numel()
    alpha = torch.full_like(tau, 0.5)
    alpha[:cut] = 0.25
    one, other = (1 - alpha) * update, alpha * tau
    found = optimizer.diagnostics
    assert found.update == found.kept_update == pytest.approx(float(update.norm()))
    assert found.delta == pytest.approx(float(other.norm()))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)))
    assert found.conflicts == pytest.approx(float((one * other < 0).double().mean()))
    wins = (one + other).sign() == other.sign()
    assert found.survived == pytest.approx(float((other[wins].norm() / other.norm()) ** 2))
    assert [one.update for one in found.groups] == pytest.approx(
        [float(update[:cut].norm()), float(update[cut:].norm())]
    )
    assert found.arrived_delta > 0.999
    assert found.drift == pytest.approx(float(other[wins].norm() / tau.norm()))


def test_the_measuring_steps_are_the_same_after_a_resume() -> None:
    model, base = linear_layers(1), linear_layers(0)
    delta = ReferenceDelta.between(reference=model, base=base)
    optimizer, steps = BUILDS["onties"](model, delta), []
    for step in range(1, 15):
        if step == 7:
            saved = optimizer.state_dict()
            optimizer = BUILDS["onties"](model, delta)
            optimizer.load_state_dict(saved)
            assert optimizer.diagnostics is None
        set_grads(model, step, 1.0)
        optimizer.step()
        steps.append(optimizer.diagnostics.step if optimizer.diagnostics else None)
    assert steps == [1, 1, 1, 1, 5, 5, None, None, 9, 9, 9, 9, 13, 13]


def test_only_merges_that_are_due_cost_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that never merges (α = 0 and no F) has nothing to measure, and stays due for ever."""
    model, base = linear_layers(1), linear_layers(0)
    delta = ReferenceDelta.between(reference=model, base=base)
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "merge_weight": 0.0, "reserve_rate": 1.0}]
    optimizer = OnDARE(groups, delta, lr=1e-3, **COMMON)
    measured: list[int] = []
    monkeypatch.setattr(
        "trimtab.ops.kernels.torch_engine.measure", lambda *a: measured.append(step) or measure(*a)
    )
    for step in range(1, 11):
        set_grads(model, step, 1.0)
        optimizer.step()
    assert measured == [1, 1, 5, 5, 9, 9]
    assert optimizer.diagnostics.groups[1] is None
    assert optimizer.diagnostics.groups[0].update == optimizer.diagnostics.update
    assert drift(optimizer.param_groups) == drift(optimizer.param_groups[:1]) > 0


@pytest.mark.parametrize("kind", BUILDS)
def test_measuring_changes_nothing_whatever_engine_steps(kind: str) -> None:
    """On the engine that is chosen here, tensors large enough that only a sample of them is measured."""
    results = []
    for every in (1, 0):
        models = []
        for seed in (1, 0):
            torch.manual_seed(seed)
            models.append(torch.nn.Linear(260, 150))
        delta = ReferenceDelta.between(reference=models[0], base=models[1])
        optimizer = BUILDS[kind](models[0], delta)
        optimizer._meter.every = every
        for step in range(1, 5):
            generator = torch.Generator().manual_seed(step)
            for p in models[0].parameters():  # coarse gradients: top has ties to decide
                p.grad = (torch.randn(p.shape, generator=generator) * 4).round() / 4
            optimizer.step()
        results.append(flat(models[0]))
        assert (optimizer.diagnostics is None) == (every == 0)
    assert torch.equal(*results)
