"""OnDARE, OnTIES and OnlineMerging as torch optimizers: groups, state, schedules, refusals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import trimtab
from tests.unit.optim.conftest import flat, small_model, take_step
from trimtab import OnDARE, OnlineMerging, OnTIES, UserError
from trimtab.errors import IncompatibleState
from trimtab.ops import top_count

SETTINGS = {"reserve_rate": 0.5, "merge_weight": 1e-3}


def ondare(model, delta, **kw):
    return OnDARE(model.named_parameters(), delta, **{"lr": 1e-2, **SETTINGS, **kw})


def onties(model, delta, **kw):
    return OnTIES(model.named_parameters(), delta, **{"lr": 1e-2, **SETTINGS, **kw})


def around_sgd(model, delta, *, lr=1e-2, weight_decay=0.0, **kw):
    inner = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    return OnlineMerging(inner, delta, **{**SETTINGS, **kw})


def around_adamw(model, delta, *, lr=1e-2, weight_decay=0.0, **kw):
    inner = torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=weight_decay)
    return OnlineMerging(inner, delta, **{**SETTINGS, **kw})


def around_adafactor(model, delta, *, lr=1e-2, weight_decay=0.0, **kw):
    inner = torch.optim.Adafactor(model.named_parameters(), lr=lr, weight_decay=weight_decay)
    return OnlineMerging(inner, delta, **{**SETTINGS, **kw})


MAKERS = [ondare, onties, around_sgd, around_adamw, around_adafactor]
every_optimizer = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
every_gap = pytest.mark.parametrize("gap", [1, 3])


@every_optimizer
@every_gap
def test_saved_and_loaded_in_the_middle_equals_going_on(make, gap, policy, delta):
    optimizer = make(policy, delta, merge_every=gap, weight_decay=0.1)
    for t in range(4):
        take_step(policy, optimizer, t)
    file = io.BytesIO()
    torch.save({"model": policy.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small_model(5)
    other.load_state_dict(saved["model"])
    resumed = make(other, delta, merge_every=gap, weight_decay=0.1)
    resumed.load_state_dict(saved["optimizer"])
    for t in range(4, 9):
        take_step(policy, optimizer, t)
        take_step(other, resumed, t)
    assert torch.equal(flat(policy), flat(other))


@every_optimizer
@every_gap
def test_resume_through_distributed_checkpoint_and_its_phantom_step(make, gap, policy, delta):
    optimizer = make(policy, delta, merge_every=gap)
    for t in range(4):
        take_step(policy, optimizer, t)
    saved = copy.deepcopy(get_optimizer_state_dict(policy, optimizer))
    other = small_model(5)
    other.load_state_dict(policy.state_dict())
    before = flat(other)
    resumed = make(other, delta, merge_every=gap)
    set_optimizer_state_dict(other, resumed, saved)
    assert torch.equal(flat(other), before), "the loader's phantom step moved weights"
    for t in range(4, 9):
        take_step(policy, optimizer, t)
        take_step(other, resumed, t)
    assert torch.equal(flat(policy), flat(other))


@every_optimizer
@every_gap
def test_zero_learning_rate_moves_nothing(make, gap, policy, delta):
    optimizer = make(policy, delta, merge_every=gap, weight_decay=0.1)
    for t in range(gap - 1):
        take_step(policy, optimizer, t)
    before = flat(policy)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for t in range(4):
        take_step(policy, optimizer, 10 + t)
    assert torch.equal(flat(policy), before)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    take_step(policy, optimizer, 20)
    assert optimizer.pending() == 0, "the merge that fell due waits for the first step that may move"


@every_optimizer
def test_tau_is_never_in_the_state(make, policy, delta):
    optimizer = make(policy, delta)
    take_step(policy, optimizer, 0)
    taus = [delta.tensor(name) for name in delta.names()]
    for state in optimizer.state_dict()["state"].values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                assert not any(value.shape == tau.shape and torch.equal(value, tau) for tau in taus)


@every_optimizer
def test_a_deep_copy_goes_on_by_itself(make, policy, delta):
    optimizer = make(policy, delta)
    take_step(policy, optimizer, 0)
    twin_policy, twin = copy.deepcopy((policy, optimizer))
    take_step(policy, optimizer, 1)
    assert not torch.equal(flat(policy), flat(twin_policy))
    take_step(twin_policy, twin, 1)
    assert torch.equal(flat(policy), flat(twin_policy))


@every_optimizer
def test_frozen_and_gradless_parameters_are_untouched(make, policy, delta):
    policy[0].bias.requires_grad_(False)
    optimizer = make(policy, delta, weight_decay=0.1)
    frozen, gradless = policy[0].bias.clone(), policy[2].weight.clone()
    policy(torch.ones(7)).sum().backward()
    policy[2].weight.grad = None
    optimizer.step()
    assert torch.equal(policy[0].bias, frozen)
    assert torch.equal(policy[2].weight, gradless)
    assert not torch.equal(policy[0].weight, small_model(1)[0].weight)


@every_optimizer
def test_a_parameter_frozen_with_its_gradient_still_there_is_untouched(make, policy, delta):
    optimizer = make(policy, delta, reserve_rate=1.0)
    policy(torch.ones(7)).sum().backward()
    policy[2].weight.requires_grad_(False)
    before, grad = policy[2].weight.clone(), policy[2].weight.grad
    optimizer.step()
    assert torch.equal(policy[2].weight, before)
    assert policy[2].weight.grad is grad
    assert not torch.equal(policy[0].weight, small_model(1)[0].weight)


@every_optimizer
def test_closure_is_evaluated_with_gradients_and_its_loss_returned(make, policy, delta):
    optimizer = make(policy, delta)

    def closure():
        optimizer.zero_grad()
        loss = policy(torch.ones(7)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first


@every_optimizer
def test_learning_rate_schedulers_and_gradient_scaling_take_it(make, policy, delta):
    optimizer = make(policy, delta)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(policy(torch.ones(7)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3


@every_optimizer
def test_merge_weight_follows_a_schedule_that_survives_a_resume(make, policy, delta):
    def warm(t):
        return 1e-3 * t

    optimizer = trimtab.schedule(make(policy, delta), "merge_weight", warm)
    used = []
    for t in range(3):
        take_step(policy, optimizer, t)
        used.append(optimizer.param_groups[0]["merge_weight"])
    assert used == [0.0, 1e-3, 2e-3]
    resumed = make(policy, delta)
    resumed.load_state_dict(optimizer.state_dict())
    trimtab.schedule(resumed, "merge_weight", warm)
    assert resumed.param_groups[0]["merge_weight"] == 3e-3


def test_schedule_refuses_what_it_cannot_do(policy, delta):
    optimizer = ondare(policy, delta)
    with pytest.raises(UserError, match="did you mean 'merge_weight'"):
        trimtab.schedule(optimizer, "merge_wait", lambda t: 0.1)
    with pytest.raises(UserError, match=r"merge_weight must be in \[0, 1\], got 2"):
        trimtab.schedule(optimizer, "merge_weight", lambda t: 2)
    with pytest.raises(UserError, match="schedule needs OnDARE"):
        trimtab.schedule(torch.optim.AdamW(policy.parameters()), "merge_weight", lambda t: 0.1)
    with pytest.raises(UserError, match="group 3 does not exist"):
        trimtab.schedule(optimizer, "merge_weight", lambda t: 0.1, group=3)


@every_optimizer
@pytest.mark.parametrize(
    ("change", "named"),
    [({"merge_every": 4}, "merge_every=2"), ({"seed": 9}, "seed=0")],
)
def test_a_state_of_another_merge_is_refused(make, change, named, policy, delta):
    optimizer = make(policy, delta, merge_every=2)
    take_step(policy, optimizer, 0)
    other = make(policy, delta, **{"merge_every": 2, **change})
    with pytest.raises(IncompatibleState, match=named):
        other.load_state_dict(optimizer.state_dict())


def test_a_state_with_another_delta_or_of_plain_adamw_is_refused(policy, delta):
    optimizer = ondare(policy, delta)
    other = trimtab.ReferenceDelta.between(reference=small_model(1), base=small_model(2))
    with pytest.raises(IncompatibleState, match="tau="):
        ondare(policy, other).load_state_dict(optimizer.state_dict())
    plain = torch.optim.AdamW(policy.named_parameters())
    with pytest.raises(IncompatibleState, match="not written by an online merging optimizer"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"fidelity": "paper"}, {"fidelity": "mergekit"}, "counting=ceil"),
        ({"fidelity": "released"}, {"consensus": "sign_unweighted", "redraw": False}, "clamp=1.0"),
    ],
)
def test_a_state_of_another_fidelity_is_refused(one, other, named, policy, delta):
    with pytest.raises(IncompatibleState, match=named):
        onties(policy, delta, **other).load_state_dict(onties(policy, delta, **one).state_dict())


@pytest.mark.parametrize(
    "kind", [OnDARE, lambda named, delta: OnlineMerging(torch.optim.SGD(named, 0.1), delta)]
)
def test_a_state_whose_parameters_come_in_another_order_is_refused(kind):
    def model(seed):
        torch.manual_seed(seed)
        return torch.nn.ParameterDict({"a": torch.randn(2, 2), "b": torch.randn(2, 2)})

    policy = model(1)
    delta = trimtab.ReferenceDelta.between(reference=model(1), base=model(0))
    there = list(policy.named_parameters())
    with pytest.raises(IncompatibleState, match="'a' at place 0, where this optimizer has 'b'"):
        kind(there[::-1], delta).load_state_dict(kind(there, delta).state_dict())


@every_optimizer
def test_a_policy_that_is_not_the_reference_is_refused_at_the_first_step(make, delta):
    other = small_model(3)
    with pytest.raises(UserError, match="4 of 4 parameters"):
        take_step(other, make(other, delta), 0)
    assert torch.equal(flat(other), flat(small_model(3)))
    take_step(other, make(other, delta, policy_differs=True), 0)
    assert not torch.equal(flat(other), flat(small_model(3)))


@every_optimizer
def test_parameters_without_delta_must_be_named(make, policy, delta):
    policy.add_module("head", torch.nn.Linear(3, 1))
    with pytest.raises(
        UserError, match=r"2 trained parameters have no reference delta \(head.weight, head.bias\)"
    ):
        take_step(policy, make(policy, delta), 0)
    with pytest.raises(UserError, match="'haed' matches no parameter"):
        take_step(policy, make(policy, delta, without_delta=["haed"]), 0)
    before = policy.head.weight.clone()
    take_step(policy, make(policy, delta, without_delta=[r"^head\."]), 0)
    assert not torch.equal(policy.head.weight, before)


@every_optimizer
def test_one_pattern_is_one_pattern_and_not_its_letters(make, policy, delta):
    policy.add_module("head", torch.nn.Linear(3, 1))
    with pytest.raises(UserError, match=r"have no reference delta \(head.bias\)"):
        take_step(policy, make(policy, delta, without_delta="head.weight"), 0)
    take_step(policy, make(policy, delta, without_delta="head"), 0)


@every_optimizer
def test_a_pattern_for_parameters_that_have_a_delta_is_refused(make, policy, delta):
    with pytest.raises(UserError, match="matches only parameters that have a reference delta"):
        take_step(policy, make(policy, delta, without_delta="bias"), 0)


def test_shapes_that_differ_are_refused(delta):
    other = torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with pytest.raises(
        UserError, match=r"3 parameters differ in shape .*0.weight is \(8, 7\), its delta \(9, 7\)"
    ):
        take_step(other, ondare(other, delta), 0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"reserve_rate": 0.0}, r"reserve_rate must be in \(0, 1\], got 0.0"),
        ({"merge_weight": -0.1}, r"merge_weight must be in \[0, 1\], got -0.1"),
        ({"merge_every": 0}, "merge_every must be an integer ≥ 1, got 0"),
        ({"rounding": "stocastic"}, "did you mean 'stochastic'"),
        ({"seed": -1}, r"seed must be a whole number in \[0, 2\^64\), got -1"),
        ({"without_delta": ["("]}, r"without_delta pattern '\(' is no regular expression"),
    ],
)
@every_optimizer
def test_arguments_out_of_range_are_refused(make, argument, message, policy, delta):
    with pytest.raises(UserError, match=message):
        make(policy, delta, **argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"fidelity": "papr"}, "did you mean 'paper'"),
        ({"lr": -1.0}, "lr must be ≥ 0"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be ≥ 0"),
    ],
)
def test_adamw_arguments_out_of_range_are_refused(argument, message, policy, delta):
    with pytest.raises(UserError, match=message):
        ondare(policy, delta, **argument)


def test_unnamed_parameters_are_refused(policy, delta):
    with pytest.raises(UserError, match=r"pass model.named_parameters\(\)"):
        OnDARE(policy.parameters(), delta)
    with pytest.raises(UserError, match=r"pass model.named_parameters\(\)"):
        OnlineMerging(torch.optim.SGD(policy.parameters(), lr=0.1), delta)


def test_wrapping_something_else_is_refused(policy, delta):
    with pytest.raises(UserError, match=r"wraps a torch.optim.Optimizer, got Sequential"):
        OnlineMerging(policy, delta)
    with pytest.raises(UserError, match="merges already"):
        OnlineMerging(ondare(policy, delta), delta)
    inner = torch.optim.SGD(policy.named_parameters(), lr=0.1)
    wrapper = OnlineMerging(inner, delta)
    with pytest.raises(UserError, match="this SGD is wrapped in OnlineMerging already"):
        OnlineMerging(inner, delta)
    assert wrapper.optimizer is inner


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(5, 3, sparse=True)
    delta = trimtab.ReferenceDelta.between(reference=table, base=torch.nn.Embedding(5, 3))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match="weight has a sparse gradient"):
        ondare(table, delta).step()


@every_optimizer
def test_groups_have_their_own_settings(make, policy, delta):
    merged, plain = [("0.weight", policy[0].weight)], [("2.weight", policy[2].weight)]
    groups = [
        {"params": merged, "merge_weight": 1.0, "reserve_rate": 1.0},
        {"params": plain, "merge_weight": 0.0, "reserve_rate": 1.0},
    ]
    optimizer = _with_groups(make, groups, delta)
    start = policy[0].weight.detach().clone()
    take_step(policy, optimizer, 0)
    tau = delta.tensor("0.weight")
    assert torch.equal(policy[0].weight, start + tau), "α = 1, p = 1 moves by τ"


def _with_groups(make, groups, delta):
    class Grouped:
        @staticmethod
        def named_parameters():
            return groups

    return make(Grouped(), delta)


@every_optimizer
def test_a_group_added_later_joins(make, policy, delta):
    optimizer = _with_groups(make, [{"params": [("0.weight", policy[0].weight)]}], delta)
    optimizer.add_param_group({"params": [("2.weight", policy[2].weight)], "merge_weight": 0.5})
    assert [group["merge_weight"] for group in optimizer.param_groups] == [1e-3, 0.5]
    take_step(policy, optimizer, 0)
    assert not torch.equal(policy[2].weight, small_model(1)[2].weight)


def test_merge_now_merges_what_is_pending(policy, delta):
    for make in (ondare, around_sgd):
        model = copy.deepcopy(policy)
        optimizer = make(model, delta, merge_every=5)
        for t in range(3):
            take_step(model, optimizer, t)
        before = flat(model)
        assert optimizer.pending() == 4
        assert optimizer.merge_now() == 4
        assert optimizer.pending() == 0
        assert not torch.equal(flat(model), before)
        assert optimizer.merge_now() == 0


def test_merge_weight_follows_lr_when_asked(policy, delta):
    tau = torch.cat([delta.tensor(n).flatten() for n, _ in policy.named_parameters()]).to(torch.float64)
    optimizer = ondare(
        policy, delta, merge_weight=0.5, reserve_rate=1.0, merge_weight_follows_lr=True, lr=1e-2
    )
    start = flat(policy)
    optimizer.param_groups[0]["lr"] = 5e-3
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(flat(policy) - start, 0.25 * tau, atol=1e-7)


@pytest.mark.parametrize("make", [ondare, around_sgd])
def test_a_merge_weight_beyond_one_is_refused_in_the_step(make, policy, delta):
    optimizer = make(policy, delta, merge_weight=0.75, merge_weight_follows_lr=True)
    optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(UserError, match=r"merge_weight is 1.5 in this step .*; it must be in \[0, 1\]"):
        take_step(policy, optimizer, 0)


def test_a_step_that_gradient_scaling_skips_inside_a_fused_optimizer_merges_nothing(policy, delta):
    inner = torch.optim.AdamW(policy.named_parameters(), lr=0.1, fused=True)
    optimizer = OnlineMerging(inner, delta, sparsify="none", reserve_rate=1.0, merge_weight=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (float("inf"), 1.0):
        before = flat(policy)
        optimizer.zero_grad()
        scaler.scale(policy(torch.ones(7)).sum() * factor).backward()
        scaler.step(inner)
        scaler.update()
        assert torch.equal(flat(policy), before) == (factor != 1.0)
    assert {state["merge_count"] for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("make", [onties, lambda *args, **kw: ondare(*args, fidelity="released", **kw)])
def test_of_a_fixed_mask_only_what_it_keeps_is_held(make, policy, delta):
    optimizer = make(policy, delta, reserve_rate=0.02)
    for rate in (0.02, 0.05):  # made anew for another p
        optimizer.param_groups[0]["reserve_rate"] = rate
        take_step(policy, optimizer, 0)
        held = [slot.job.tau for slot in optimizer._slots.values()]
        assert [type(tau).__name__ for tau in held[:3]] == ["SparseTau"] * 3  # the last has three entries
        if optimizer.merging.preset.operator.sparsify == "top":
            kept = [int(tau.dense(0, tau.numel).count_nonzero()) for tau in held]
            assert kept == [top_count(tau.numel, rate) for tau in held]


@pytest.mark.parametrize("make", [ondare, around_sgd])
def test_merge_weight_cannot_follow_a_learning_rate_that_begins_at_zero(make, policy, delta):
    optimizer = make(policy, delta, lr=0.0, merge_weight_follows_lr=True)
    take_step(policy, optimizer, 0)  # and yet nothing moves, and nothing is refused
    assert torch.equal(flat(policy), flat(small_model(1)))
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(UserError, match="the first lr was 0"):
        take_step(policy, optimizer, 1)


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_an_optimizer_that_finds_its_own_learning_rate_can_be_wrapped(defaults, policy, delta):
    class OwnRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, defaults)

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)

    settings = {"sparsify": "none", "reserve_rate": 1.0, "merge_weight": 0.5}
    optimizer = OnlineMerging(OwnRate(policy.named_parameters()), delta, **settings)
    before = policy[0].weight.detach().clone()
    take_step(policy, optimizer, 0)
    expected = before - 0.05 * policy[0].weight.grad + 0.5 * delta.tensor("0.weight")
    assert torch.allclose(policy[0].weight, expected, rtol=0, atol=1e-6)


def test_state_dict_hooks_on_the_wrapper_are_the_wrapped_optimizers(policy, delta):
    optimizer = around_sgd(policy, delta)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda inner: seen.append(type(inner).__name__))
    optimizer.state_dict()
    assert seen == ["SGD"]
    with pytest.raises(AttributeError, match="no attribute 'lr'"):
        optimizer.lr  # noqa: B018
