"""From what is named to a reward: shorthand, weights, names, rules, and what is refused before loading."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests import tiny
from trimtab import UserError
from trimtab.recipe import RewardSource, make_recipe
from trimtab.rewards import RRHFScorer, WeightedSum, load_reward, load_rewards
from trimtab.rewards.loading import model_names

RULES = """
def length(prompts, responses, rows):
    return [len(response) for response in responses]

def known(prompts, responses, rows):
    return [row["answer"] == response for row, response in zip(rows, responses)]

def broken(prompts, responses, rows):
    given = {"nan": [float("nan")] * 2, "few": [1.0], "none": None, "text": ["1"] * 2, "null": [None] * 2}
    return given[prompts[0]]
"""


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)


def test_a_text_is_a_rule_or_a_reward_model() -> None:
    assert RewardSource.model_validate("my_rules:length") == RewardSource(rule="my_rules:length")
    assert RewardSource.model_validate("org/model") == RewardSource(model="org/model")
    assert RewardSource.model_validate({"likelihood": "a", "weight": "-1e-1"}).weight == -0.1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "must name one of model, likelihood and rule, not none"),
        ({"weight": 2}, "must name one of model, likelihood and rule, not none"),
        ({"model": "a", "rule": "b:c"}, "must name one of model, likelihood and rule, not model and rule"),
        ({"rule": "b.c"}, "must have a rule written as module:function, not 'b.c'"),
    ],
)
def test_a_source_is_one_thing(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RewardSource.model_validate(values)
    with pytest.raises(UserError, match=f"^reward {sentence}$"):
        load_reward(values)


def test_what_is_wrong_in_a_recipe_is_said_once_each() -> None:
    rewards = [
        {"modle": "x"},
        {"model": "a", "rule": "b:c"},
        "nothing/here",
        {"rule": "a:b", "weight": "high"},
    ]
    values = {"method": "grpo", "reference": ".", "data": {"train": "."}, "output": "o"}
    with pytest.raises(UserError) as refused:
        make_recipe({**values, "loss": {"rewards": rewards}})
    assert [line.strip() for line in str(refused.value).splitlines() if "rewards" in line] == [
        "loss.rewards.0.modle is not a key of a recipe; did you mean loss.rewards.0.model?",
        "loss.rewards.1 must name one of model, likelihood and rule, not model and rule",
        "loss.rewards.3.weight must be a number, not 'high'",
    ]


def test_a_rule_sees_prompts_responses_and_rows() -> None:
    assert load_reward("my_rules:length")(["a", "b"], ["yes", "no"]) == [3.0, 2.0]
    rows = [{"answer": "yes"}, {"answer": "yes"}]
    assert load_reward("my_rules:known")(["a", "b"], ["yes", "no"], rows) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("nan", "my_rules:broken gives the score nan to the response 'yes' to the prompt 'nan'; every score"),
        ("few", "my_rules:broken gives 1 scores to 2 responses; one each is needed"),
        ("none", "my_rules:broken gives None; a list with a number for each response is needed"),
        ("text", "my_rules:broken gives the score '1' to the response 'yes'"),
        ("null", "my_rules:broken gives the score None to the response 'yes'"),
    ],
)
def test_a_rule_that_gives_something_else_is_refused(kind: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_reward("my_rules:broken")([kind, kind], ["yes", "no"])


def test_several_are_added_up_by_their_weights(tiny_models: tuple[Path, Path]) -> None:
    sources = [{"rule": "my_rules:length", "weight": 0.5}, {"likelihood": str(tiny_models[0]), "weight": -2}]
    total = load_reward(sources)
    assert isinstance(total, WeightedSum)
    assert total.name == "0.5 my_rules:length + -2 base"
    prompts, responses = ["say", "say"], ["yes", "no"]
    parts = total.by_part(prompts, responses)
    assert parts["my_rules:length"] == [3.0, 2.0]
    likelihood = RRHFScorer(tiny.model(), tiny.tokenizer())(prompts, responses)
    assert parts["base"] == pytest.approx(likelihood)
    assert total(prompts, responses) == pytest.approx([1.5 - 2 * likelihood[0], 1.0 - 2 * likelihood[1]])


def test_a_model_that_cannot_share_a_prefix_reads_it_again(
    tiny_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.rewards import likelihood

    def refuse(model: Any) -> None:
        raise UserError("it cannot")

    known = load_reward({"likelihood": str(tiny_models[0])})(["a"] * 2, ["yes", "no"])
    monkeypatch.setattr(likelihood, "check_shared_prefix", refuse)
    reward = load_reward({"likelihood": str(tiny_models[0])})
    assert reward(["a"] * 2, ["yes", "no"]) == pytest.approx(known, rel=1e-5)


def test_names_tell_parts_apart() -> None:
    sources = ["runs/a/model", "runs/b/model", "x/rm", "y/rm", "m:f", "m:f", "org/judge"]
    assert model_names(sources) == ["a/model", "b/model", "x/rm", "y/rm", "m:f#1", "m:f#2", "judge"]


def test_everything_is_found_before_anything_is_loaded(
    tiny_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.rewards import loading

    monkeypatch.setattr(loading, "load_model", None)
    sources = [{"likelihood": str(tiny_models[0])}, "my_rules:nothing"]
    with pytest.raises(UserError, match=r"^loss\.rewards 'my_rules:nothing' cannot be imported: .*nothing"):
        load_rewards(sources, key="loss.rewards")
    with pytest.raises(UserError, match="no reward is named"):
        load_rewards([])
