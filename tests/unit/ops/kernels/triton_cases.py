"""What `test_triton.py` asks of the GPU kernels, run in Triton's interpreter by a process of its own.

    TRITON_INTERPRET=1 python -m tests.unit.ops.kernels.triton_cases

prints a JSON object: the name of each case, and "" or a traceback. The oracle is the torch engine, and the
functions of trimtab.ops. Importing this module does not import triton.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.ops import DELTA, UPDATE, MaskKey, Operator, bernoulli_mask, join_master, split_master, top_count
from trimtab.ops.formats import DenseTau, block_cover, hold_dense, hold_int8, hold_sparse
from trimtab.ops.kernels.job import Job, Settings
from trimtab.ops.kernels.torch_engine import TorchEngine, master_dtype
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place, uniform_u32
from trimtab.ops.sparsify import top_cut

CASES: dict[str, Callable[[], None]] = {}
DARE, TIES = Operator("bernoulli", "none", "linear"), Operator("top", "none", "sign")
TOP = Operator("top", "none", "linear")  # nothing is outvoted: each entry that is kept shows
NAN, INF = float("nan"), float("inf")
TENSORS = ("param", "residual", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad", "anchor", "update")


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


# -- jobs


def make_job(
    shape: tuple[int, ...] = (10, 30),
    dtype: torch.dtype = torch.float32,
    stored: str = "nearest",
    *,
    moment: torch.dtype = torch.float32,
    grad: torch.dtype = torch.float32,
    tau: Callable[[Tensor], Any] = hold_dense,
    layout: Layout | None = None,
    name: str = "w",
    seed: int = 7,
    anchored: bool = False,
    amsgrad: bool = False,
    **settings: Any,
) -> Job:
    """A job of random tensors; its settings are those of a merge unless given."""
    layout = layout or Layout.whole(shape)
    size = layout.local
    master = torch.randn(size, dtype=torch.float64).to(master_dtype(dtype, stored))
    weight, rest = split_master(master, dtype) if stored == "residual" else (master.to(dtype), None)
    defaults = {"merge": True, "weights": (0.9, 0.1), "rate": 0.3, "decay": 0.999, "step": 3, "lr": 1e-2}
    terms = Settings(**(defaults | settings))
    return Job(
        name,
        seed,
        layout,
        weight,
        stored,
        rest,
        (torch.randn(size) * 0.1).to(moment),
        (torch.rand(size) * 0.01).to(moment),
        torch.rand(size) * 0.01 if amsgrad else None,
        settings=terms,
        grad=torch.randn(size).to(grad),
        anchor=master + torch.randn(size).to(master) * 0.01 if anchored else None,
        anchor_decay=0.98 if anchored else 1.0,
        tau=tau(torch.randn(size) * 0.1),
        count=top_count(layout.total, terms.rate) if layout.total else 0,
    )


def given(update: Tensor, tau: Tensor, *, layout: Layout | None = None, **settings: Any) -> Job:
    """A job whose Δ is given, with θ = 0 and nothing else going on: what is stored is the bracket."""
    job = make_job(tuple(update.shape), layout=layout, **({"decay": 1.0, "weights": (1.0, 2.0)} | settings))
    job.param.zero_()
    job.update, job.tau = update.reshape(-1).clone(), hold_dense(tau)
    return job


def clone(job: Job) -> Job:
    twin = copy.copy(job)
    for name in TENSORS:
        tensor = getattr(job, name)
        setattr(twin, name, None if tensor is None else tensor.clone())
    twin.cache = None
    return twin


def engine(**shape: Any) -> Any:
    """The engine with small programs: many of them for each tensor."""
    from trimtab.ops.kernels.triton_engine import TritonEngine
    from trimtab.ops.kernels.triton_search import Shape

    small = {"block": 256, "warps": 4, "samples": 64, "bins": 64, "short": 16}
    return TritonEngine(Shape(**(small | shape)))


def run(jobs: Sequence[Job], operator: Operator, **shape: Any) -> tuple[list[Job], list[Job]]:
    """(the jobs as this engine leaves them, as the torch engine does)."""
    ours, theirs = [clone(job) for job in jobs], [clone(job) for job in jobs]
    runner = engine(**shape)
    for job in ours:
        assert runner.refuses(job, operator) is None, runner.refuses(job, operator)
    runner.step(ours, operator)
    assert any(job.cache is not None and job.cache.plans for job in ours), "the kernels did not run"
    TorchEngine().step(theirs, operator)
    return ours, theirs


# -- comparisons


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check_near(jobs: Sequence[Job], others: Sequence[Job], before: Sequence[Job]) -> None:
    """Every tensor of the jobs is that of the others within 2 fp32 units in the last place.

    Units are those of the larger of the entry and what it was before: where they cancel, no more is left.
    What is rounded to 16 bits may differ by one of these in one entry of a hundred.
    """
    for job, other, start in zip(jobs, others, before, strict=True):
        for name in TENSORS:
            a, b = getattr(job, name), getattr(other, name)
            if a is None or name == "residual":
                continue
            if name == "param" and job.residual is not None:
                a, b = join_master(a, job.residual), join_master(b, other.residual)
            elif a.dtype in (torch.bfloat16, torch.float16):
                units = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
                assert int(units.max()) <= 1, (name, int(units.max()))
                assert int((units > 0).sum()) <= a.numel() / 100, (name, int((units > 0).sum()))
                continue
            assert torch.equal(a.isnan(), b.isnan()), name
            scale = torch.maximum(b.abs(), getattr(start, name).to(b).abs()).nan_to_num().float().numpy()
            off = (a - b).nan_to_num().abs().numpy() / np.spacing(np.maximum(scale, 1e-30))
            assert off.max(initial=0) <= 2, (name, float(off.max()))


def check_equal(jobs: Sequence[Job], others: Sequence[Job]) -> None:
    """Every tensor of the jobs is that of the others, bit for bit but for NaN's payload."""
    for job, other in zip(jobs, others, strict=True):
        for name in TENSORS:
            a, b = getattr(job, name), getattr(other, name)
            assert a is None or same(a, b), (name, int((a != b).sum()), a.numel())


def check_step(jobs: Sequence[Job], operator: Operator = DARE, **shape: Any) -> None:
    ours, theirs = run(jobs, operator, **shape)
    check_near(ours, theirs, jobs)


# -- masks


def check_masks(layout: Layout, rate: float, *, seed: int, step: int, name: str) -> None:
    one = torch.ones(layout.local)
    job = given(one, one, layout=layout, rate=rate, step=step, seed=seed, name=name)
    engine().step([job], DARE)
    drawn = [
        bernoulli_mask(layout.local, rate, MaskKey(seed, stream, step, name), place=Place(layout))
        for stream in (UPDATE, DELTA)
    ]
    assert torch.equal(job.param, drawn[0] * 1.0 + drawn[1] * 2.0), (layout, rate, seed, step)


@case
def masks_over_seeds_steps_and_rates() -> None:
    for i, rate in enumerate((0.5, 0.01, 1 / 3, 1e-10, 1 - 1e-10)):
        seed, step = ((0, 1), (2**64 - 1, 7), (12345, 2**40 + 3))[i % 3]
        check_masks(Layout.whole((700,)), rate, seed=seed, step=step, name=f"layer.{i}")


@case
def masks_of_shards() -> None:
    for layout in (
        Layout((40, 30), start=(13, 0), local=(11, 30)),  # rows
        Layout((40, 30), start=(0, 9), local=(40, 8)),  # columns
        Layout((6, 7, 8), start=(1, 2, 3), local=(4, 3, 5)),  # both: several pieces
        Layout((6, 7), start=(6, 0), local=(0, 7)),  # nothing
    ):
        check_masks(layout, 0.4, seed=3, step=5, name="shard")


@case
def masks_of_indices_above_32_bits() -> None:
    for layout in (
        Layout((1 << 34,), start=((1 << 32) - 100,), local=(300,)),  # across a multiple of 2^32
        Layout((6 << 32,), start=(5 << 32,), local=(200,)),
        Layout((7, 1 << 31), start=(0, 50), local=(7, 60)),  # two rows in each
        Layout((5, (1 << 32) - 9), start=(0, 0), local=(5, 40)),  # rows that begin below and end above
    ):
        check_masks(layout, 0.4, seed=3, step=5, name="large")


@case
def masks_in_the_boundary_cell() -> None:
    """The finer 16 bits decide: at p = (U + 1)/2^32 an entry is kept, at p = U/2^32 it is not."""
    layout = Layout.whole((64,))
    for stream in (UPDATE, DELTA):
        u = int(uniform_u32((64,), MaskKey(3, stream, 5, "edge"))[17])
        assert u & 0xFFFF, "of no use: choose another entry"
        for threshold in (u, u + 1):
            check_masks(layout, threshold / 2**32, seed=3, step=5, name="edge")


# -- formats


@case
def parameters_gradients_and_moments_in_their_formats() -> None:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    jobs = [
        make_job(dtype=bf16, stored="residual", grad=bf16, moment=bf16, name="a"),
        make_job(dtype=bf16, stored="stochastic", grad=bf16, name="b"),
        make_job(dtype=bf16, stored="nearest", grad=fp32, moment=bf16, name="c"),
        make_job(dtype=fp16, stored="residual", grad=fp16, name="d"),
        make_job(dtype=fp16, stored="stochastic", name="e"),
        make_job(dtype=fp16, stored="nearest", name="f"),
        make_job(dtype=fp32, stored="residual", anchored=True, reopen=True, name="g"),
        make_job(dtype=fp32, stored="stochastic", moment=bf16, name="h"),
        make_job(dtype=fp32, grad=torch.float64, name="i"),
    ]
    check_step(jobs)


@case
def splitting_and_rounding_of_special_values() -> None:
    values = torch.tensor(
        [0.0, -0.0, 1e-40, -3e-45, 6e-8, 6e-5, 65519.0, 65520.0, 3.4e38, INF, -INF, NAN, 1.00390625]
    )
    tips = torch.tensor([1 + 2**-10 + 2**-11 - 2**-23, -(1 + 2**-10 + 2**-11 - 2**-23)])  # in fp16
    random = torch.randn(300).exp() * torch.randn(300).sign()
    start = torch.cat([values, tips, random, random * 1e-39, random * 1e-7])
    for dtype, stored in (
        (torch.bfloat16, "residual"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "nearest"),
        (torch.float16, "residual"),
        (torch.float16, "stochastic"),
        (torch.float16, "nearest"),
        (torch.float32, "residual"),
        (torch.float32, "stochastic"),
    ):
        job = given(start, torch.zeros_like(start), rate=1.0, weights=(1.0, 0.0))
        job.param, job.stored = torch.zeros(start.shape, dtype=dtype), stored
        if stored == "residual":
            job.residual = split_master(torch.zeros(start.shape, dtype=master_dtype(dtype, stored)), dtype)[1]
        ours, theirs = run([job], DARE)
        check_equal(ours, theirs)


@case
def residuals_that_would_tip_their_weight_over() -> None:
    """Rounded up to half a unit of the weight, a residual steps back: rare, so many entries."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        job = make_job((200, 100), dtype, "residual", merge=False, lr=1e-6)
        ours, theirs = run([job], DARE, block=1 << 15)
        check_equal(ours, theirs)


@case
def deltas_in_their_formats() -> None:
    rows, columns = Layout((40, 30), (13, 0), (11, 30)), Layout((40, 300), (0, 100), (40, 9))
    inner = Layout((6, 7, 8), (1, 2, 3), (4, 3, 5))

    def coded(layout: Layout) -> Callable[[Tensor], Any]:
        whole, cover = torch.randn(layout.shape) * 0.1, block_cover(layout)
        return lambda _: hold_int8(whole[cover.slices()], layout, cover=cover)

    jobs = [
        make_job(tau=lambda x: hold_dense(x, torch.bfloat16), name="a"),
        make_job(tau=lambda x: hold_dense(x, masked=True), name="b"),
        make_job(tau=coded(Layout.whole((10, 30))), name="c"),
        make_job(tau=coded(rows), layout=rows, name="d"),
        make_job(tau=coded(columns), layout=columns, name="e"),
        make_job(tau=lambda x: hold_sparse(x * (x.abs() > 0.1)), name="f"),
        make_job(tau=lambda x: hold_sparse(x * (x.abs() > 0.1), torch.bfloat16), name="g"),
        make_job(tau=lambda x: hold_sparse(x * 0), name="h"),
        make_job(tau=lambda x: hold_sparse(x * (x.abs() > 0.1)), layout=columns, name="j"),
        make_job(tau=lambda x: hold_sparse(x * (x.abs() > 0.1)), layout=inner, name="k"),
        make_job(
            (300, 300), tau=lambda x: hold_sparse(x * (x.abs() > 0.3)), name="i"
        ),  # past a block of 65,536
    ]
    check_step(jobs, block=1 << 14)


# -- arithmetic


@case
def steps_without_a_merge() -> None:
    jobs = [
        make_job(merge=False),
        make_job(merge=False, anchored=True, reopen=True),
        make_job(merge=False, decay_after=True, maximize=True),
        make_job(merge=False, amsgrad=True, beta1=0.4, beta2=0.95, step=1),
        make_job(merge=False, moment=torch.bfloat16, dtype=torch.bfloat16, stored="residual"),
    ]
    for job in (make_job(merge=False), make_job(merge=False, dtype=torch.bfloat16, stored="nearest")):
        job.grad = None
        jobs.append(job)
    check_step(jobs)


@case
def merges_of_every_kind() -> None:
    jobs = [
        make_job(anchored=True, reopen=True),
        make_job(anchored=True, decay_after=True),
        make_job(decay_after=True, maximize=True, rate=0.02),
        make_job(amsgrad=True, beta1=0.4, beta2=0.95, step=1),
        make_job(rate=1.0),
    ]
    around = make_job(anchored=True)  # what a wrapper hands in: Δ is what another optimizer added
    around.grad = around.exp_avg = around.exp_avg_sq = None
    for operator in (Operator("bernoulli", "expected", "linear"), Operator("none", "none", "sign")):
        check_step([*jobs, around], operator)


@case
def specials_in_moments_and_gradients() -> None:
    job = make_job((40,), amsgrad=True)
    assert job.grad is not None
    job.grad[:6] = torch.tensor([NAN, INF, -INF, 1e30, 0.0, 1e-42])
    job.exp_avg_sq[6:10] = torch.tensor([0.0, INF, NAN, 1e-44])
    job.exp_avg[10:12] = torch.tensor([INF, 0.0])
    other = clone(job)
    other.max_exp_avg_sq = None
    check_step([job, other])


@case
def consensus_with_nan_infinity_and_zero() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, NAN, 1e-45, 3e38, INF, -INF])
    for weights in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.25, 0.75)):
        values = (
            special if all(weights) else special[:-2]
        )  # 0·∞ is a NaN, and of which sign the processor decides
        update, tau = torch.cartesian_prod(values, values).unbind(1)
        jobs = [given(update.contiguous(), tau.contiguous(), rate=1.0, weights=weights)]
        for consensus in ("linear", "sign", "sign_unweighted"):
            ours, theirs = run(jobs, Operator("bernoulli", "none", consensus))
            check_equal(ours, theirs)


@case
def division_by_a_scalar_is_rounded_to_nearest() -> None:
    import triton
    import triton.language as tl

    from trimtab.ops.kernels.triton_kernels import over_scalar

    globals().update(tl=tl, over_scalar=over_scalar)

    @triton.jit
    def divide(x, y, out, N: tl.constexpr):
        lane = tl.arange(0, N)
        tl.store(out + lane, over_scalar(tl.load(x + lane), tl.load(y), True))

    x = torch.cat(
        [
            torch.rand(8000),
            torch.randn(180).exp() * 1e-20,
            torch.tensor([0.0, INF, NAN, 1e19, 3.7e-23, 2e-22]),
        ]
    )
    x = torch.cat([x, torch.ones(8192 - len(x))])
    for y in ((1 - 0.999) ** 0.5, (1 - 0.999**5) ** 0.5, (1 - 0.95**9) ** 0.5, 1.0, 1 - 2**-23):
        divisor, out = torch.tensor([y]), torch.empty_like(x)
        divide[(1,)](x, divisor, out, N=8192)
        assert same(out, x / divisor), y
    powers, out = (
        2.0 ** torch.arange(-64, 64),
        torch.empty(128),
    )  # one divisor has a reciprocal that is no help
    divide[(1,)](powers, torch.tensor([1 - 2**-24]), out, N=128)
    assert float(((out - powers) / powers).abs().max()) <= 2**-23


# -- top


def check_top(update: Tensor, count: int, *, todo: set[int], tau: Tensor | None = None, **shape: Any) -> None:
    """The cut is that of `top_cut`, found in the way that is expected (`todo`)."""
    job = given(update, torch.randn(update.shape) if tau is None else tau)
    job.count = count
    runner = engine(**shape)
    runner.step([job], TOP)
    plan = next(iter(job.cache.plans.values()))
    assert set(plan.search.states[:, -1].tolist()) == todo, plan.search.states
    expected = given(update, job.tau.dense(0, update.numel()))
    expected.count = count
    expected.cuts = (top_cut(update, count), None)
    TorchEngine().step([expected], TOP)
    assert same(job.param, expected.param), (count, shape)


WHOLE_BIN, CHOSEN, EXHAUSTED = {0}, {1}, {2}


@case
def top_from_a_bracket() -> None:
    update = torch.randn(3000)
    check_top(update, 900, todo=CHOSEN, samples=512, bins=256)
    check_top(update * 1e-30, 20, todo=CHOSEN, samples=512, bins=256)  # no upper end


@case
def top_of_small_tensors_and_of_extreme_counts() -> None:
    for n, count in ((2, 1), (50, 49)):
        check_top(torch.randn(n), count, todo=WHOLE_BIN)
    wide = torch.randn(700)
    wide[5], wide[6] = 1e30, 1e-30
    check_top(wide, 1, todo=WHOLE_BIN, spread=0.0)
    check_top(wide, 699, todo=WHOLE_BIN, spread=0.0)


@case
def top_with_ties() -> None:
    update = torch.randint(-3, 4, (900,)).float()
    check_top(update, 300, todo=EXHAUSTED)  # more of them than a bin may hold
    few = torch.randn(600)
    few[torch.randperm(600)[:9]] = few.abs().kthvalue(420).values
    few[::67] *= -1
    check_top(few, 600 - 420 + 4, todo=CHOSEN, short=32)
    check_top(torch.ones(500), 123, todo=EXHAUSTED)
    check_top(-torch.ones(40), 39, todo=CHOSEN, short=64)
    for tied, todo in ((16, CHOSEN), (17, EXHAUSTED)):
        check_top(torch.cat([torch.rand(20), torch.ones(tied)]), 5, todo=todo, short=16)


@case
def top_where_the_threshold_is_zero() -> None:
    update = torch.zeros(800)
    update[::9] = torch.randn(89)
    check_top(update, 400, todo=WHOLE_BIN)
    check_top(torch.zeros(300), 5, todo=WHOLE_BIN)


@case
def top_with_nan_and_infinity() -> None:
    update = torch.randn(600)
    update[[3, 99, 300]], update[[4, 555]], update[7] = NAN, INF, -INF
    check_top(update, 2, todo=CHOSEN, spread=0.0)
    check_top(update, 5, todo=CHOSEN, spread=0.0)
    check_top(update, 100, todo=CHOSEN, samples=256, bins=256, short=64)


@case
def top_where_the_bracket_misses() -> None:
    """A bracket of two neighbours in a small sample: the threshold lies below it, or above it."""
    update = torch.randn(700)
    for count in (200, 500):
        check_top(update, count, todo=EXHAUSTED, samples=16, spread=0.0, block=1024)


@case
def top_where_the_list_overflows() -> None:
    """A sample that says nothing of the rest: the list has no room for what lies in the bracket."""
    update = torch.cat([torch.full((2000,), 1.0) + torch.rand(2000) * 1e-3, torch.rand(40)])
    check_top(update, 1000, todo=EXHAUSTED, samples=16, spread=0.0)


@case
def whole_steps_with_top() -> None:
    """Given the Δ that this engine forms, everything else is the torch engine's, bit for bit."""
    jobs = [
        make_job(),
        make_job((900,), name="b"),
        make_job((0, 3), name="c"),
        make_job(moment=torch.bfloat16, dtype=torch.bfloat16, stored="residual", name="d"),
        make_job(anchored=True, amsgrad=True, name="e"),
        make_job(tau=lambda x: hold_sparse(x * (x.abs() > 0.1)), name="f"),
        make_job((4, 5), rate=0.999, name="g"),
    ]
    for moment in (torch.float32, torch.bfloat16):  # Adam's first step: nothing but ties
        first = make_job((300,), step=1, moment=moment, name=f"first {moment}")
        first.exp_avg.zero_(), first.exp_avg_sq.zero_(), first.grad.sign_()
        jobs.append(first)
    ours, formed = [clone(job) for job in jobs], [clone(job) for job in jobs]
    runner = engine(short=64)
    runner.step(ours, TIES)
    runner.update(formed)
    TorchEngine().step(formed, TIES)
    for job in formed:
        job.update = None
    check_equal(ours, formed)
    ours, formed = [clone(job) for job in jobs], [clone(job) for job in jobs]
    runner.step(ours[-2:], TOP)
    runner.update(formed[-2:])
    TorchEngine().step(formed[-2:], TOP)
    check_equal(ours[-2:], [replace(job, update=None) for job in formed[-2:]])
    for job, other in zip(ours[-2:], jobs[-2:], strict=True):
        assert job.param.numel() == 0 or not torch.equal(job.exp_avg, other.exp_avg)


# -- lists of jobs


@case
def shards_with_cuts_that_were_settled() -> None:
    whole = make_job((12, 50), name="s")
    alone, twin = clone(whole), clone(whole)
    runner = engine()
    runner.update([twin])
    cuts = top_cut(twin.update, whole.count), top_cut(whole.tau.dense(0, 600), whole.count)
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):
        layout = Layout((12, 50), (rows.start, 0), (rows.stop - rows.start, 50))
        part = clone(whole)
        part.layout, part.tau = layout, DenseTau(whole.tau.values.view(12, 50)[rows].reshape(-1).clone())
        for name in ("param", "exp_avg", "exp_avg_sq", "grad"):
            setattr(part, name, getattr(whole, name)[rows].clone())
        parts.append(part)
    runner.update(parts)
    for part in parts:
        part.cuts = cuts
    runner.step(parts, TIES)
    runner.step([alone], TIES)
    assert torch.equal(torch.cat([part.param for part in parts]), alone.param)
    assert torch.equal(torch.cat([part.exp_avg for part in parts]), alone.exp_avg)


@case
def steps_one_after_the_other() -> None:
    """New gradients, settings and deltas each time; equal steps share their preparation."""
    jobs = [
        make_job(name="a"),
        make_job((7,), name="b"),
        make_job((0,), name="c"),
        make_job((3, 5, 7), name="d"),
    ]
    ours, theirs = [clone(job) for job in jobs], [clone(job) for job in jobs]
    runner, other = engine(), TorchEngine()
    for step, merge in ((4, True), (5, False), (6, True), (7, True)):
        for pair in zip(ours, theirs, strict=True):
            grad = torch.randn(pair[0].param.shape)
            lr = 1e-2 if pair[0].name in "ab" else 2e-2
            for job in pair:
                job.grad = grad.clone()
                job.settings = replace(
                    job.settings, step=step, merge=merge, lr=lr, rate=1 / step, weights=(0.5, 0.5)
                )
        if step == 7:  # an unusual gradient: not contiguous
            wide = torch.randn(10, 60)
            ours[0].grad, theirs[0].grad = wide[:, ::2], wide[:, ::2].clone()
        runner.step(ours, DARE)
        other.step(theirs, DARE)
        check_near(ours, theirs, jobs)
    plans = ours[0].cache.plans
    assert len(plans) == 3, list(plans)  # p = 1/4 is drawn from 16 bits alone; the plain step; the other two
    assert all(len(plan.launches) <= 2 for plan in plans.values())


@dataclass(slots=True, eq=False)
class ClockedJob(Job):
    """A job whose step count and learning rate lie on the device, as a captured graph needs them."""

    device_step: Tensor | None = None
    device_lr: Tensor | None = None


@case
def a_step_count_and_a_learning_rate_on_the_device() -> None:
    plain = make_job(decay=1 - 1e-2 * 0.1, name="clock")
    fields = {name: getattr(plain, name) for name in Job.__slots__}
    clocked = ClockedJob(**(fields | {"cache": None}))
    for name in TENSORS:
        tensor = getattr(plain, name)
        setattr(clocked, name, None if tensor is None else tensor.clone())
    clocked.device_step, clocked.device_lr = torch.tensor([0.0]), torch.tensor([0.0])
    start, runner = clone(plain), engine()
    for step, lr in ((3, 1e-2), (4, 5e-3), (1000, 1e-3)):
        clocked.device_step.fill_(step)
        clocked.device_lr.fill_(lr)
        runner.step([clocked], DARE)  # its settings say step 3 and 1e-2 all the time
        rate = float(clocked.device_lr)
        plain.settings = replace(plain.settings, step=step, lr=rate, decay=1 - rate * 0.1)
        TorchEngine().step([plain], DARE)
        check_near([clocked], [plain], [start])


@case
def what_it_refuses_the_torch_engine_does() -> None:
    runner = engine()
    sharded = Layout((40, 30), (0, 0), (20, 30))
    refused = {
        "fp32, bf16 and fp16": (make_job(dtype=torch.float64), DARE),
        "l1": (make_job(), Operator("bernoulli", "l1", "linear")),
        "normalize": (make_job(), Operator("bernoulli", "none", "linear", normalize=True)),
        "fp32 or bf16, not in torch.float64": (make_job(tau=lambda x: hold_dense(x, torch.float64)), DARE),
        "contiguous": (make_job((6, 8)), DARE),
        "anchor": (make_job(anchored=True), DARE),
        "fewer than": (
            make_job(layout=Layout((1 << 31, 1), (0, 0), (9, 1)), tau=lambda x: hold_dense(x, masked=True)),
            TIES,
        ),
    }
    refused["contiguous"][0].param = torch.randn(8, 6).t()
    refused["anchor"][0].anchor = refused["anchor"][0].anchor.double()
    for words, (job, operator) in refused.items():
        reason = runner.refuses(job, operator)
        assert reason is not None, words
        assert words in reason, (words, reason)
    assert runner.refuses(make_job(layout=sharded), DARE) is None
    late = make_job(tau=lambda x: hold_dense(x, torch.float64))  # what the first step did not show
    twin = clone(late)
    runner.step([late, make_job(name="other")], DARE)
    TorchEngine().step([twin], DARE)
    check_equal([late], [twin])


def patch_once() -> None:
    """Let the interpreter put its functions in place once for each module, instead of at every call."""
    import triton.runtime.interpreter as interpreter

    patch, done = interpreter._patch_lang, set()

    class Stays:
        def restore(self) -> None:
            pass

    def patched(function: Any) -> Stays:
        module = function.__globals__["__name__"]
        if module not in done:
            done.add(module)
            patch(function)
        return Stays()

    interpreter._patch_lang = patched


def launches() -> list[str]:
    """What the engine launches for lists of jobs, compiled for compute capability 9.0 but not run.

    Needs no GPU: a driver that knows its target is enough up to the launch itself.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from trimtab.ops.kernels import triton_kernels, triton_select
    from trimtab.ops.kernels.triton_engine import TritonEngine

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    class Compiled:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                made = self.kernel.run(*arguments, grid=grid, warmup=True, **options)
                found.append(f"{self.kernel.__name__} {grid[0]} {made.metadata.num_warps}")

            return launch

    found: list[str] = []
    driver.set_active(Driver())
    for module, names in (
        (triton_kernels, ("sweep", "tick")),
        (triton_select, ("sample", "scan", "narrow", "gather", "choose", "exhaust")),
    ):
        for name in names:
            setattr(module, name, Compiled(getattr(module, name)))
    runner = TritonEngine()
    runner.refuses = lambda job, operator: None  # it would: these tensors lie on the CPU
    for operator in (DARE, TIES):
        jobs = [make_job((64, 32)), make_job((7,), torch.bfloat16, "residual"), make_job((40_000,))]
        runner.step(jobs, operator)
    runner.update([make_job()])
    return found


def main() -> None:
    """Run the cases that are named, or all; or say what is launched."""
    if sys.argv[1:] == ["launches"]:
        print(json.dumps(launches()))
        return
    warnings.simplefilter("ignore")  # NumPy on infinities; the interpreter computes with it
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with rubbish
    patch_once()
    results = {}
    for name in sys.argv[1:] or list(CASES):
        torch.manual_seed(0)
        begin = time.process_time()
        try:
            CASES[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.process_time() - begin:.2f} CPU seconds", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
