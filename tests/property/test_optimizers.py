"""Whole optimizer steps against the float64 oracle, over several steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.oracle import reference as oracle
from tests.property.runs import Policy, Twin, normal_grads
from tests.property.strategies import bounded
from trimtab import OnDARE, OnlineMerging, OnTIES

CLASSES = {"ondare": OnDARE, "onties": OnTIES}
METHODS = {
    ("ondare", "paper"): oracle.PAPER["ondare"],
    ("onties", "paper"): oracle.PAPER["onties"],
    ("ondare", "released"): oracle.RELEASED["ondare"],
    ("onties", "released"): oracle.RELEASED["onties"],
    ("ondare", "mergekit"): oracle.Method("bernoulli", "linear", rescale="l1"),
    ("onties", "mergekit"): oracle.Method("top", "sign", count=oracle.mergekit_top_count),
}
SHAPES = [(), (1,), (0,), (0, 3), (7,), (4, 5), (2, 3, 2), (33,)]
FP64 = 1e-12  # of max(1, |theta|), over all steps of a run


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    fidelity = draw(st.sampled_from(["paper", "paper", "released", "mergekit"]))
    length = draw(st.integers(1, 7))
    count = draw(st.integers(1, 3))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=count, max_size=count))
    rests = st.lists(st.booleans(), min_size=count, max_size=count)
    return {
        "method": draw(st.sampled_from(["ondare", "onties"])),
        "fidelity": fidelity,
        "shapes": {f"p{i}": shape for i, shape in enumerate(shapes)},
        "lr": draw(st.sampled_from([1e-3, 1e-2, 0.1])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.5)])),
        "weight_decay": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "reserve_rate": draw(st.sampled_from([1.0, 0.999, 0.5, 1 / 3, 0.07, 5e-4])),
        "merge_weight": draw(st.sampled_from([0.0, 1e-7, 1e-3, 0.5, 1.0])),
        # released has no meaning beyond K = 1: its decay comes after the merge
        "merge_every": 1 if fidelity == "released" else draw(st.sampled_from([1, 2, 3, 5, length, 100])),
        "seed": draw(st.sampled_from([0, 1, 2**63])),
        "resting": draw(st.lists(rests, min_size=length, max_size=length)),
        "halted": draw(st.lists(st.integers(0, 5), min_size=length, max_size=length)),
        "poison": draw(st.sampled_from([None, None, None, math.nan, math.inf])),
    }


@bounded(120)
@given(run=runs())
def test_ondare_and_onties_follow_the_oracle(run: dict[str, Any]) -> None:
    released = run["fidelity"] == "released"
    # α = 0 with F the identity skips the merge by definition, although the released vote would still count τ
    assume(run["method"] == "ondare" or not released or run["merge_weight"] > 0 or run["reserve_rate"] < 1)
    policy = Policy.make(run["shapes"], seed=3, tau_scale=3.0 if released else 0.5)
    fields = ("lr", "weight_decay", "reserve_rate", "merge_weight", "merge_every")
    settings = {key: run[key] for key in fields}
    optimizer = CLASSES[run["method"]](
        policy.named(),
        policy.delta,
        **settings,
        betas=run["betas"],
        seed=run["seed"],
        fidelity=run["fidelity"],
        measure_every=0,
    )
    adam = {"beta1": run["betas"][0], "beta2": run["betas"][1], "eps": 1e-6 if released else 1e-8}
    settings["decay"] = settings.pop("weight_decay")
    twin = Twin(
        policy,
        METHODS[run["method"], run["fidelity"]],
        inner=lambda _: oracle.Adam(**adam, released=released),
        settings=lambda _: settings,
        seed=run["seed"],
        redraw=not released,
    )
    for t, resting in enumerate(run["resting"]):
        grads = normal_grads(policy, seed=50 + t)
        for name, rests in zip(run["shapes"], resting, strict=True):
            grads[name] = None if rests else grads[name]
        lr = 0.0 if run["halted"][t] == 0 else run["lr"]
        if t == 1 and lr and run["poison"] is not None and grads["p0"] is not None and grads["p0"].numel():
            grads["p0"].view(-1)[0] = run["poison"]
        optimizer.param_groups[0]["lr"] = lr
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads, lr=lr)
        twin.check(FP64)
    optimizer.param_groups[0]["lr"] = run["lr"]
    optimizer.merge_now()
    twin.merge_now()
    twin.check(FP64)


INNER: dict[str, tuple[Callable[[Any, float], torch.optim.Optimizer], Callable[..., Any], bool]] = {
    # name: (torch's optimizer given parameters and its weight decay, the oracle's given that and a shape,
    # whether the decay is decoupled)
    "sgd": (
        lambda q, d: torch.optim.SGD(q, lr=0.05, momentum=0.9, nesterov=True, weight_decay=d),
        lambda d, _: oracle.SGD(momentum=0.9, nesterov=True, l2=d),
        False,
    ),
    "adamw": (
        lambda q, d: torch.optim.AdamW(q, lr=0.01, betas=(0.8, 0.9), weight_decay=d),
        lambda d, _: oracle.Adam(beta1=0.8, beta2=0.9),
        True,
    ),
    "adamw, foreach": (
        lambda q, d: torch.optim.AdamW(q, lr=0.01, weight_decay=d, foreach=True),
        lambda d, _: oracle.Adam(),
        True,
    ),
    "adam": (
        lambda q, d: torch.optim.Adam(q, lr=0.01, weight_decay=d),
        lambda d, _: oracle.Adam(l2=d),
        False,
    ),
    "adam, decoupled": (
        lambda q, d: torch.optim.Adam(q, lr=0.01, weight_decay=d, decoupled_weight_decay=True),
        lambda d, _: oracle.Adam(),
        True,
    ),
    "rmsprop": (
        lambda q, d: torch.optim.RMSprop(q, lr=0.01, momentum=0.5, centered=True, weight_decay=d),
        lambda d, _: oracle.RMSprop(momentum=0.5, centered=True, l2=d),
        False,
    ),
    "adafactor": (
        lambda q, d: torch.optim.Adafactor(q, lr=0.05, weight_decay=d),
        lambda _, shape: oracle.Adafactor(shape=shape),
        True,
    ),
}


@st.composite
def wrappings(draw: st.DrawFn) -> dict[str, Any]:
    length, kind = draw(st.integers(1, 6)), draw(st.sampled_from(["none", "bernoulli", "top"]))
    rescales = {"none": ["none"], "bernoulli": ["none", "expected", "l1"], "top": ["none", "l1"]}[kind]
    return {
        "inner": draw(st.sampled_from(sorted(INNER))),
        "decay": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "lrs": draw(st.lists(st.sampled_from([1.0, 1.0, 0.5, 0.0]), min_size=length, max_size=length)),
        "merge": {
            "sparsify": kind,
            "rescale": draw(st.sampled_from(rescales)),
            "consensus": draw(st.sampled_from(["linear", "sign", "sign_unweighted"])),
            "reserve_rate": draw(st.sampled_from([1.0, 0.5, 1 / 3, 0.07])),
            "merge_weight": draw(st.sampled_from([0.0, 1e-7, 0.3, 1.0])),
            "merge_every": draw(st.sampled_from([1, 2, 3, 5])),
            "redraw": draw(st.booleans()),
            "seed": draw(st.sampled_from([0, 9])),
        },
    }


@bounded(150)
@given(run=wrappings())
def test_online_merging_follows_the_oracle_around_any_optimizer(run: dict[str, Any]) -> None:
    merge = run["merge"]
    # as above: skipped by definition, although τ would have its vote
    assume(merge["consensus"] != "sign_unweighted" or merge["merge_weight"] > 0)
    shapes = {"scalar": (), "vector": (7,), "matrix": (4, 5)}
    if run["inner"] == "adafactor" and merge["sparsify"] == "top":
        shapes = {"matrix": (4, 5)}  # a vector's first update is all ties, which θ_after − θ_before blurs
    policy = Policy.make(shapes, seed=4)
    make, make_oracle, decoupled = INNER[run["inner"]]
    inner = make(policy.named(), run["decay"])
    optimizer = OnlineMerging(inner, policy.delta, **merge, measure_every=0)
    full = inner.param_groups[0]["lr"]
    twin = Twin(
        policy,
        oracle.Method(merge["sparsify"], merge["consensus"], rescale=merge["rescale"]),
        inner=lambda name: make_oracle(run["decay"], tuple(policy.start[name].shape)),
        settings=lambda _: {
            "lr": full,
            "decay": run["decay"] if decoupled else 0.0,
            **{key: merge[key] for key in ("reserve_rate", "merge_weight", "merge_every")},
        },
        seed=merge["seed"],
        redraw=merge["redraw"],
    )
    for t, factor in enumerate(run["lrs"]):
        grads = normal_grads(policy, seed=80 + t)
        if t == 1:
            grads["vector"] = None
        inner.param_groups[0]["lr"] = full * factor
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads, lr=full * factor)
        twin.check(FP64)
    optimizer.merge_now()
    twin.merge_now()
    twin.check(FP64)
