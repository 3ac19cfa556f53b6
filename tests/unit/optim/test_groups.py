"""Parameter groups by regular expressions: who goes where, what is frozen, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from tests.unit.optim.conftest import flat, small_model, take_step
from trimtab import OnDARE, UserError, parameter_groups


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def named(*wanted: str) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of one dimension where the name ends in bias or norm, else of two."""
    shapes = {name: (2,) if name.endswith(("bias", "norm")) else (2, 2) for name in wanted}
    return [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def settings(groups: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    return [(names(group), {key: group[key] for key in group if key != "params"}) for group in groups]


def test_decay_is_for_the_parameters_it_is_for_and_order_is_kept() -> None:
    parameters = named("embed", "up.weight", "up.bias", "norm", "down.weight")
    groups = parameter_groups(parameters, weight_decay=0.1, decayed={"embed", "up.weight", "down.weight"})
    assert settings(groups) == [
        (["embed", "up.weight", "down.weight"], {"weight_decay": 0.1}),
        (["up.bias", "norm"], {"weight_decay": 0.0}),
    ]


def test_biases_and_norms_do_not_decay_unless_named() -> None:
    parameters = named("embed", "up.weight", "up.bias", "norm")
    assert settings(parameter_groups(parameters, weight_decay=0.1)) == [
        (["embed", "up.weight"], {"weight_decay": 0.1}),
        (["up.bias", "norm"], {"weight_decay": 0.0}),
    ]


def test_without_a_decay_the_optimizer_s_own_holds_for_all() -> None:
    parameters = named("up.weight", "up.bias")
    assert settings(parameter_groups(parameters)) == [(["up.weight", "up.bias"], {})]
    optimizer = torch.optim.AdamW(parameter_groups(parameters), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_the_first_pattern_that_fits_counts_and_its_decay_holds_for_biases_too() -> None:
    parameters = named("embed", "up.weight", "up.bias", "head")
    rules = [
        {"pattern": "^up", "lr": 1e-4, "weight_decay": 0.3},
        {"pattern": "weight|head", "merge_every": 4},
    ]
    assert settings(parameter_groups(parameters, rules, weight_decay=0.1)) == [
        (["embed"], {"weight_decay": 0.1}),
        (["up.weight"], {"weight_decay": 0.3, "lr": 1e-4}),
        (["up.bias"], {"weight_decay": 0.3, "lr": 1e-4}),
        (["head"], {"weight_decay": 0.1, "merge_every": 4}),
    ]


def test_patterns_and_decayed_see_canonical_names() -> None:
    parameters = named("module._orig_mod.model.norm.weight", "base_model.model.q.lora_A.default.weight")
    rules = [{"pattern": r"^model\.norm\.weight$", "lr": 0.5}]
    groups = parameter_groups(parameters, rules, weight_decay=0.1, decayed={"q.lora_A.weight"})
    assert settings(groups) == [
        (["module._orig_mod.model.norm.weight"], {"weight_decay": 0.0, "lr": 0.5}),
        (["base_model.model.q.lora_A.default.weight"], {"weight_decay": 0.1}),
    ]


def test_frozen_parts_are_left_out_and_need_no_gradient() -> None:
    parameters = named("embed", "layers.0.up", "layers.1.up")
    rules = [{"pattern": "embed", "frozen": True}, {"pattern": r"layers\.0", "frozen": True}]
    assert [names(group) for group in parameter_groups(parameters, rules)] == [["layers.1.up"]]
    assert [p.requires_grad for _, p in parameters] == [False, False, True]
    again = parameter_groups(parameters, rules)  # as a run that resumes does
    assert [names(group) for group in again] == [["layers.1.up"]]


def test_parameters_that_need_no_gradient_are_left_out() -> None:
    parameters = named("base", "adapter")
    parameters[0][1].requires_grad_(False)
    assert [names(group) for group in parameter_groups(parameters)] == [["adapter"]]


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        (["up.wieght"], "rules.0.pattern 'up.wieght' finds none of the 2 trained .* nearest is 'up.weight'"),
        (["zzz"], "rules.0.pattern 'zzz' finds none of the 2 trained parameters; they are called like"),
        (["up", "weight"], "rules.1.pattern 'weight' finds only parameters that an earlier group has taken"),
        (["still"], "rules.0.pattern 'still' finds only parameters that require no gradient"),
        (["("], r"rules.0.pattern '\(' is no regular expression"),
        ([{"lr": 0.1}], "rules.0 needs a pattern"),
        ([{"pattern": "up", "merge_wieght": 0.1}], "unknown key 'merge_wieght' at rules.0; did you mean 'me"),
        ([{"pattern": "up", "frozen": True, "lr": 1}], "rules.0 freezes its parameters, so it cannot set"),
        ([{"pattern": "bias", "frozen": True}, "zzz"], "rules.1.pattern 'zzz' finds none"),
        ([{"pattern": "", "frozen": True}], "no parameter of the model is trainable"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_meant_is_refused_and_freezes_nothing(rules: list[Any], sentence: str) -> None:
    parameters = [*named("up.weight", "up.bias"), ("still", torch.zeros(2))]
    given = [{"pattern": rule} if isinstance(rule, str) else rule for rule in rules]
    with pytest.raises(UserError, match=sentence):
        parameter_groups(parameters, given)
    assert [p.requires_grad for _, p in parameters] == [True, True, False]


def test_the_place_of_the_rules_is_the_caller_s() -> None:
    with pytest.raises(UserError, match=r"^optimizer.groups.0.pattern 'zzz'"):
        parameter_groups(named("up"), [{"pattern": "zzz"}], where="optimizer.groups")


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"pass model.named_parameters\(\).*not a Parameter"):
        parameter_groups(torch.nn.Linear(2, 2).parameters())


def test_an_optimizer_over_the_groups_merges_by_them(policy: torch.nn.Module, delta: Any) -> None:
    """α = 1 and p = 1 move by τ, α = 0 and p = 1 is AdamW, frozen stays: three groups, three rules."""
    rules = [
        {"pattern": r"^0\.weight$", "merge_weight": 1.0},
        {"pattern": "bias$", "frozen": True},
    ]
    groups = parameter_groups(policy.named_parameters(), rules)
    optimizer = OnDARE(groups, delta, lr=1e-2, reserve_rate=1.0, merge_weight=0.0)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    other = small_model(1)
    take_step(other, torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0), 0)
    take_step(policy, optimizer, 0)
    torch.testing.assert_close(policy[0].weight, start["0.weight"] + delta.tensor("0.weight"))
    assert torch.equal(policy[2].weight, other[2].weight)
    assert torch.equal(policy[0].bias, start["0.bias"])
    assert torch.equal(policy[2].bias, start["2.bias"])
    assert not torch.equal(flat(policy), flat(other))


def test_it_is_public() -> None:
    assert trimtab.parameter_groups is trimtab.optim.parameter_groups
