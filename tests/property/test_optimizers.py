"""Whole optimizer steps against the float64 oracle, over several steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import reference as oracle
from tests.property.runs import Policy, Twin, normal_grads
from tests.property.strategies import as_float64, bounded
from trimtab import OnDARE, OnlineMerging, OnTIES, schedule

CLASSES = {"ondare": OnDARE, "onties": OnTIES}
METHODS = {
    ("ondare", "paper"): oracle.PAPER["ondare"],
    ("onties", "paper"): oracle.PAPER["onties"],
    ("ondare", "released"): oracle.RELEASED["ondare"],
    ("onties", "released"): oracle.RELEASED["onties"],
    ("ondare", "mergekit"): oracle.Method("bernoulli", "linear", rescale="l1"),
    ("onties", "mergekit"): oracle.Method("top", "sign", count=oracle.released_top_count),
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
    policy = Policy.make(run["shapes"], seed=3, tau_scale=3.0 if run["fidelity"] == "released" else 0.5)
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
    released = run["fidelity"] == "released"
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
        if t == 1 and run["poison"] is not None and grads["p0"] is not None and grads["p0"].numel():
            grads["p0"].view(-1)[0] = run["poison"]
        lr = 0.0 if run["halted"][t] == 0 else run["lr"]
        optimizer.param_groups[0]["lr"] = lr
        policy.set_grads(grads)
        optimizer.step()
        twin.step(grads, lr=lr)
        twin.check(FP64)
    optimizer.param_groups[0]["lr"] = run["lr"]
    optimizer.merge_now()
    twin.merge_now()
    twin.check(FP64)
