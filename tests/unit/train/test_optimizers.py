"""From a recipe to optimizers and schedules."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trimtab import OnDARE, OnlineMerging, OnTIES, ReferenceDelta, UserError
from trimtab.optim import GaLoreAdamW
from trimtab.optim.diagnostics import log_values
from trimtab.recipe import make_recipe
from trimtab.train.optimizers import OptimizerPlan


@pytest.fixture(scope="module")
def policy(tiny_models: tuple[Path, Path]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_models[1])


@pytest.fixture(scope="module")
def delta(tiny_models: tuple[Path, Path]) -> ReferenceDelta:
    return ReferenceDelta.between(reference=tiny_models[1], base=tiny_models[0])


def plan_for(
    models: tuple[Path, Path], delta: ReferenceDelta | None, tmp_path: Path, **sections: Any
) -> OptimizerPlan:
    base = {"base": str(models[0])} if delta is not None else {}
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.preference_rows(2))
    values = {
        "method": "dpo",
        "reference": str(models[1]),
        "data": {"train": str(rows)},
        "output": str(tmp_path / "o"),
    }
    return OptimizerPlan.from_recipe(make_recipe({**values, **base, "seed": 7, **sections}), delta)


def build(plan: OptimizerPlan, model: torch.nn.Module) -> Any:
    return plan.build(model, {name for name, _ in model.named_parameters() if "norm" not in name})


def test_adamw_is_torch_s_own(tiny_models: Any, policy: Any, tmp_path: Path) -> None:
    section = {"name": "adamw", "lr": 1e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.2}
    optimizer = build(plan_for(tiny_models, None, tmp_path, optimizer=section), policy)
    assert type(optimizer) is torch.optim.AdamW
    decayed, plain = optimizer.param_groups
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.2, 0.0]
    assert all((g["lr"], g["betas"], g["eps"]) == (1e-4, (0.8, 0.9), 1e-7) for g in optimizer.param_groups)
    assert log_values(optimizer) == {}


@pytest.mark.parametrize(("name", "kind"), [("ondare", OnDARE), ("onties", OnTIES)])
def test_merging_settings_reach_the_optimizer(
    name: str, kind: type, tiny_models: Any, policy: Any, delta: Any, tmp_path: Path
) -> None:
    groups = [{"pattern": "layers.1", "merge_weight": 1e-3, "merge_every": 2}]
    section = {"name": name, "lr": 1e-5, "reserve_rate": 0.25, "merge_weight": 1e-5, "groups": groups}
    section |= {"rescale": "l1", "rounding": "stochastic", "redraw": False, "measure_every": 3}
    optimizer = build(plan_for(tiny_models, delta, tmp_path, optimizer=section), policy)
    assert type(optimizer) is kind
    assert {(g["merge_weight"], g["merge_every"]) for g in optimizer.param_groups} == {(1e-5, 1), (1e-3, 2)}
    assert {g["reserve_rate"] for g in optimizer.param_groups} == {0.25}
    merging = optimizer.merging
    assert (merging.seed, merging.rounding, merging.preset.redraw, optimizer.measure_every) == (
        7,
        "stochastic",
        False,
        3,
    )
    assert merging.preset.operator.rescale == "l1"


def test_any_pairing_goes_around_adamw(tiny_models: Any, policy: Any, delta: Any, tmp_path: Path) -> None:
    section = {"name": "online_merging", "lr": 1e-5, "sparsify": "bernoulli", "consensus": "sign"}
    section |= {"reserve_rate": 0.5, "merge_weight": 1e-5}
    optimizer = build(plan_for(tiny_models, delta, tmp_path, optimizer=section), policy)
    assert isinstance(optimizer, OnlineMerging)
    assert type(optimizer.optimizer) is torch.optim.AdamW
    operator = optimizer.merging.preset.operator
    assert (operator.sparsify, operator.consensus) == ("bernoulli", "sign")


PLAIN = {
    "adafactor": (torch.optim.Adafactor, {}),
    "galore": (GaLoreAdamW, {"galore": {"rank": 4, "scale": 0.5}, "betas": [0.8, 0.9], "eps": 1e-7}),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
def test_other_optimizers_alone_and_wrapped(
    name: str, wrapped: bool, tiny_models: Any, policy: Any, delta: Any, tmp_path: Path
) -> None:
    kind, settings = PLAIN[name]
    section = {"name": name, "lr": 1e-4, "weight_decay": 0.2, **settings}
    if wrapped:
        section |= {"name": "online_merging", "inner": name, "sparsify": "top", "consensus": "sign"}
    plan = plan_for(tiny_models, delta if wrapped else None, tmp_path, optimizer=section)
    optimizer = build(plan, policy)
    if wrapped:
        assert type(optimizer) is OnlineMerging
        assert optimizer.decoupled_decay is True
        optimizer = optimizer.optimizer
    assert type(optimizer) is kind
    decayed, plain = optimizer.param_groups
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.2, 0.0]
    assert decayed["lr"] == 1e-4
    if name == "galore":
        assert [decayed[key] for key in ("rank", "update_proj_gap", "scale")] == [4, 200, 0.5]
        assert (decayed["betas"], decayed["eps"]) == ((0.8, 0.9), 1e-7)


def test_without_torchao_the_line_that_installs_it_is_given(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.optim.subclass_8bit", raising=False)
    sentence = (
        "optimizer adamw_8bit keeps Adam's moments in torchao's 8-bit blocks, and torchao cannot be imported "
        "here; install it with: pip install 'trimtab[lowbit]'"
    )
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan_for(tiny_models, None, tmp_path, optimizer={"name": "adamw_8bit", "lr": 1e-4})


def test_schedules_scale_what_each_group_starts_with(
    tiny_models: Any, policy: Any, delta: Any, tmp_path: Path
) -> None:
    groups = [{"pattern": "norm", "merge_weight": 4e-3}]
    section = {"name": "ondare", "lr": 1e-5, "reserve_rate": 0.5, "merge_weight": 1e-3, "groups": groups}
    schedule = {
        "merge_weight": {"type": "linear", "warmup_steps": 2},
        "reserve_rate": {"type": "linear", "end": 0.5},
    }
    plan = plan_for(tiny_models, delta, tmp_path, optimizer=section, schedule=schedule)
    optimizer = build(plan, policy)
    plan.schedule(optimizer, 4)
    seen = []
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in policy.parameters()]
    for _ in range(4):
        optimizer.step()
        seen.append([(g["merge_weight"], g["reserve_rate"]) for g in optimizer.param_groups])
    for p, start in zip(policy.parameters(), before, strict=True):
        p.data.copy_(start)
        p.grad = None
    factors, rates = [0.0, 0.5, 1.0, 0.5], [0.5, 0.4375, 0.375, 0.3125]
    expected = [[(1e-3 * f, p), (4e-3 * f, p)] for f, p in zip(factors, rates, strict=True)]
    assert [sorted(step) for step in seen] == [sorted(step) for step in expected]


def test_a_pattern_without_parameters_is_refused_by_its_place_in_the_recipe(
    tiny_models: Any, policy: Any, delta: Any, tmp_path: Path
) -> None:
    section = {"name": "ondare", "lr": 1e-5, "groups": [{"pattern": "emebd", "lr": 1e-6}]}
    with pytest.raises(UserError, match=r"^optimizer.groups.0.pattern 'emebd' finds none of the"):
        build(plan_for(tiny_models, delta, tmp_path, optimizer=section), policy)
