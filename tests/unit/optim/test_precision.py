"""Parameters below fp32, rounding helps, and the share that arrives."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from tests.unit.optim.conftest import flat, small_model, take_step
from tests.unit.optim.test_shell import around_adamw, around_sgd, ondare, onties
from trimtab import ReferenceDelta
from trimtab.ops import join_master
from trimtab.optim import PrecisionWarning
from trimtab.optim.precision import residual_bits

MAKERS = [ondare, onties, around_sgd, around_adamw]
every_optimizer = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@pytest.fixture
def low():
    """A bf16 policy, the same in fp32, and their delta."""
    policy = small_model(1, torch.bfloat16)
    delta = ReferenceDelta.between(reference=policy, base=small_model(0, torch.bfloat16))
    return policy, copy.deepcopy(policy).float(), delta


@every_optimizer
@pytest.mark.parametrize("gap", [1, 3])
def test_bf16_with_residual_is_the_fp32_run_bit_for_bit(make, gap, low):
    policy, wide, delta = low
    settings = {"merge_every": gap, "weight_decay": 0.1, "lr": 1e-5, "merge_weight": 1e-6}
    optimizer, wide_optimizer = make(policy, delta, **settings), make(wide, delta, **settings)
    for t in range(11):
        take_step(policy, optimizer, t)
        take_step(wide, wide_optimizer, t)
        if t == 5:  # through a checkpoint in the middle of an interval
            again = make(policy, delta, **settings)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = again
    for p, q in zip(policy.parameters(), wide.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.bfloat16
        residual = residual_bits(p, optimizer.state[p]["merge_residual"])
        assert torch.equal(join_master(p.detach(), residual), q.detach())
        assert torch.equal(p.detach().float(), q.detach().to(torch.bfloat16).float())


@every_optimizer
def test_a_small_learning_rate_moves_bf16_weights_only_with_help(make, low):
    policy, wide, delta = low
    settings = {"lr": 5e-5, "merge_weight": 0.0, "reserve_rate": 1.0, "measure_every": 0}
    moved = {}
    for rounding in ("nearest", "residual", "stochastic"):
        model = copy.deepcopy(policy)
        optimizer = make(model, delta, rounding=rounding, **settings, force_merge=True)
        for _ in range(200):
            take_step(model, optimizer, 0)
        moved[rounding] = flat(model) - flat(policy)
    reference = make(wide, delta, **settings)
    for _ in range(200):
        take_step(wide, reference, 0)
    wanted = flat(wide) - flat(policy)
    along = {k: float(v @ wanted / (wanted @ wanted)) for k, v in moved.items()}
    assert along["nearest"] < 0.7
    assert abs(along["residual"] - 1) < 0.2
    assert abs(along["stochastic"] - 1) < 0.5


@every_optimizer
def test_stochastic_rounding_repeats_with_its_seed(make, low):
    policy, _, delta = low
    runs = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(policy)
        optimizer = make(model, delta, rounding="stochastic", seed=seed)
        for t in range(5):
            take_step(model, optimizer, t)
        runs.append(flat(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_fp32_loses_a_small_delta_and_says_so(policy, delta):
    optimizer = ondare(policy, delta, lr=1e-30, merge_weight=1e-9)
    with pytest.warns(PrecisionWarning, match="lost to rounding"):
        take_step(policy, optimizer, 0)
    assert optimizer.arrival.delta < 0.5
    assert optimizer.arrival.step == 1


@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
def test_rounding_helps_bring_a_small_delta_home_at_fp32(rounding, policy, delta):
    tau = torch.cat([delta.tensor(n).flatten() for n, _ in policy.named_parameters()]).to(torch.float64)
    moved = {}
    for mode in ("nearest", rounding):
        model = copy.deepcopy(policy)
        optimizer = ondare(
            model, delta, lr=1e-30, merge_weight=1e-9, reserve_rate=1.0, rounding=mode, measure_every=0
        )
        for t in range(400):
            take_step(model, optimizer, t)
        moved[mode] = float((flat(model) - flat(policy)) @ tau / (tau @ tau)) / (400 * 1e-9)
    assert moved["nearest"] < 0.5
    assert abs(moved[rounding] - 1) < 0.15


def test_the_arriving_share_is_measured_at_its_interval_and_at_merges(policy, delta):
    optimizer = ondare(policy, delta, merge_every=3, measure_every=5)
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(12):
            take_step(policy, optimizer, t)
            steps.append(optimizer.arrival.step if optimizer.arrival else None)
    assert steps == [None, None, 3, 3, 3, 3, 3, 3, 9, 9, 9, 9]
    assert optimizer.arrival.delta > 0.99
    assert optimizer.arrival.update > 0.99


def test_measuring_changes_nothing(policy, delta):
    other = copy.deepcopy(policy)
    measured, silent = onties(policy, delta, measure_every=1), onties(other, delta, measure_every=0)
    for t in range(5):
        take_step(policy, measured, t)
        take_step(other, silent, t)
    assert torch.equal(flat(policy), flat(other))
    assert silent.arrival is None


def test_a_failing_step_gives_the_parameters_back(low):
    policy, _, delta = low
    optimizer = around_adamw(policy, delta)

    def fails(*_):
        raise RuntimeError("out of memory")

    optimizer.optimizer.register_step_pre_hook(fails)
    before = flat(policy)
    with pytest.raises(RuntimeError, match="out of memory"):
        take_step(policy, optimizer, 0)
    assert all(p.dtype == torch.bfloat16 for p in policy.parameters())
    assert torch.equal(flat(policy), before)
