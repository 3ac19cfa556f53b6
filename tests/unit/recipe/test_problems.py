"""What is refused, at which key, in which words; and that all of it is said at once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.conftest import DPO, SFT, changed
from trimtab.errors import UserError
from trimtab.recipe import load_recipe, make_recipe

CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("unknown key", DPO, {"refrence": "org/x"}, "refrence is not a key of a recipe; did you mean reference?"),
    (
        "unknown inner key",
        DPO,
        {"optimizer.merge_wieght": 1},
        "optimizer.merge_wieght is not a key of a recipe; did you mean optimizer.merge_weight?",
    ),
    (
        "unknown source key",
        DPO,
        {"data.train": [{"path": "org/a", "wieght": 2}]},
        "data.train.0.wieght is not a key of a recipe; did you mean data.train.0.weight?",
    ),
    ("nothing near", DPO, {"zzz": 1}, "zzz is not a key of a recipe; known here: method, model"),
    ("key of another method", DPO, {"loss.packing": True}, "loss.packing belongs to method sft"),
    ("key of another method", SFT, {"loss.beta": 0.1}, "loss.beta belongs to method dpo"),
    ("missing", DPO, {"output": ...}, "output is missing"),
    ("missing", DPO, {"data": {}}, "data.train is missing"),
    ("missing", DPO, {"data": ...}, "data is missing"),
    ("null", DPO, {"output": None}, "output must be text, not null"),
    ("no method", DPO, {"method": ...}, "method is missing; known: sft, dpo, ipo, kto, reward, rrhf"),
    ("near method", DPO, {"method": "dpoo"}, "method 'dpoo' is not known; did you mean dpo?"),
    (
        "unknown method",
        DPO,
        {"method": "raft"},
        "method 'raft' is not known; known: sft, dpo, ipo, kto, reward, rrhf, ppo, grpo, rloo",
    ),
    (
        "method of another type",
        DPO,
        {"method": ["dpo"]},
        "method must be text, not a list; known: sft, dpo, ipo, kto, reward, rrhf, ppo",
    ),
    ("text for a number", DPO, {"loss.beta": "yes"}, "loss.beta must be a number, not 'yes'"),
    ("boolean for a number", DPO, {"loss.beta": True}, "loss.beta must be a number, not true"),
    ("infinite", DPO, {"optimizer.lr": float("inf")}, "optimizer.lr must be a finite number, not inf"),
    ("too large", DPO, {"optimizer.lr": 10**400}, "optimizer.lr must be a finite number, not inf"),
    (
        "NaN",
        DPO,
        {"optimizer.merge_weight": "nan"},
        "optimizer.merge_weight must be a finite number, not nan",
    ),
    ("negative", DPO, {"optimizer.lr": -1e-6}, "optimizer.lr must be at least 0, not -1e-06"),
    ("zero beta", DPO, {"loss.beta": 0}, "loss.beta must be above 0, not 0"),
    (
        "share above 1",
        DPO,
        {"optimizer.merge_weight": 1.5},
        "optimizer.merge_weight must be at most 1, not 1.5",
    ),
    ("keeps nothing", DPO, {"optimizer.reserve_rate": 0}, "optimizer.reserve_rate must be above 0, not 0"),
    ("rate above 1", DPO, {"optimizer.reserve_rate": 10}, "optimizer.reserve_rate must be at most 1, not 10"),
    ("beta of 1", DPO, {"optimizer.betas": [0.9, 1.0]}, "optimizer.betas.1 must be below 1, not 1.0"),
    (
        "broken count",
        DPO,
        {"optimizer.merge_every": 1.5},
        "optimizer.merge_every must be a whole number, not 1.5",
    ),
    ("count of 0", DPO, {"optimizer.merge_every": 0}, "optimizer.merge_every must be at least 1, not 0"),
    ("text for a flag", DPO, {"data.streaming": "no"}, "data.streaming must be true or false, not 'no'"),
    ("number for a path", DPO, {"base": 5}, "base must be text, not 5"),
    ("null character", DPO, {"delta": "a\0b"}, "delta must be text without null characters, not 'a\\x00b'"),
    ("near word", DPO, {"loss.type": "sigmoyd"}, "loss.type 'sigmoyd' is not known; did you mean 'sigmoid'?"),
    ("far word", DPO, {"data.overlong": "zzz"}, "data.overlong must be 'drop' or 'truncate', not 'zzz'"),
    ("text for a section", DPO, {"optimizer": "ondare"}, "optimizer must be a mapping, not 'ondare'"),
    ("list for a section", DPO, {"data": ["org/a"]}, "data must be a mapping, not a list"),
    (
        "mapping for a list",
        DPO,
        {"optimizer.groups": {"pattern": "a"}},
        "optimizer.groups must be a list, not a mapping",
    ),
    ("number in a list", DPO, {"data.train": ["org/a", 5]}, "data.train.1 must be a mapping, not 5"),
    ("no source", DPO, {"data.train": []}, "data.train must not be empty"),
    (
        "bad pattern",
        DPO,
        {"optimizer.groups": [{"pattern": "("}]},
        "optimizer.groups.0.pattern must be a regular expression",
    ),
    (
        "bad pattern in a list",
        DPO,
        {"optimizer.without_delta": ["head", "("]},
        "optimizer.without_delta must be a regular expression",
    ),
    ("training list", DPO, {"training": [1]}, "training must be a mapping, not a list"),
    # Combinations
    (
        "dpo without models",
        DPO,
        {"reference": ..., "base": ..., "optimizer.name": "adamw"},
        "reference is missing: method dpo needs the SFT model",
    ),
    (
        "sft without a model",
        SFT,
        {"model": ...},
        "model is missing: method sft needs the model to start from",
    ),
    ("no delta", DPO, {"base": ...}, "base is missing: optimizer ondare merges a reference delta"),
    ("two deltas", DPO, {"delta": "DELTA"}, "delta and base are both given"),
    ("zero delta", DPO, {"base": "org/sft"}, "base is the reference itself"),
    ("adapter and base", DPO, {"adapter": {"r": 8}}, "adapter cannot go with base"),
    (
        "alpha without merging",
        SFT,
        {"optimizer.merge_weight": 0.1},
        "optimizer.merge_weight has no effect with optimizer adamw",
    ),
    (
        "alpha in a group",
        SFT,
        {"optimizer.groups": [{"pattern": "a", "merge_every": 2}]},
        "optimizer.groups.0.merge_every has no effect",
    ),
    (
        "alpha scheduled",
        SFT,
        {"schedule.merge_weight": {"type": "linear"}},
        "schedule.merge_weight has no effect",
    ),
    (
        "released and rescale",
        DPO,
        {"optimizer.fidelity": "released", "optimizer.rescale": "none"},
        "optimizer.rescale is fixed by fidelity released",
    ),
    (
        "released and eps",
        DPO,
        {"optimizer.fidelity": "released", "optimizer.eps": 1e-8},
        "optimizer.eps is fixed by fidelity released",
    ),
    (
        "expected with top",
        DPO,
        {"optimizer.name": "onties", "optimizer.rescale": "expected"},
        "optimizer.rescale expected undoes random dropping, and top",
    ),
    (
        "sparsify by name",
        DPO,
        {"optimizer.sparsify": "top"},
        "optimizer.sparsify is given by the name ondare",
    ),
    (
        "free pairing unnamed",
        DPO,
        {"optimizer": {"name": "online_merging", "sparsify": "top"}},
        "optimizer.consensus is missing",
    ),
    (
        "free pairing with fidelity",
        DPO,
        {
            "optimizer": {
                "name": "online_merging",
                "sparsify": "top",
                "consensus": "sign",
                "fidelity": "paper",
            }
        },
        "optimizer.fidelity goes with ondare and onties",
    ),
    (
        "rate that does nothing",
        DPO,
        {
            "optimizer": {
                "name": "online_merging",
                "sparsify": "none",
                "consensus": "sign",
                "reserve_rate": 0.5,
            }
        },
        "optimizer.reserve_rate has no effect with sparsify none",
    ),
    (
        "near optimizer",
        SFT,
        {"optimizer.name": "adamw_8bits"},
        "optimizer.name 'adamw_8bits' is not known; did you mean 'adamw_8bit'?",
    ),
    (
        "an inner optimizer by itself",
        SFT,
        {"optimizer.inner": "galore"},
        "optimizer.inner goes with online_merging, which wraps another optimizer; adamw does not",
    ),
    (
        "galore's settings without it",
        SFT,
        {"optimizer.galore": {"rank": 8}},
        "optimizer.galore has no effect with adamw; name galore",
    ),
    (
        "galore's rank",
        SFT,
        {"optimizer": {"name": "galore", "galore": {"rank": 0}}},
        "optimizer.galore.rank must be at least 1, not 0",
    ),
    (
        "galore on an adapter",
        SFT,
        {"optimizer.name": "galore", "adapter": {"r": 8}},
        "optimizer.name galore projects whole matrices to a low rank, and an adapter's are of low",
    ),
    (
        "adafactor's betas",
        DPO,
        {
            "optimizer": {
                "name": "online_merging",
                "inner": "adafactor",
                "sparsify": "top",
                "consensus": "sign",
                "betas": [0.9, 0.99],
            }
        },
        "optimizer.betas has no effect with adafactor",
    ),
    (
        "adafactor's epsilon",
        SFT,
        {"optimizer": {"name": "adafactor", "eps": 1e-8}},
        "optimizer.eps has no effect with adafactor",
    ),
    (
        "two warm-ups",
        SFT,
        {"schedule.lr": {"warmup_steps": 1, "warmup_ratio": 0.1}},
        "schedule.lr.warmup_ratio and warmup_steps are both given",
    ),
    (
        "constant that ends",
        SFT,
        {"schedule.lr": {"type": "constant", "end": 0.1}},
        "schedule.lr.end has no meaning for a constant schedule",
    ),
    (
        "p warms up from 0",
        DPO,
        {"schedule.reserve_rate": {"warmup_steps": 5}},
        "schedule.reserve_rate.warmup_steps starts reserve_rate at 0",
    ),
    (
        "p ends at 0",
        DPO,
        {"schedule.reserve_rate": {"type": "linear"}},
        "schedule.reserve_rate.end must be given and above 0",
    ),
    (
        "p ends above 1",
        DPO,
        {"schedule.reserve_rate": {"type": "linear", "end": 200}},
        "schedule.reserve_rate.end 200 takes reserve_rate from 0.01 to 2",
    ),
    (
        "alpha twice scheduled",
        DPO,
        {"optimizer.merge_weight_follows_lr": True, "schedule.merge_weight": {"type": "linear"}},
        "schedule.merge_weight and optimizer.merge_weight_follows_lr",
    ),
    (
        "exo_pair unsmoothed",
        DPO,
        {"loss.type": "exo_pair"},
        "loss.label_smoothing must be above 0 for the loss exo_pair",
    ),
    (
        "stream without an end",
        SFT,
        {"data.streaming": True},
        "training.max_steps is missing: with data.streaming",
    ),
    ("evaluation of nothing", SFT, {"evaluation.every": 5}, "evaluation.every needs data.eval"),
    ("samples of nothing", SFT, {"evaluation.samples": 5}, "evaluation.samples needs data.eval"),
    # The training section, as far as it can be judged without the trainer
    (
        "lr in training",
        DPO,
        {"training.learning_rate": 1e-6},
        "training.learning_rate is written as optimizer.lr",
    ),
    (
        "remote code",
        DPO,
        {"training.trust_remote_code": True},
        "training.trust_remote_code is off and stays off",
    ),
    # Paths and hub ids
    ("no such folder", DPO, {"base": "./nowhere"}, "base './nowhere' does not exist"),
    (
        "no hub id",
        DPO,
        {"reference": "sft model"},
        "reference 'sft model' neither exists here nor is a hub id",
    ),
    ("one word", SFT, {"model": "gpt2"}, "model 'gpt2' neither exists here nor is a hub id"),
    (
        "no such file",
        SFT,
        {"data.train": "data/rows.jsonl"},
        "data.train.0.path 'data/rows.jsonl' does not exist",
    ),
    (
        "no such delta",
        DPO,
        {"base": ..., "delta": "org/delta"},
        "delta 'org/delta' does not exist; make it with trimtab delta",
    ),
]


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [case[1:] for case in CASES],
    ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)],
)
def test_refused(values, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DELTA").mkdir()
    (tmp_path / "DELTA" / "delta.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        make_recipe(changed(values, changes))
    assert str(caught.value).startswith(f"recipe: {message}")
    assert "\n" not in str(caught.value), "one problem is one sentence"


def test_everything_is_said_at_once_in_the_order_of_the_file(written):
    path = written(
        "method: dpo\n"
        "reference: ./nowhere\n"
        "base: 5\n"
        "data:\n"
        "  train: org/pairs\n"
        "  max_length: abc\n"
        "optimizer:\n"
        "  name: ondare\n"
        "  lr: 1e-6\n"
        "  lr: 1e-5\n"
        "  merge_wieght: 1\n"
        "training:\n"
        "  learning_rate: 1\n"
        "output: runs/x\n"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["seed=-1"])
    assert str(caught.value).splitlines() == [
        f"{path}: 7 problems",
        "  line 2: reference './nowhere' does not exist; name a model folder or a hub id such as org/name",
        "  line 3: base must be text, not 5",
        "  line 6: data.max_length must be a whole number, not 'abc'",
        "  line 10: optimizer.lr is written twice, on lines 9 and 10",
        "  line 11: optimizer.merge_wieght is not a key of a recipe; did you mean optimizer.merge_weight?",
        "  line 13: training.learning_rate is written as optimizer.lr",
        "  override 'seed=-1': seed must be at least 0, not -1",
    ]


def test_a_wrong_key_gives_no_echo_in_later_checks():
    values = changed(DPO, {"base": ..., "bse": "org/base", "data.evl": "org/x", "evaluation.every": 3})
    with pytest.raises(UserError) as caught:
        make_recipe(values)
    assert [line.split()[0] for line in str(caught.value).splitlines()[1:]] == ["data.evl", "bse"]


def test_an_unknown_method_does_not_hide_the_rest():
    with pytest.raises(UserError) as caught:
        make_recipe(changed(DPO, {"method": "dpoo", "seed": "x", "base": "./nowhere", "loss.weird": 1}))
    keys = {line.split()[0] for line in str(caught.value).splitlines()[1:]}
    assert keys == {"method", "seed", "base"}
