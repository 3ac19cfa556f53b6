"""The file itself, and overrides laid over it."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.unit.recipe.conftest import DPO, SFT, changed
from trimtab.errors import UserError
from trimtab.recipe import load_recipe

FILES = {
    "empty": (b"", "is empty; a recipe is a mapping of keys"),
    "only a comment": (b"# nothing\n", "is empty; a recipe is a mapping of keys"),
    "a list": (b"- a\n- b\n", "holds a list; a recipe is a mapping of keys to values"),
    "a word": (b"dpo\n", "holds 'dpo'; a recipe is a mapping of keys to values"),
    "a tab": (b"method: dpo\ndata:\n\ttrain: a\n", "line 3 is indented with a tab; use spaces"),
    "an open bracket": (b"method: dpo\ndata: [a\nbase: b\n", "is not YAML: "),
    "two documents": (b"a: 1\n---\nb: 2\n", "is not YAML: "),
    "a Python object": (
        b"a: !!python/object/apply:os.system ['true']\n",
        "is not YAML: could not determine a constructor",
    ),
    "latin-1": ("method: dpo\noutput: caf\xe9\n".encode("latin-1"), "is not UTF-8 text (byte 23)"),
    "bytes": (b"\x00\x01\x02", "is not YAML: "),
    "an alias in itself": (b"a: &a [*a]\nmethod: sft\n", "an alias in it holds itself"),
    "a date that is none": (b"method: 2026-13-01\n", "holds a value that cannot be read: month must be in"),
    "an unhashable key": (b"? [a]\n: 1\n", "is not YAML: "),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_recipe(content, message, written):
    path = written(content)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no recipe '.*x.yaml'"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="is a folder; name the recipe's YAML file"):
        load_recipe(tmp_path)


def test_keys_that_are_not_text(written):
    text = yaml.safe_dump(SFT) + "5: x\n"
    with pytest.raises(UserError, match=r", line \d+: 5 is not a key"):
        load_recipe(written(text))


def test_merge_keys_and_anchors_are_read(written):
    text = "a: &a\n  lr: 1e-3\n" + yaml.safe_dump(SFT) + "optimizer:\n  <<: *a\n  weight_decay: 0.1\n"
    with pytest.raises(UserError) as caught:
        load_recipe(written(text))
    assert "line 1: a is not a key of a recipe" in str(caught.value)
    recipe = load_recipe(written(text.replace("a: &a\n  lr: 1e-3\n", "").replace("*a", "&b {lr: 1e-3}")))
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optimizer.lr=1e-4", lambda r: r.optimizer.lr, 1e-4),
        ("optimizer.name=onties", lambda r: r.optimizer.name, "onties"),
        ("data.train.1.weight=3", lambda r: r.data.train[1].weight, 3.0),
        ("data.train.0=org/other", lambda r: r.data.train[0].path, "org/other"),
        ("data.train=[org/c]", lambda r: len(r.data.train), 1),
        ("schedule.merge_weight.type=cosine", lambda r: r.schedule.merge_weight.type, "cosine"),
        (
            "training.report_to=[tensorboard, wandb]",
            lambda r: r.training,
            {"report_to": ["tensorboard", "wandb"]},
        ),
        ("optimizer.merge_weight=null", lambda r: r.optimizer.merge_weight, 1e-7),
        ("optimizer.merge_weight=", lambda r: r.optimizer.merge_weight, 1e-7),
        ("output=a=b", lambda r: r.output, "a=b"),
        ('evaluation.prompts=["a: b", c]', lambda r: r.evaluation.prompts, ("a: b", "c")),
    ],
)
def test_overrides(override, get, value, written):
    values = changed(DPO, {"data.train": ["org/a", {"path": "org/b"}], "optimizer.merge_weight": 0.5})
    path = written(values)
    assert get(load_recipe(path, [override])) == value


@pytest.mark.parametrize(
    ("train", "key"),
    [
        ("rows.jsonl", "data.train"),
        ("{path: rows.jsonl}", "data.train.path"),
        ("[org/a, rows.jsonl]", "data.train.1"),
        ("[org/a, {path: rows.jsonl}]", "data.train.1.path"),
    ],
)
def test_a_source_is_named_as_it_was_written(train, key, written):
    path = written(yaml.safe_dump(changed(SFT, {"data.train": "HERE"})).replace("HERE", train))
    with pytest.raises(UserError, match=rf", line \d+: {re.escape(key)} 'rows.jsonl' does not exist"):
        load_recipe(path)


def test_the_last_override_wins(written):
    assert load_recipe(written(SFT), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer", "'optimizer' is not an override; write key=value, such as optimizer.lr=1e-6"),
        ("=5", "'=5' is not an override"),
        ("optimizer..lr=5", "'optimizer..lr=5' is not an override"),
        ("optimizer.lr=[1", "the value of the override 'optimizer.lr=[1' is not YAML"),
        ("seed.x=5", "override 'seed.x=5': seed is 3, which has no keys"),
        ("data.train.5.weight=2", "override 'data.train.5.weight=2': data.train has 2 items, counted from 0"),
        ("data.train.first=2", "override 'data.train.first=2': data.train is a list, which takes a number"),
        (
            "optimizer.learning_rate=5",
            "override 'optimizer.learning_rate=5': optimizer.learning_rate is not a key",
        ),
        (
            "optimiser.lr=5",
            "override 'optimiser.lr=5': optimiser is not a key of a recipe; did you mean optimizer?",
        ),
        ("loss.bta=5", "override 'loss.bta=5': loss.bta is not a key of a recipe; did you mean loss.beta?"),
        ("loss={beta: -1}", "override 'loss={beta: -1}': loss.beta must be above 0, not -1"),
    ],
)
def test_overrides_that_are_refused(override, message, written):
    path = written(changed(DPO, {"data.train": ["org/a", "org/b"], "seed": 3}))
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
