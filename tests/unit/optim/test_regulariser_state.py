"""What regularisers keep: resumes to the bit, fp32 beside bf16, swaps that leave no trace, refusals."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.equivalence.runs import assert_same
from tests.unit.optim.conftest import flat, small_model, take_step
from trimtab import OnDARE, OnlineMerging, OnTIES, ReferenceDelta, UserError
from trimtab.ops import GRADIENT, MaskKey, bernoulli_mask
from trimtab.optim import (
    EMA,
    ChildTuning,
    ElasticReset,
    FisherChildTuning,
    GradientProjection,
    PullToReference,
    Regulariser,
    averaged_weights,
)

MERGE = {"reserve_rate": 0.5, "merge_weight": 1e-3}
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(9))


def losses(model: torch.nn.Module) -> Callable[[], Any]:
    return lambda: (model(x.to(next(model.parameters()).dtype)).pow(2).mean() for x in X)


REGULARISERS: dict[str, Callable[[torch.nn.Module, Any], Regulariser]] = {
    "ema": lambda _, optimizer: EMA(optimizer, 0.25, every=2),
    "pull": lambda _, optimizer: PullToReference(optimizer, 0.25),
    "elastic reset": lambda _, optimizer: ElasticReset(optimizer, 0.25, every=3),
    "child tuning": lambda _, optimizer: ChildTuning(optimizer, 0.5),
    "fisher": lambda model, optimizer: FisherChildTuning(optimizer, losses(model), 0.5),
    "projection": lambda model, optimizer: GradientProjection(optimizer, [losses(model)] * 2, every=3),
}
every_regulariser = pytest.mark.parametrize("kind", REGULARISERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=0.05)


def ondare(model: torch.nn.Module, **settings: Any) -> torch.optim.Optimizer:
    delta = ReferenceDelta.between(reference=small_model(1), base=small_model(0))
    return OnDARE(model.named_parameters(), delta, lr=0.05, merge_every=2, **MERGE, **settings)


def onties(model: torch.nn.Module) -> torch.optim.Optimizer:
    delta = ReferenceDelta.between(reference=small_model(1), base=small_model(0))
    return OnTIES(model.named_parameters(), delta, lr=0.05, **MERGE)


def around_adafactor(model: torch.nn.Module) -> torch.optim.Optimizer:
    delta = ReferenceDelta.between(reference=small_model(1), base=small_model(0))
    inner = torch.optim.Adafactor(model.named_parameters(), lr=0.05)
    return OnlineMerging(inner, delta, **MERGE)  # type: ignore[arg-type]


MAKERS = [adamw, ondare, onties, around_adafactor]
every_optimizer = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
Make = Callable[[torch.nn.Module], torch.optim.Optimizer]


def start(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return small_model(1).to(dtype)


@every_regulariser
@every_optimizer
@every_dtype
def test_saved_and_loaded_in_the_middle_equals_going_on(kind: str, make: Make, dtype: torch.dtype) -> None:
    model = start(dtype)
    optimizer = make(model)
    attach = REGULARISERS[kind]
    attach(model, optimizer)
    for t in range(4):
        take_step(model, optimizer, t)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = start(dtype)
    other.load_state_dict(saved["model"])
    resumed = make(other)
    attach(other, resumed)
    resumed.load_state_dict(saved["optimizer"])
    for t in range(4, 8):
        take_step(model, optimizer, t)
        take_step(other, resumed, t)
    assert torch.equal(flat(model), flat(other))
    with averaged_weights(optimizer), averaged_weights(resumed):
        assert torch.equal(flat(model), flat(other))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"], "state")


NOTHING: dict[str, Callable[[torch.nn.Module, Any], Regulariser]] = {
    "an average": lambda _, optimizer: EMA(optimizer, 0.5),
    "no pull": lambda _, optimizer: PullToReference(optimizer, 0.0),
    "no reset yet": lambda _, optimizer: ElasticReset(optimizer, 0.5, every=100),
    "a mask that keeps all": lambda _, optimizer: ChildTuning(optimizer, 1.0),
    "information everywhere": lambda model, optimizer: FisherChildTuning(optimizer, losses(model), 1.0),
    "no direction": lambda model, optimizer: GradientProjection(
        optimizer, [lambda: [0.0 * next(model.parameters()).sum()]]
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
@every_optimizer
@every_dtype
def test_what_does_nothing_changes_no_bit(kind: str, make: Make, dtype: torch.dtype) -> None:
    models = [start(dtype), start(dtype)]
    optimizers = [make(model) for model in models]
    NOTHING[kind](models[0], optimizers[0])
    for t in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            take_step(model, optimizer, t)
    assert torch.equal(flat(models[0]), flat(models[1]))


@every_regulariser
@pytest.mark.parametrize("make", [adamw, ondare], ids=lambda make: make.__name__)
def test_resume_through_distributed_checkpoint_and_its_phantom_step(kind: str, make: Make) -> None:
    model = start()
    optimizer = make(model)
    REGULARISERS[kind](model, optimizer)
    for t in range(4):
        take_step(model, optimizer, t)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = start()
    other.load_state_dict(model.state_dict())
    before = flat(other)
    resumed = make(other)
    REGULARISERS[kind](other, resumed)
    set_optimizer_state_dict(other, resumed, saved)
    assert torch.equal(before, flat(other))
    for t in range(4, 8):
        take_step(model, optimizer, t)
        take_step(other, resumed, t)
    assert torch.equal(flat(model), flat(other))


@every_regulariser
def test_a_step_at_no_learning_rate_moves_nothing(kind: str) -> None:
    model = start()
    optimizer = adamw(model)
    REGULARISERS[kind](model, optimizer)
    for t in range(3):
        take_step(model, optimizer, t)
    optimizer.param_groups[0]["lr"] = 0.0
    before = flat(model)
    for t in range(3):
        take_step(model, optimizer, t)
    assert torch.equal(before, flat(model))


def test_the_average_of_bf16_weights_is_fp32_and_of_the_exact_weights() -> None:
    exact, stored = start(), start(torch.bfloat16)
    exact.load_state_dict(stored.state_dict())  # both begin at the rounded weights
    settings = {"policy_differs": True, "kernel": "torch"}
    optimizers = [ondare(model, **settings) for model in (exact, stored)]
    averages = [EMA(optimizer, 1e-3) for optimizer in optimizers]
    for t in range(5):
        for model, optimizer in zip((exact, stored), optimizers, strict=True):
            take_step(model, optimizer, t)
    for p, q in zip(exact.parameters(), stored.parameters(), strict=True):
        found, expected = averages[1].average(q), averages[0].average(p)
        assert found is not None
        assert expected is not None
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert not torch.equal(found, found.bfloat16().float()), "it would have fitted into bf16"


@pytest.mark.parametrize("kind", ["pull", "elastic reset"])
def test_what_is_written_to_bf16_weights_is_exact_with_their_residual(kind: str) -> None:
    exact, stored = start(), start(torch.bfloat16)
    exact.load_state_dict(stored.state_dict())
    averages = []
    for model in (exact, stored):
        optimizer = ondare(model, policy_differs=True, kernel="torch")
        REGULARISERS[kind](model, optimizer)
        averages.append(EMA(optimizer, 1.0))  # of the weights as they are, in fp32
        for t in range(3):
            take_step(model, optimizer, t)
    for p, q in zip(exact.parameters(), stored.parameters(), strict=True):
        assert torch.equal(averages[1].average(q), p)  # type: ignore[arg-type]
        assert torch.equal(q, p.bfloat16())
        assert not torch.equal(q.float(), p)


def look_and_fail(model: torch.nn.Module, ema: EMA, own: torch.Tensor) -> None:
    with ema.swapped_in():
        for p in model.parameters():
            average = ema.average(p)
            assert average is not None
            assert torch.equal(p, average.to(p.dtype))
        assert not torch.equal(flat(model), own)
        raise ZeroDivisionError


@every_dtype
@every_optimizer
def test_swapping_the_average_in_and_out_leaves_no_trace(make: Make, dtype: torch.dtype) -> None:
    models = [start(dtype), start(dtype)]
    optimizers = [make(model) for model in models]
    ema = EMA(optimizers[0], 0.25)
    for t in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            take_step(model, optimizer, t)
        with pytest.raises(ZeroDivisionError):
            look_and_fail(models[0], ema, flat(models[1]))
        assert torch.equal(flat(models[0]), flat(models[1]))


def test_without_a_step_or_an_average_there_is_nothing_to_swap() -> None:
    model = start()
    before, optimizer = flat(model), adamw(model)
    with averaged_weights(None), averaged_weights(optimizer):
        assert torch.equal(flat(model), before)
    ema = EMA(optimizer)
    with averaged_weights(optimizer):
        assert torch.equal(flat(model), before)
    assert ema.average(next(model.parameters())) is None


@every_optimizer
def test_a_parameter_that_moves_late_is_averaged_from_where_it_was(make: Make) -> None:
    model = start()
    optimizer = make(model)
    ema, late = EMA(optimizer, 0.5), next(model.parameters())
    begins = late.detach().clone()
    for t in range(3):
        for p in model.parameters():
            p.grad = None if p is late and t == 0 else torch.ones_like(p)
        if t == 1:
            assert ema.average(late) is None
        before = late.detach().clone()
        optimizer.step()
        if t == 0:
            assert torch.equal(late, begins)
        elif t == 1:
            assert torch.equal(before, begins)
            assert torch.equal(ema.average(late), torch.lerp(begins, late.detach(), 0.5))  # type: ignore[arg-type]


def test_detached_it_acts_no_more() -> None:
    model = start()
    optimizer = adamw(model)
    ema = EMA(optimizer, 0.5)
    take_step(model, optimizer, 0)
    kept = [ema.average(p).clone() for p in model.parameters()]  # type: ignore[union-attr]
    ema.detach()
    take_step(model, optimizer, 1)
    assert all(torch.equal(ema.average(p), k) for p, k in zip(model.parameters(), kept, strict=True))  # type: ignore[arg-type]
    EMA(optimizer, 0.5)  # and another may be attached


class Failing(torch.optim.SGD):
    """Its first step comes to nothing."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError
        return super().step(closure)


def test_a_step_that_fails_is_not_counted() -> None:
    model = start()
    optimizer = Failing(model.named_parameters(), lr=0.1)
    ChildTuning(optimizer, 0.5, seed=3)
    with pytest.raises(ZeroDivisionError):
        take_step(model, optimizer, 0)
    take_step(model, optimizer, 0)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad != 0, bernoulli_mask(p.shape, 0.5, MaskKey(3, GRADIENT, 1, name)))


@pytest.mark.parametrize(
    ("attach", "sentence"),
    [
        (lambda o: EMA(o, 0.0), r"coefficient is the share of the new weights, in \(0, 1\], got 0.0"),
        (lambda o: EMA(o, every=0), "every is a number of steps, 1 or more, got 0"),
        (lambda o: PullToReference(o, 2.0), r"strength is the share of the way back, in \[0, 1\], got 2.0"),
        (lambda o: ElasticReset(o, every=1.5), "every is a number of steps, 1 or more, got 1.5"),
        (lambda o: ChildTuning(o, 0.0), r"reserve_rate must be in \(0, 1\], got 0.0"),
        (lambda o: ChildTuning(o, 0.5, seed=-1), r"seed must be a whole number in \[0, 2\^64\), got -1"),
        (lambda o: GradientProjection(o, []), "losses of at least one set of capability rows"),
        (lambda _: EMA("adamw"), "EMA is attached to a torch.optim.Optimizer, got str"),
        (lambda o: [EMA(o), EMA(o)], "this AdamW has EMA already"),
    ],
)
def test_what_cannot_be_meant_is_refused(attach: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        attach(adamw(start()))


def test_the_wrapper_and_not_what_it_wraps_is_regularised() -> None:
    model = start()
    inner = adamw(model)
    delta = ReferenceDelta.between(reference=small_model(1), base=small_model(0))
    OnlineMerging(inner, delta)
    with pytest.raises(UserError, match=r"this AdamW is wrapped in OnlineMerging.*attach EMA to the"):
        EMA(inner)
    inner = adamw(model)
    EMA(inner)
    with pytest.raises(UserError, match=r"this AdamW has regularisers.*wrap it first"):
        OnlineMerging(inner, delta)


def test_masks_need_names_and_gradients_before_the_step() -> None:
    model = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ChildTuning(optimizer, 0.5)
    with pytest.raises(UserError, match=r"ChildTuning goes by names.*model\.named_parameters\(\)"):
        take_step(model, optimizer, 0)
    with pytest.raises(UserError, match="step\\(\\) without a closure"):
        optimizer.step(lambda: 0.0)
