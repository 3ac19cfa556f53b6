"""What training code does to an optimizer, without the training code: each test is one habit of some host.

The hosts themselves run in tests/examples. Where AdamW can do the same it is the standard: with α = 0 and
p = 1 a merging optimizer must come out of the host's hands as AdamW does, bit for bit.
"""

from __future__ import annotations

import collections
import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

import trimtab
from tests.unit.optim.conftest import flat, small_model, take_step
from trimtab import OnDARE, OnlineMerging, OnTIES, ReferenceDelta, UserError

LR, MERGE = 1e-2, {"reserve_rate": 0.5, "merge_weight": 1e-2}
NOTHING = {"reserve_rate": 1.0, "merge_weight": 0.0}


def ondare(model: torch.nn.Module, delta: Any, **kw: Any) -> OnDARE:
    return OnDARE(model.named_parameters(), delta, **{"lr": LR, **MERGE, **kw})


def onties(model: torch.nn.Module, delta: Any, **kw: Any) -> OnTIES:
    return OnTIES(model.named_parameters(), delta, **{"lr": LR, **MERGE, **kw})


def around_adamw(model: torch.nn.Module, delta: Any, *, lr: Any = LR, **kw: Any) -> OnlineMerging:
    inner = torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=0.0, foreach=False)
    return OnlineMerging(inner, delta, **{**MERGE, **kw})


def adamw(model: torch.nn.Module, _: Any, *, lr: Any = LR, **__: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=False)


every_optimizer = pytest.mark.parametrize(
    "make", [ondare, onties, around_adamw], ids=lambda make: make.__name__
)


def forward(model: torch.nn.Module, t: int = 0) -> torch.Tensor:
    inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(t))
    return model(inputs.to(next(model.parameters()).dtype)).square().mean()


def _over(make: Any, pairs: Any, delta: Any, **kw: Any) -> torch.optim.Optimizer:
    class Some:
        @staticmethod
        def named_parameters() -> Any:
            return pairs

    return make(Some, delta, **kw)


def by_hand(make: Any, delta: Any, steps: int = 4, **kw: Any) -> torch.Tensor:
    """The weights after some plain steps: what a host that changes nothing must come to."""
    model = small_model(1)
    optimizer = make(model, delta, **kw)
    for t in range(steps):
        optimizer.zero_grad()
        forward(model, t).backward()
        optimizer.step()
    return flat(model)


# -- closures


@every_optimizer
def test_a_closure_runs_once_a_step_with_gradients_on(make, policy, delta):
    optimizer, calls = make(policy, delta), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = forward(policy, len(calls) - 1)
        loss.backward()
        return loss

    with torch.no_grad():  # as Lightning calls it
        losses = [optimizer.step(closure) for _ in range(4)]
    assert calls == [True] * 4
    assert torch.equal(flat(policy), by_hand(make, delta))
    assert losses[0] == forward(small_model(1), 0)


@pytest.mark.parametrize("merge_every", [1, 2])
def test_an_optimizer_that_calls_its_closure_many_times_is_merged_once(merge_every, policy, delta):
    def closure_for(model, optimizer, calls):
        def closure():
            calls.append(1)
            optimizer.zero_grad()
            loss = forward(model)
            loss.backward()
            return loss

        return closure

    plain, theirs, ours = small_model(1), [], []
    inner = torch.optim.LBFGS(plain.parameters(), lr=0.1, max_iter=5)
    merged = torch.optim.LBFGS(policy.named_parameters(), lr=0.1, max_iter=5)
    settings = {"reserve_rate": 1.0, "merge_weight": 0.25, "merge_every": merge_every}
    optimizer = OnlineMerging(merged, delta, sparsify="none", **settings)
    start, tau = flat(policy), torch.cat([delta.tensor(name).double().flatten() for name in delta.names()])
    for _ in range(merge_every):
        inner.step(closure_for(plain, inner, theirs))
        optimizer.step(closure_for(policy, optimizer, ours))
    assert len(ours) == len(theirs) > 2 * merge_every
    expected = start + 0.75 * (flat(plain) - start) + 0.25 * tau
    torch.testing.assert_close(flat(policy), expected, rtol=0, atol=2e-7)
    assert (flat(plain) - start).abs().max() > 1e-2


def test_a_closure_that_raises_leaves_the_parameters_as_they_are(policy, delta):
    policy.bfloat16()
    settings = {"sparsify": "none", "policy_differs": True}
    optimizer = OnlineMerging(torch.optim.LBFGS(policy.named_parameters()), delta, **settings)
    before = flat(policy)

    def closure():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert torch.equal(flat(policy), before)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}


# -- gradients: scaled, accumulated, absent, zero


@every_optimizer
def test_scaled_gradients_come_to_the_same_and_an_overflow_is_no_step(make, policy, delta):
    optimizer = make(policy, delta)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2, growth_factor=4.0)
    scales = []
    for t in (0, None, 1, 2, 3):
        optimizer.zero_grad()
        scaler.scale(forward(policy, t or 0) * (float("inf") if t is None else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
        before = flat(policy)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(policy), before) == (t is None)
        scales.append(scaler.get_scale())
    assert scales == [16.0, 8.0, 8.0, 32.0, 32.0]
    assert torch.equal(flat(policy), by_hand(make, delta))  # powers of two change no bit
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


@every_optimizer
def test_an_overflow_in_the_first_step_leaves_nothing_behind(make, policy, delta):
    optimizer = make(policy, delta)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(forward(policy) * float("nan")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(policy), flat(small_model(1)))
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale(forward(policy, t)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(flat(policy), by_hand(make, delta))


@every_optimizer
def test_gradients_gathered_over_two_batches_are_one_step_and_one_merge(make, policy, delta):
    optimizer, twin = make(policy, delta), small_model(1)
    other = make(twin, delta)
    for t in range(0, 6, 2):
        optimizer.zero_grad(set_to_none=False)
        for part in (t, t + 1):
            (forward(policy, part) / 2).backward()
        optimizer.step()
        other.zero_grad()
        (forward(twin, t) / 2).backward()
        halves = [p.grad for p in twin.parameters()]
        twin.zero_grad()
        (forward(twin, t + 1) / 2).backward()
        for p, half in zip(twin.parameters(), halves, strict=True):
            p.grad = half + p.grad
        other.step()
    assert torch.equal(flat(policy), flat(twin))
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@every_optimizer
def test_zeroed_gradients_are_none_or_zeros(make, policy, delta):
    optimizer = make(policy, delta)
    forward(policy).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in policy.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in policy.parameters())


@every_optimizer
def test_a_step_in_which_no_parameter_has_a_gradient_moves_nothing(make, policy, delta):
    optimizer = make(policy, delta, merge_every=2)
    optimizer.step()
    assert torch.equal(flat(policy), flat(small_model(1)))
    assert not any("step" in state for state in optimizer.state.values())


@every_optimizer
def test_an_expert_that_gets_a_gradient_now_and_then_has_its_own_count(make, policy, delta):
    """A mixture of experts: the step count, and with it the mask, is the parameter's own."""
    optimizer = make(policy, delta)
    for t in range(4):
        optimizer.zero_grad()
        forward(policy, t).backward()
        if t % 2:
            policy[2].weight.grad = policy[2].bias.grad = None
        before = policy[2].weight.detach().clone()
        optimizer.step()
        assert torch.equal(policy[2].weight, before) == bool(t % 2)
    counts = {name: int(optimizer.state[p]["step"]) for name, p in policy.named_parameters()}
    assert counts == {"0.weight": 4, "0.bias": 4, "2.weight": 2, "2.bias": 2}


# -- many parameters, many optimizers


def many(seed: int, count: int) -> torch.nn.ParameterDict:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.ParameterDict({f"p{i}": torch.randn(3, generator=generator) for i in range(count)})


def give_gradients(parameters: Any, t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(("kind", "count"), [(OnDARE, 1000), (OnTIES, 100)])
def test_a_thousand_tiny_parameters_are_as_many_single_ones(kind, count):
    """One optimizer over all of them in two groups, and an optimizer for each of a few: the same bits."""
    picked = (0, 1, 77, count - 1)
    delta = ReferenceDelta.between(reference=many(1, count), base=many(0, count))
    whole, alone = many(1, count), many(1, count)
    pairs = list(whole.named_parameters())
    optimizer = kind([{"params": pairs[::2]}, {"params": pairs[1::2]}], delta, lr=LR, **MERGE)
    singles = [kind([(f"p{i}", alone[f"p{i}"])], delta, lr=LR, **MERGE) for i in picked]
    for t in range(2):
        for module in (whole, alone):
            give_gradients(module.parameters(), t)
        for each in (optimizer, *singles):
            each.step()
    assert all(torch.equal(whole[f"p{i}"], alone[f"p{i}"]) for i in picked)
    assert (flat(whole) != flat(many(1, count))).double().mean() > 0.5


@every_optimizer
def test_an_optimizer_for_each_parameter_that_steps_in_the_backward_pass(make, policy, delta):
    """Gradients are freed as soon as they are used; masks go by name, so the weights are the same."""
    each = {name: _over(make, [(name, p)], delta) for name, p in policy.named_parameters()}
    for name, p in policy.named_parameters():

        def step(p: torch.Tensor, name: str = name) -> None:
            each[name].step()
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
    for t in range(4):
        forward(policy, t).backward()
    assert torch.equal(flat(policy), by_hand(make, delta))


# -- learning rates and schedulers


@every_optimizer
def test_a_learning_rate_in_a_tensor_is_its_value(make, policy, delta):
    """Compiled and captured training steps keep lr in a tensor, which schedulers then change in place."""
    rate = torch.tensor(LR)
    optimizer = make(policy, delta, lr=rate)
    scheduler = LambdaLR(optimizer, lambda t: 0.5**t)
    other = small_model(1)
    plain = make(other, delta, lr=float(rate))
    for t in range(3):
        plain.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        take_step(policy, optimizer, t)
        take_step(other, plain, t)
        scheduler.step()
    wrapped = make is around_adamw  # torch's own AdamW rounds differently with lr in a tensor
    torch.testing.assert_close(flat(policy), flat(other), rtol=0, atol=1e-7 if wrapped else 0)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == LR / 8
    resumed = make(small_model(1), delta, lr=torch.tensor(0.3))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert float(resumed.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])


def with_scheduler(make: Any, scheduler: Any, delta: Any, **kw: Any) -> torch.Tensor:
    model = small_model(1)
    optimizer = make(model, delta, **kw)
    follows = scheduler(optimizer)
    for t in range(6):
        take_step(model, optimizer, t)
        follows.step(*([1.0] if isinstance(follows, ReduceLROnPlateau) else []))
    return flat(model)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: OneCycleLR(o, max_lr=LR, total_steps=8),  # cycles momentum: Adam's first beta
        lambda o: ReduceLROnPlateau(o, patience=1),
        lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=4),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    ],
    ids=["OneCycleLR", "ReduceLROnPlateau", "SWALR", "WarmRestarts"],
)
@pytest.mark.parametrize("make", [ondare, onties, around_adamw], ids=lambda make: make.__name__)
def test_a_scheduler_drives_it_as_it_drives_adamw(make, scheduler, delta):
    expected = with_scheduler(adamw, scheduler, delta)
    assert torch.equal(with_scheduler(make, scheduler, delta, **NOTHING), expected)
    assert not torch.equal(with_scheduler(make, scheduler, delta), expected)


# -- copies


@every_optimizer
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_pickled_optimizer_goes_on_by_itself(make, scheduled, policy, delta):
    optimizer = make(policy, delta, merge_every=2)
    if scheduled:
        LambdaLR(optimizer, lambda t: 1.0)  # wraps optimizer.step in a function of its own
    take_step(policy, optimizer, 0)
    twin_policy, twin = pickle.loads(pickle.dumps((policy, optimizer)))
    for t in (1, 2):
        take_step(policy, optimizer, t)
        take_step(twin_policy, twin, t)
    assert torch.equal(flat(policy), flat(twin_policy))


@every_optimizer
def test_a_copy_of_an_optimizer_with_a_scheduler_steps_itself_and_not_its_original(make, policy, delta):
    optimizer = make(policy, delta)
    LambdaLR(optimizer, lambda t: 1.0)
    take_step(policy, optimizer, 0)
    twin_policy, twin = copy.deepcopy((policy, optimizer))
    original, copied = flat(policy), flat(twin_policy)
    take_step(twin_policy, twin, 1)
    assert torch.equal(flat(policy), original)
    assert not torch.equal(flat(twin_policy), copied)


def test_an_averaged_model_is_beside_the_point(policy, delta):
    optimizer = ondare(policy, delta)
    average = torch.optim.swa_utils.AveragedModel(policy)
    ends = []
    for t in range(4):
        take_step(policy, optimizer, t)
        average.update_parameters(policy)
        ends.append(flat(policy))
    other = small_model(1)
    alone = ondare(other, delta)
    for t in range(4):
        take_step(other, alone, t)
    assert torch.equal(flat(policy), flat(other))
    torch.testing.assert_close(flat(average.module), torch.stack(ends).mean(0), rtol=0, atol=1e-6)


# -- groups that come later


@every_optimizer
def test_a_group_added_in_the_middle_does_not_disturb_the_others(make, policy, delta):
    first = lambda model: [(n, p) for n, p in model.named_parameters() if n.startswith("0")]  # noqa: E731
    optimizer = _over(make, first(policy), delta)
    other = small_model(1)
    alone = _over(make, first(other), delta)
    for t in range(2):
        take_step(policy, optimizer, t)
        take_step(other, alone, t)
    late = [(n, p) for n, p in policy.named_parameters() if n.startswith("2")]
    optimizer.add_param_group({"params": late, "merge_weight": 0.5, "lr": 1e-3})
    for t in range(2, 4):
        take_step(policy, optimizer, t)
        take_step(other, alone, t)
    assert torch.equal(flat(policy[0]), flat(other[0]))
    assert not torch.equal(flat(policy[2]), flat(other[2]))
    assert {int(optimizer.state[p]["step"]) for _, p in late} == {2}


@every_optimizer
def test_a_part_that_thaws_later_merges_from_then_on(make, policy, delta):
    policy[2].requires_grad_(False)
    optimizer = make(policy, delta)
    for t in range(2):
        optimizer.zero_grad()
        forward(policy, t).backward()
        optimizer.step()
    assert torch.equal(flat(policy[2]), flat(small_model(1)[2]))
    policy[2].requires_grad_(True)
    optimizer.zero_grad()
    forward(policy, 2).backward()
    optimizer.step()
    assert not torch.equal(flat(policy[2]), flat(small_model(1)[2]))
    assert int(optimizer.state[policy[2].weight]["step"]) == 1


# -- hooks


@every_optimizer
def test_step_hooks_see_the_parameters_before_and_after_the_merge(make, policy, delta):
    optimizer, seen = make(policy, delta), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o, flat(policy))))
    handle = optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("after", o, flat(policy)))
    )
    before = flat(policy)
    take_step(policy, optimizer, 0)
    assert [(when, who) for when, who, _ in seen] == [("before", optimizer), ("after", optimizer)]
    assert torch.equal(seen[0][2], before)
    assert torch.equal(seen[1][2], flat(policy))
    handle.remove()
    take_step(policy, optimizer, 1)
    assert [when for when, *_ in seen] == ["before", "after", "before"]


@every_optimizer
def test_state_dict_hooks_can_rewrite_what_is_saved_and_loaded(make, policy, delta):
    optimizer = make(policy, delta)
    take_step(policy, optimizer, 0)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": "kept"})
    saved = optimizer.state_dict()
    assert saved["note"] == "kept"
    loaded = make(small_model(1), delta)
    notes = []
    loaded.register_load_state_dict_pre_hook(lambda o, state: notes.append(state["note"]))
    loaded.register_load_state_dict_post_hook(lambda o: notes.append("done"))
    loaded.load_state_dict(saved)
    assert notes == ["kept", "done"]


# -- what others do to parameters, state and groups between two steps


def steps_with(make: Any, delta: Any, meddle: Any, **kw: Any) -> torch.Tensor:
    """The weights after two steps, ``meddle(model, optimizer)``, and two more."""
    model = small_model(1)
    optimizer = make(model, delta, **kw)
    for t in range(4):
        if t == 2:
            meddle(model, optimizer)
        optimizer.zero_grad()
        forward(model, t).backward()
        optimizer.step()
    return flat(model)


@every_optimizer
def test_parameters_may_get_new_storage(make, delta):
    """vector_to_parameters, pinning, moving to a device and back: ``p.data`` is another tensor afterwards."""

    def meddle(model, optimizer):
        for p in model.parameters():
            old, p.data = p.data, p.data.clone()
            old.fill_(float("nan"))

    assert torch.equal(steps_with(make, delta, meddle), by_hand(make, delta))


@every_optimizer
def test_state_may_get_new_tensors(make, delta):
    """The loop with which people move an optimizer's state to a device."""

    def meddle(model, optimizer):
        for state in optimizer.state.values():
            for key, value in state.items():
                if torch.is_tensor(value):
                    state[key] = value.clone()
                    value.fill_(float("nan") if value.is_floating_point() else -1)

    for settings in ({}, {"merge_every": 3}):
        expected = by_hand(make, delta, **settings)
        assert torch.equal(steps_with(make, delta, meddle, **settings), expected)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_one_moment_may_be_begun_anew(key, delta):
    def meddle(model, optimizer):
        for state in optimizer.state.values():
            state[key] = torch.zeros_like(state[key])

    expected = steps_with(adamw, delta, meddle)
    assert torch.equal(steps_with(ondare, delta, meddle, **NOTHING), expected)
    assert not torch.equal(expected, by_hand(adamw, delta))


@every_optimizer
def test_all_state_may_be_begun_anew(make, delta):
    def clear(model, optimizer):
        optimizer.state.clear()

    def replace(model, optimizer):
        optimizer.state = collections.defaultdict(dict)

    assert torch.equal(steps_with(make, delta, clear), steps_with(make, delta, replace))
    expected = steps_with(adamw, delta, clear)
    assert torch.equal(steps_with(make, delta, clear, **NOTHING), expected)
    assert not torch.equal(expected, by_hand(adamw, delta))


@every_optimizer
@pytest.mark.parametrize("change", [{"weight_decay": 0.5}, {"eps": 0.1}, {"betas": (0.5, 0.6)}, {"lr": 0.3}])
def test_any_setting_of_a_group_may_change(make, change, delta):
    def meddle(model, optimizer):
        optimizer.param_groups[0].update(change)

    expected = steps_with(adamw, delta, meddle)
    ours = steps_with(make, delta, meddle, **NOTHING)
    if make is ondare or make is onties:
        assert torch.equal(ours, expected)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)
    assert not torch.equal(expected, by_hand(adamw, delta))


@every_optimizer
def test_parameters_may_move_to_another_group(make, delta):
    """Layer-wise unfreezing rewrites ``param_groups``: settings are the group's, state the parameter's."""

    def meddle(model, optimizer, **settings):
        group = optimizer.param_groups[0]
        for key in ("params", "param_names"):
            group[key] = group[key][:2]
        late = [(n, p) for n, p in model.named_parameters() if n.startswith("2")]
        optimizer.add_param_group({"params": late, **settings})

    assert torch.equal(
        steps_with(make, delta, partial(meddle, merge_weight=MERGE["merge_weight"])), by_hand(make, delta)
    )
    apart = steps_with(make, delta, partial(meddle, merge_weight=0.5)) - by_hand(make, delta)
    half = small_model(1)[0].weight.numel() + small_model(1)[0].bias.numel()
    assert (
        apart[half:].abs().max() > 5 * apart[:half].abs().max() > 0
    )  # the others' gradients change a little


@every_optimizer
def test_parameters_may_move_to_another_group_after_a_resume(make, delta):
    """They have been trained, and so are not the reference any more, in whatever group."""

    def resume_and_regroup(model, optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        fresh = make(model, delta)
        fresh.load_state_dict(saved)
        for key in ("params", "param_names"):
            fresh.param_groups[0][key] = fresh.param_groups[0][key][:2]
        fresh.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if n.startswith("2")]})
        return fresh

    model = small_model(1)
    optimizer = make(model, delta)
    for t in range(4):
        optimizer = resume_and_regroup(model, optimizer) if t == 2 else optimizer
        optimizer.zero_grad()
        forward(model, t).backward()
        optimizer.step()
    assert torch.equal(flat(model), by_hand(make, delta))


def test_parameters_may_be_slices_of_one_buffer_at_any_place(delta):
    """Flat buffers put parameters at addresses no vector instruction likes; gradients may be expanded."""
    model, buffer = small_model(1), torch.empty(200)
    place = 1
    for p in model.parameters():
        flat_slice = buffer[place : place + p.numel()].view(p.shape)
        flat_slice.copy_(p.data)
        p.data = flat_slice
        place += p.numel() + 1
    other = small_model(1)
    for each in (model, other):
        optimizer = ondare(each, delta)
        for t in range(3):
            for i, p in enumerate(each.parameters()):
                value = torch.tensor(0.1 * (i + 1) * (-1) ** t)
                p.grad = value.expand(p.shape) if each is model else value.expand(p.shape).clone()
            optimizer.step()
    assert torch.equal(flat(model), flat(other))


# -- what others do to the process


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Also fills new memory with NaN, which shows who reads it before writing it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "a default device": lambda: default_device("meta"),
    "a default dtype of 64 bits": lambda: default_dtype(torch.float64),
    "a default dtype of 16 bits": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic algorithms": deterministic,
    "inference mode off and gradients on": torch.enable_grad,
}


@every_optimizer
@pytest.mark.parametrize("merge_every", [1, 2])
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_the_step_does_not_depend_on_what_is_set_around_it(make, merge_every, around, policy, delta):
    gradients, other = {}, small_model(1)
    plain = make(other, delta, merge_every=merge_every)
    optimizer = make(policy, delta, merge_every=merge_every)
    for t in range(3):
        take_step(other, plain, t)
        gradients[t] = [p.grad.clone() for p in other.parameters()]
    for t in range(3):
        for p, gradient in zip(policy.parameters(), gradients[t], strict=True):
            p.grad = gradient
        with SURROUNDINGS[around]():
            optimizer.step()
    assert torch.equal(flat(policy), flat(other))


# -- compiled training steps


@every_optimizer
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_compiled_training_step_is_the_plain_one_and_leaves_the_optimizer_alone(make, place, policy, delta):
    """Dynamo must not trace into the step: it would compile anew for each parameter, and for each count."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    optimizer = make(policy, delta)

    def train(inputs):
        policy(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    inside = torch.compile(train, backend=counter)
    forward_only = torch.compile(policy, backend=counter)
    for t in range(4):
        inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(t))
        if place == "inside":
            inside(inputs)
        else:
            forward_only(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count <= 2
    assert torch.equal(flat(policy), by_hand(make, delta))
    torch._dynamo.reset()


@every_optimizer
def test_a_parameter_s_name_may_have_the_compiler_s_prefix(make, policy, delta):
    """A compiled model's names and the plain one's give the same masks; one's state fits the other."""
    compiled = torch.compile(policy, backend="eager")
    optimizer = make(compiled, delta)
    assert optimizer.param_groups[0]["param_names"][0].startswith("_orig_mod.")
    for t in range(2):
        take_step(policy, optimizer, t)
    other = small_model(1)
    plain = make(other, delta)
    for t in range(2):
        take_step(other, plain, t)
    assert torch.equal(flat(policy), flat(other))
    plain.load_state_dict(optimizer.state_dict())


# -- AdamW's arguments for choosing its implementation


@pytest.mark.parametrize("argument", [{"foreach": True}, {"fused": True}, {"foreach": None, "fused": None}])
def test_adamw_s_choice_of_implementation_may_stay_in_the_call(argument, policy, delta):
    """There is one implementation, chosen by ``kernel``; these change no number in AdamW either."""
    optimizer = ondare(policy, delta, **argument)
    for t in range(2):
        take_step(policy, optimizer, t)
    other = small_model(1)
    plain = ondare(other, delta)
    for t in range(2):
        take_step(other, plain, t)
    assert torch.equal(flat(policy), flat(other))


@pytest.mark.parametrize("argument", ["capturable", "differentiable"])
def test_what_it_cannot_do_is_refused_in_a_sentence(argument, policy, delta):
    """A captured step would replay its masks and its bias correction: the step count is the host's."""
    with pytest.raises(UserError, match=argument):
        ondare(policy, delta, **{argument: True})
    ondare(policy, delta, **{argument: False})


# -- accelerate's wrapper


@every_optimizer
def test_accelerate_s_optimizer_accumulates_skips_and_saves(make, policy, delta):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        made = make(policy, delta)
        optimizer = accelerator.prepare(made)
        trimtab.schedule(optimizer, "merge_weight", lambda t: 1e-2)
        for t in range(4):
            with accelerator.accumulate(policy):
                before = flat(policy)
                accelerator.backward(forward(policy, t))
                optimizer.step()
                optimizer.zero_grad()
                assert torch.equal(flat(policy), before) == (t % 2 == 0)
        assert {int(state["step"]) for state in made.state.values()} == {2}
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.defaults = {**optimizer.defaults, "lr": 0.5}
        assert made.defaults["lr"] == 0.5
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
