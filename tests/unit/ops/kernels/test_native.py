"""The C engine against functions of ops, torch's AdamW and the torch engine, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.adamw import adamw

from trimtab.ops import (
    DELTA,
    ROUNDING,
    UPDATE,
    MaskKey,
    Operator,
    consensus,
    join_master,
    sparsify,
    split_master,
    stochastic_round,
    top_count,
    top_mask,
    uniform_u32,
)
from trimtab.ops.formats import (
    DenseTau,
    block_cover,
    hold_dense,
    hold_int8,
    hold_sparse,
)
from trimtab.ops.kernels import build, loaded, native
from trimtab.ops.kernels.job import Cut, Job, Settings
from trimtab.ops.kernels.torch_engine import TorchEngine
from trimtab.ops.layout import Layout

compiled = pytest.mark.skipif(not native.available(), reason=f"no native engine: {native.reason()}")
MERGE = Settings(True, (0.9, 0.1), 0.3, decay=0.99, step=3, lr=1e-3)
BERNOULLI, TOP = Operator("bernoulli"), Operator("top", consensus="sign")

WHOLE = [(), (0,), (0, 4), (1,), (3, 5), (17,), (2047,), (2048,), (33, 129), (300, 577), (4, 2, 8, 9)]
PARTS = [  # shape, start, local: rows, columns long and short, inner dimensions, indices around 2^32, empty
    ((40, 30), (5, 0), (11, 30)),
    ((40, 300), (0, 100), (40, 77)),
    ((40, 300), (3, 100), (20, 3)),
    ((6, 7, 8), (1, 2, 3), (4, 3, 2)),
    ((1 << 20, 1 << 13), ((1 << 19) - 1, 0), (2, 1 << 13)),
    ((1 << 33,), ((1 << 32) - 777,), (2000,)),
    ((1 << 31, 4), ((1 << 30) - 100, 1), (300, 2)),
    ((10, 10), (3, 3), (0, 4)),
]


@pytest.fixture
def engine() -> native.NativeEngine:
    return native.NativeEngine()


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Equality of bits, −0 and +0 apart; one NaN is as good as another."""
    if one is None or other is None:
        return one is other
    if one.is_floating_point():
        if not torch.equal(one.isnan(), other.isnan()):
            return False
        one, other = one[~one.isnan()], other[~other.isnan()]
    words = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))


def differing(one: Job, other: Job) -> list[str]:
    names = ("param", "residual", "exp_avg", "exp_avg_sq", "anchor", "update")
    return [name for name in names if not same_bits(getattr(one, name), getattr(other, name))]


def copied(job: Job, **changes: Any) -> Job:
    names = ("param", "residual", "exp_avg", "exp_avg_sq", "anchor", "update")
    own = {name: None if getattr(job, name) is None else getattr(job, name).clone() for name in names}
    return dataclasses.replace(job, cache=None, **(own | changes))


def random_job(layout: Layout, seed: int = 0, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Job:
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(layout.local, generator=g) * scale

    fields.setdefault("stored", "nearest")
    job = Job("layer.weight", 5, layout, normal(0.02).to(dtype), **fields)
    job.exp_avg, job.exp_avg_sq, job.grad = normal(1e-3), normal(1e-3).square(), normal(1e-3)
    job.tau, job.settings = hold_dense(normal(1e-3)), MERGE
    job.count = top_count(layout.total, MERGE.rate)
    return job


# -- the whole space, against the torch engine


class Draws:
    """Random choices of everything a job may be, from one seed: what hypothesis shrinks is the seed."""

    def __init__(self, seed: int) -> None:
        self.choices, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.choose, self.share = self.choices.choice, self.choices.random

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.g) * scale

    def layout(self) -> Layout:
        return Layout.whole(self.choose(WHOLE)) if self.share() < 0.55 else Layout(*self.choose(PARTS))

    def tau(self, layout: Layout) -> Any:
        masked, values = self.share() < 0.5, self.normal(layout.local, 1e-3)
        if self.share() < 0.3:
            values = torch.where(torch.rand(layout.local, generator=self.g) < 0.05, values, 0.0)
        held = self.choose(["float32", "bfloat16", "int8", "sparse", "sparse bfloat16"])
        if held == "int8":
            cover = block_cover(layout)
            return hold_int8(self.normal(cover.local, 1e-3), layout, cover=cover, masked=masked)
        dtype = torch.bfloat16 if "bfloat16" in held else torch.float32
        return hold_sparse(values, dtype) if "sparse" in held else hold_dense(values, dtype, masked=masked)

    def settings(self, merge: bool) -> Settings:
        return Settings(
            merge,
            weights=self.choose([(0.9, 0.1), (1 - 1e-7, 1e-7), (0.0, 1.0), (1.0, 0.0)]),
            rate=self.choose([0.5, 0.01, 0.123, 0.9, 1.0, 1 - 1e-12]),
            decay=self.choose([1.0, 0.99]),
            decay_after=self.share() < 0.3,
            step=self.choose([1, 3, 1000]),
            lr=1e-3,
            beta1=self.choose([0.9, 0.3]),
            beta2=self.choose([0.999, 0.95]),
            maximize=self.share() < 0.2,
            reopen=self.share() < 0.3,
        )

    def operator(self) -> Operator:
        sparsifier = self.choose(["none", "bernoulli", "bernoulli", "top", "top"])
        rescale = "none" if sparsifier == "top" else self.choose(["none", "expected"])
        return Operator(sparsifier, rescale, self.choose(["linear", "sign", "sign_unweighted"]))

    def job(self, layout: Layout) -> Job:
        dtype = self.choose([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        stored = "nearest" if dtype == torch.float32 else self.choose(["nearest", "residual", "stochastic"])
        master, adam = self.normal(layout.local, self.choose([1.0, 0.02, 1e-5])), self.share() < 0.75
        grad, first = self.normal(layout.local, self.choose([1e-3, 1e-22])), self.normal(layout.local, 1e-3)
        second = self.normal(layout.local, 1e-3).square()
        if self.share() < 0.25:  # Adam's first step: ties
            grad, first, second = grad.sign() * 1e-3, first.zero_(), second.zero_()
        if self.share() < 0.25 and layout.numel:
            for x in (grad, master, second):
                at = torch.randint(layout.numel, (1 + layout.numel // 10,), generator=self.g)
                x.view(-1)[at] = self.choose([torch.nan, torch.inf, 0.0])
        param, residual = split_master(master, dtype) if stored == "residual" else (master.to(dtype), None)
        job = Job("layer.weight", self.choose([0, (1 << 64) - 1]), layout, param, stored, residual)
        if adam:
            kept = self.choose([torch.float32, torch.bfloat16])
            job.exp_avg, job.exp_avg_sq = first.to(kept), second.to(kept)
            job.grad = grad.to(self.choose([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        if not adam or self.share() < 0.35:
            job.anchor, job.anchor_decay = master + self.normal(layout.local, 1e-3), self.choose([1.0, 0.97])
        job.tau = self.tau(layout)
        job.settings = self.settings(merge=self.share() < 0.85)
        job.count = top_count(layout.total, job.settings.rate) if layout.total else 0
        return job


@compiled
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), threads=st.sampled_from([1, 3]))
def test_every_step_is_the_torch_engines_bit_for_bit(seed: int, threads: int) -> None:
    draws, engine = Draws(seed), native.NativeEngine()
    job, operator = draws.job(draws.layout()), draws.operator()
    given_update = False
    if operator.sparsify == "top" and not job.layout.is_whole:  # as processes settle them
        half = job.layout.total // 2
        job.cuts = (Cut(0x3A000000, half), None if job.tau.masked else Cut(0x39800000, half))
        given_update = job.settings.merge and draws.share() < 0.7
    if draws.share() < 0.2:
        operator, job.group = dataclasses.replace(operator, rescale="l1"), "a process group"
        job.factors = (1.5, 2.5)
    assert engine.refuses(job, operator) is None
    ours, theirs = copied(job), copied(job)
    with of_threads(threads):
        if given_update:
            engine.update([ours])
            TorchEngine().update([theirs])
            assert differing(ours, theirs) == []
        engine.step([ours], operator)
    TorchEngine().step([theirs], operator)
    assert differing(ours, theirs) == []


class of_threads:
    """Steps inside run on so many threads, however small they are."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads(), native._PER_THREAD
        torch.set_num_threads(self.threads)
        native._PER_THREAD = 1 if self.threads > 1 else 1 << 60

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before[0])
        native._PER_THREAD = self.before[1]


# -- against torch's AdamW and the functions of ops, without the torch engine


def adam_loop(target: Tensor, job: Job, decay: float) -> tuple[Tensor, Tensor]:
    """Torch's own loop on ``target``; returns the moments. ``decay`` is lr·λ."""
    s, first, second = job.settings, job.exp_avg.clone(), job.exp_avg_sq.clone()
    adamw(
        [target], [job.grad], [first], [second], [], [torch.tensor(float(s.step - 1))],
        foreach=False, fused=False, amsgrad=False, beta1=s.beta1, beta2=s.beta2, lr=s.lr,
        weight_decay=decay / s.lr, eps=s.eps, maximize=s.maximize,
    )  # fmt: skip
    return first, second


@compiled
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize(("beta1", "maximize"), [(0.9, False), (0.4, True)])
def test_plain_step_is_torchs_adamw(
    engine: native.NativeEngine, step: int, beta1: float, maximize: bool
) -> None:
    job = random_job(Layout.whole((70_001,)))
    lr, weight_decay = 1e-3, 0.1
    job.settings = Settings(
        False, (1.0, 0.0), 1.0, decay=1 - lr * weight_decay, step=step, lr=lr, beta1=beta1, maximize=maximize
    )
    job.exp_avg_sq[:9] = torch.tensor([0.0, 1e-45, 1e-40, 1e-37, 1e-31, 1e-29, 3e38, torch.inf, torch.nan])
    expected = job.param.clone()
    first, second = adam_loop(expected, job, lr * weight_decay)
    engine.step([job], BERNOULLI)
    assert same_bits(job.param, expected)
    assert same_bits(job.exp_avg, first)
    assert same_bits(job.exp_avg_sq, second)


@compiled
@pytest.mark.parametrize("kind", ["linear", "sign", "sign_unweighted"])
@pytest.mark.parametrize("sparsifier", ["bernoulli", "top"])
def test_merge_is_the_paper_path_of_ops(engine: native.NativeEngine, kind: Any, sparsifier: Any) -> None:
    job = random_job(Layout.whole((123, 456)))
    s, name, tau = job.settings, job.name, job.tau.values.view(123, 456)
    update = torch.zeros_like(job.param)
    adam_loop(update, job, 0.0)
    keys = [MaskKey(job.seed, stream, s.step, name) for stream in (UPDATE, DELTA)]
    kept = [sparsify(x, sparsifier, s.rate, key=key) for x, key in zip((update, tau), keys, strict=True)]
    expected = job.param * s.decay + consensus(kept, s.weights, kind)
    engine.step([job], Operator(sparsifier, consensus=kind))
    assert same_bits(job.param, expected)


@compiled
def test_bf16_with_a_residual_is_the_fp32_run(engine: native.NativeEngine) -> None:
    wide = random_job(Layout.whole((5000,)))
    narrow = copied(wide, stored="residual")
    narrow.param, narrow.residual = split_master(wide.param, torch.bfloat16)
    for step in range(1, 6):
        for job in (wide, narrow):
            job.settings = dataclasses.replace(MERGE, step=step)
        engine.step([wide, narrow], BERNOULLI)
    assert same_bits(join_master(narrow.param, narrow.residual), wide.param)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_draws_the_bits_of_ops(engine: native.NativeEngine, dtype: torch.dtype) -> None:
    job = random_job(Layout.whole((5000,)), dtype=dtype, stored="stochastic")
    wide = copied(job, param=job.param.to(torch.float32), stored="nearest")
    engine.step([job, wide], BERNOULLI)
    random = uniform_u32(wide.param.shape, MaskKey(job.seed, ROUNDING, MERGE.step, job.name))
    assert same_bits(job.param, stochastic_round(wide.param, dtype, random))


# -- selection


def survivors(engine: native.NativeEngine, job: Job, update: Tensor) -> Tensor:
    """Which entries of a given Δ the engine keeps."""
    job.param, job.tau, job.update = (
        torch.zeros_like(update),
        DenseTau(torch.zeros_like(update), True),
        update,
    )
    job.settings = Settings(True, (1.0, 0.0), 0.5, step=job.settings.step)
    engine.step([job], Operator("top"))
    job.update = None
    return job.param != 0


@compiled
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.97])
@pytest.mark.parametrize("kind", ["normal", "rows", "sorted", "few values", "ties", "mostly zero", "NaN"])
def test_exactly_the_k_largest_survive(engine: native.NativeEngine, kind: str, share: float) -> None:
    n = 150_000
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x = {
        "normal": x,
        "rows": x * torch.arange(n).div(500, rounding_mode="floor").mul(1.7).sin().exp2(),
        "sorted": x.sort().values,
        "few values": (x * 2).round() + 0.25,
        "ties": x.sign() * 1e-3,
        "mostly zero": torch.where(torch.arange(n) < n // 50, x, 0.0),
        "NaN": torch.where(torch.arange(n) % 7 == 0, torch.nan, x),
    }[kind]
    job = random_job(Layout.whole((n,)))
    job.count = top_count(n, share)
    assert torch.equal(survivors(engine, job, x), top_mask(x, job.count) & (x != 0))


@compiled
@pytest.mark.parametrize("tied", [False, True])
def test_threads_share_a_large_tensor(
    engine: native.NativeEngine, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr(native, "_SHARED", 100_000)
    jobs = [random_job(Layout.whole((n,)), seed=n) for n in (300_001, 70_000, 3000, 200_000)]
    for job in jobs if tied else []:
        job.exp_avg, job.exp_avg_sq = torch.zeros_like(job.param), torch.zeros_like(job.param)
    theirs = [copied(job) for job in jobs]
    with of_threads(3):
        engine.step(jobs, TOP)
    TorchEngine().step(theirs, TOP)
    assert [differing(*pair) for pair in zip(jobs, theirs, strict=True)] == [[]] * 4


@compiled
def test_a_cut_holds_for_its_step_alone(engine: native.NativeEngine) -> None:
    job = random_job(Layout.whole((4000,)))
    theirs = copied(job)
    for step in (1, 2):
        for each in (job, theirs):
            each.settings = dataclasses.replace(MERGE, step=step)
            each.grad = torch.randn(4000, generator=torch.Generator().manual_seed(step))
        engine.step([job], TOP)
        TorchEngine().step([theirs], TOP)
        assert differing(job, theirs) == []


# -- rows of the table follow their jobs


@compiled
def test_what_changes_between_steps_is_seen(engine: native.NativeEngine) -> None:
    job = random_job(Layout.whole((40, 50)))
    theirs = copied(job)
    other = random_job(Layout.whole((40, 50)), seed=9)
    changes: list[dict[str, Any]] = [
        {"grad": other.grad.to(torch.bfloat16)},
        {"grad": other.grad.t().contiguous().t()},
        {"grad": other.grad.to(torch.float64)},
        {"tau": hold_sparse(other.tau.values * (other.tau.values > 0))},
        {"tau": hold_int8(other.tau.values, Layout.whole((40, 50)), masked=False)},
        {"count": 7},
        {"cuts": (Cut(0x38000000, 100), Cut(0x38000000, 10))},
        {"cuts": (None, None)},
        {"grad": None, "anchor": other.param + 1e-3, "anchor_decay": 0.9},
        {"grad": other.grad, "anchor": None},
    ]
    for step, change in enumerate(changes, start=1):
        for each in (job, theirs):
            each.settings = dataclasses.replace(MERGE, step=step)
            for name, value in change.items():
                setattr(each, name, value.clone() if name == "anchor" and value is not None else value)
        engine.step([job], TOP)
        TorchEngine().step([theirs], TOP)
        assert differing(job, theirs) == [], change


@compiled
def test_jobs_with_their_own_settings_in_one_call(engine: native.NativeEngine) -> None:
    jobs = [random_job(Layout.whole((n,)), seed=n) for n in (10, 3000, 0, 70_000)]
    theirs = [copied(job) for job in jobs]
    for both in zip(jobs, theirs, strict=True):
        for job in both:
            job.settings = dataclasses.replace(MERGE, rate=0.1 + job.layout.numel / 100_000, lr=1e-4)
    with of_threads(3):
        engine.step(jobs, BERNOULLI)
    TorchEngine().step(theirs, BERNOULLI)
    assert [differing(*pair) for pair in zip(jobs, theirs, strict=True)] == [[]] * 4
    engine.step([], BERNOULLI)


@compiled
@pytest.mark.parametrize(
    "anchor", [torch.zeros(8, dtype=torch.bfloat16), torch.zeros(16)[::2], torch.zeros(7)]
)
def test_an_anchor_that_is_not_the_masters_is_an_error(engine: native.NativeEngine, anchor: Tensor) -> None:
    job = random_job(Layout.whole((8,)))
    job.anchor = anchor
    with pytest.raises(ValueError, match=r"layer\.weight: anchor must be contiguous fp32 of 8 entries"):
        engine.step([job], BERNOULLI)


@compiled
def test_it_does_not_measure(engine: native.NativeEngine) -> None:
    assert engine.measures is False
    with pytest.raises(ValueError, match="does not measure"):
        engine.step([], BERNOULLI, torch.zeros(0, 1))


# -- what it leaves to the torch engine, and why


@compiled
def test_refusals_say_why(engine: native.NativeEngine) -> None:
    layout = Layout.whole((4, 6))
    job = random_job(layout)

    def refused(operator: Operator = BERNOULLI, **changes: Any) -> str | None:
        return engine.refuses(copied(job, **changes), operator)

    assert refused() is None
    assert "float64 parameters" in str(refused(param=job.param.double()))
    assert "without rounding 'residual'" in str(refused(stored="residual"))
    assert "AMSGrad" in str(refused(max_exp_avg_sq=job.param))
    assert "not contiguous" in str(refused(param=job.param.view(6, 4).t()))
    assert "fp32 and bf16 moments" in str(refused(exp_avg=job.param.half()))
    assert "one dtype" in str(refused(exp_avg=job.param.bfloat16()))
    assert "updates in float64" in str(refused(update_dtype=torch.float64))
    assert "on meta" in str(refused(param=job.param.to("meta")))
    assert "L1 norm" in str(refused(Operator("bernoulli", "l1")))
    assert "normalize" in str(refused(Operator("bernoulli", normalize=True)))


def test_without_a_library_it_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", lambda: (None, "there is no C compiler (cc, gcc or clang)"))
    assert not native.available()
    assert native.reason() == "there is no C compiler (cc, gcc or clang)"
    with pytest.raises(RuntimeError, match="no C compiler"):
        native.NativeEngine()


def test_a_build_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> Any:
        raise build.BuildError("there is no C compiler (cc, gcc or clang)")

    monkeypatch.setattr(loaded, "library", fails)
    assert native._loaded.__wrapped__() == (None, "there is no C compiler (cc, gcc or clang)")


def test_a_file_that_is_no_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "native.so").write_text("no library")
    monkeypatch.setattr(loaded, "library", lambda _: tmp_path / "native.so")
    found, why = native._loaded.__wrapped__()
    assert found is None
    assert "cannot be loaded" in why


@pytest.mark.parametrize("field", ["param", "exp_avg", "exp_avg_sq"])
def test_the_self_test_sees_one_wrong_bit(field: str) -> None:
    class Wrong(TorchEngine):
        def step(self, jobs: Any, operator: Operator, sums: Tensor | None = None) -> None:
            super().step(jobs, operator, sums)
            if jobs[0].param.dtype == torch.bfloat16:
                getattr(jobs[0], field).view(torch.int16)[11] ^= 1

    assert native._disagreement(TorchEngine()) is None  # type: ignore[arg-type]
    assert native._disagreement(Wrong()) == "bf16 parameters"  # type: ignore[arg-type]


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_makes_its_own_threads(engine: native.NativeEngine) -> None:
    jobs = [random_job(Layout.whole((9000,)), seed=seed) for seed in range(6)]
    theirs = [copied(job) for job in jobs]
    # NumPy compares: torch's own threads do not survive a fork.
    ours_then, theirs_then = ([job.param.numpy() for job in each] for each in (jobs, theirs))
    with of_threads(3), warnings.catch_warnings():
        engine.step([copied(job) for job in jobs], BERNOULLI)  # the parent has threads now
        warnings.simplefilter("ignore", DeprecationWarning)  # that they are there while it forks
        if (child := os.fork()) == 0:
            status = 1
            try:
                engine.step(jobs, BERNOULLI)
                native._PER_THREAD = 1 << 60
                engine.step(theirs, BERNOULLI)
                status = 0 if all(map(np.array_equal, ours_then, theirs_then)) else 2
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
