"""What is refused in a merge's configuration, at which key, in which words; all of it at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.unit.merge.configurations import BASE, changed, config_of, refusals, sliced_of
from trimtab.errors import UserError
from trimtab.merge.config import load_config, read_config
from trimtab.merge.methods import (
    MERGEKIT_METHODS,
    NEEDS_BASE,
)

CASES: list[tuple[str, dict[str, Any], str]] = [
    # Keys
    (
        "ties",
        {"base_modle": "x"},
        "base_modle is not a key of a merge configuration; did you mean base_model?",
    ),
    (
        "ties",
        {"zzz": 1},
        "zzz is not a key of a merge configuration; known here: merge_method, models, slices",
    ),
    (
        "ties",
        {"models.0.paramters": {}},
        "models.0.paramters is not a key of a merge configuration; did you mean models.0.parameters?",
    ),
    (
        "ties",
        {"models.0.layer_range": [0, 2]},
        "models.0.layer_range belongs under slices.N.sources; models are merged with all their layers",
    ),
    (
        "sliced",
        {"slices.1.source": []},
        "slices.1.source is not a key of a merge configuration; did you mean slices.1.sources?",
    ),
    (
        "ties",
        {"modules": {}},
        "modules is a key of mergekit's that is not supported here; give models or slices",
    ),
    (
        "sliced",
        {"slices.0.residual_weight": 0.1},
        "slices.0.residual_weight is a key of mergekit's that is not supported here; leave it out",
    ),
    (
        "ties",
        {"tokenizer": {"tokens": {"<s>": {"source": BASE}}}},
        "tokenizer.tokens is a key of mergekit's that is not supported here; leave it out: each token's row",
    ),
    (
        "ties",
        {"tokenizer": {"pad_to_multiple_of": 8}},
        "tokenizer.pad_to_multiple_of is a key of mergekit's that is not supported here; leave it out",
    ),
    (
        "ties",
        {"models.0.model": {"model": "org/a", "override_architecture": "X"}},
        "models.0.model.override_architecture is a key of mergekit's that is not supported here; leave it",
    ),
    (
        "ties",
        {"tokenizer": {"sorce": "base"}},
        "tokenizer.sorce is not a key of a merge configuration; did you mean tokenizer.source?",
    ),
    ("ties", {"tokenizer": "base"}, "tokenizer must be a mapping, not 'base'; write tokenizer_source: base"),
    ("ties", {"tokenizer": {}, "tokenizer_source": "base"}, "tokenizer and tokenizer_source are both given"),
    # The method
    (
        "ties",
        {"merge_method": ...},
        "merge_method is missing; known: linear, task_arithmetic, ties, dare_linear, dare_ties, slerp, hma",
    ),
    ("ties", {"merge_method": ["ties"]}, "merge_method must be text, not a list; known: linear"),
    ("ties", {"merge_method": "dare_tie"}, "merge_method 'dare_tie' is not known; did you mean dare_ties?"),
    (
        "ties",
        {"merge_method": "zzz"},
        "merge_method 'zzz' is not known; known: linear, task_arithmetic, ties",
    ),
    *(
        (
            "ties",
            {"merge_method": name},
            f"merge_method {name} is a method of mergekit's that is not supported here; known: linear, task",
        )
        for name in MERGEKIT_METHODS
    ),
    # Models
    ("ties", {"models": ...}, "models is missing; list the models to merge, or give slices"),
    ("ties", {"models": []}, "models must not be empty"),
    ("ties", {"models": "org/a"}, "models must be a list, not 'org/a'"),
    ("ties", {"models.0": "org/a"}, "models.0 must be a mapping, not 'org/a'; write model: org/a"),
    ("ties", {"models.0": "a\nb"}, "models.0 must be a mapping, not 'a\\nb'"),
    ("ties", {"a\nb": 1}, "'a\\nb' is not a key of a merge configuration; known here: merge_method"),
    ("ties", {"models.0": None}, "models.0 must be a mapping, not null"),
    ("ties", {"models.0.model": ...}, "models.0.model is missing; name a folder or a hub id"),
    ("ties", {"models.0.model": 5}, "models.0.model must be text, not 5"),
    ("ties", {"models.0.model": "a\0"}, "models.0.model must be text without null characters, not 'a\\x00'"),
    ("ties", {"models.0.model": "a+b+c"}, "models.0.model 'a+b+c' holds more than one +; write path+lora"),
    (
        "ties",
        {"models.0.model": "a@b@c"},
        "models.0.model 'a@b@c' holds more than one @ in a path; write path@",
    ),
    ("ties", {"models.0.model": "a+"}, "models.0.model 'a+' has an empty part; write path, path@revision or"),
    ("ties", {"models.0.model": "@a"}, "models.0.model '@a' has an empty part"),
    ("ties", {"base_model": "a@"}, "base_model 'a@' has an empty part"),
    (
        "ties",
        {"models.0.model": {"path": "org/a"}},
        "models.0.model.path belongs one level deeper: write {model: {path: …, revision: …}}",
    ),
    ("ties", {"models.0.model": {"lora": "x"}}, "models.0.model.model is missing; name a folder or a hub id"),
    (
        "ties",
        {"models.0.model": {"model": "a+b"}},
        "models.0.model.model 'a+b' holds a +; an adapter goes under",
    ),
    (
        "ties",
        {"models.0.model": {"model": "a", "lora": {"revision": "x"}}},
        "models.0.model.lora.path is missing; name a folder or a hub id",
    ),
    (
        "ties",
        {"models.0.model": {"model": {"path": "a", "revision": 3}}},
        "models.0.model.model.revision must be text, not 3",
    ),
    (
        "ties",
        {"models.1.model": "org/a"},
        "models.1.model 'org/a' is models.0.model again; each input of a merge",
    ),
    # Slices
    ("sliced", {"models": [{"model": "a"}]}, "slices and models are both given; keep one of them"),
    ("sliced", {"slices": []}, "slices must not be empty"),
    ("sliced", {"slices.0": 5}, "slices.0 must be a mapping, not 5"),
    (
        "sliced",
        {"slices.0.sources": ...},
        "slices.0.sources is missing; list the models whose layers are merged",
    ),
    ("sliced", {"slices.0.sources": []}, "slices.0.sources must not be empty"),
    (
        "sliced",
        {"slices.0.sources.0.layer_range": ...},
        "slices.0.sources.0.layer_range is missing; it must be two whole numbers, the first layer and the "
        "one after the last, such as [0, 12]",
    ),
    *(
        (
            "sliced",
            {"slices.0.sources.0.layer_range": written},
            "slices.0.sources.0.layer_range must be two whole numbers, the first layer and the one after the "
            f"last, such as [0, 12], not {spelled}",
        )
        for written, spelled in [(3, "3"), ([1], "[1]"), ([0, 1.5], "[0, 1.5]"), ([True, 2], "[true, 2]")]
    ),
    *(
        (
            "sliced",
            {"slices.0.sources.0.layer_range": written},
            f"slices.0.sources.0.layer_range must go from 0 or more to more than that, not {written}",
        )
        for written in ([2, 2], [3, 1], [-1, 1])
    ),
    (
        "sliced",
        {"slices.1.sources.1.layer_range": [0, 3]},
        "slices.1.sources.1.layer_range [0, 3] holds 3 layers, and the slice's first source has 2; all",
    ),
    (
        "sliced",
        {"slices.1.sources": [{"model": name, "layer_range": [0, 2]} for name in ("org/a", "org/a", BASE)]},
        "slices.1.sources.1.model 'org/a' is slices.1.sources.0.model again",
    ),
    (
        "sliced",
        {"slices.1.sources.1.model": "org/b"},
        "slices.1.sources do not hold the base_model 'org/base': method ties adds up what the other models "
        "differ by from it; add it as a source with its layer_range",
    ),
    # Words and scalars
    ("ties", {"dtype": "int64"}, "dtype must be float32, float16, bfloat16 or float64, not 'int64'"),
    ("ties", {"dtype": "float31"}, "dtype 'float31' is not known; did you mean float32?"),
    ("ties", {"out_dtype": 16}, "out_dtype must be float32, float16, bfloat16 or float64, not 16"),
    ("ties", {"fidelity": "released"}, "fidelity must be paper or mergekit, not 'released'"),
    ("ties", {"fidelity": "mergkit"}, "fidelity 'mergkit' is not known; did you mean mergekit?"),
    ("ties", {"random_seed": -1}, "random_seed must be at least 0 and below 2**64, not -1"),
    (
        "ties",
        {"random_seed": 1 << 64},
        "random_seed must be at least 0 and below 2**64, not 18446744073709551616",
    ),
    ("ties", {"random_seed": True}, "random_seed must be a whole number, not true"),
    ("ties", {"allow_partial": "yes"}, "allow_partial must be true or false, not 'yes'"),
    *(
        (
            "ties",
            {"chat_template": name},
            f"chat_template '{name}' is no template; auto and the names of mergekit's templates are not "
            "supported here, so write the template itself (Jinja text, which holds a {)",
        )
        for name in ("auto", "chatml", "llama3")
    ),
    ("ties", {"chat_template": 5}, "chat_template must be text, not 5"),
    (
        "linear",
        {"tokenizer_source": "base"},
        "tokenizer_source is base, and there is no base_model; give one",
    ),
    ("linear", {"tokenizer": {"source": "base"}}, "tokenizer.source is base, and there is no base_model"),
    ("ties", {"tokenizer_source": ["a"]}, "tokenizer_source must be text, not a list"),
    # How many models
    *(
        (method, {"base_model": ...}, f"base_model is missing: method {method} {why}")
        for method, why in NEEDS_BASE.items()
    ),
    (
        "ties",
        {"models": [{"model": BASE}]},
        "models hold no model beside the base_model 'org/base'; method ties takes at least one",
    ),
    *(
        (
            method,
            {"models": [{"model": "org/a"}, {"model": "org/b"}]},
            f"models hold 2 models beside the base_model 'org/base'; method {method} takes exactly one",
        )
        for method in ("slerp", "hma")
    ),
    (
        "slerp",
        {"models": [{"model": BASE}]},
        "models hold 0 models beside the base_model 'org/base'; method slerp takes exactly one",
    ),
]


@pytest.mark.parametrize(("start", "changes", "message"), CASES, ids=[case[2][:60] for case in CASES])
def test_refused(start, changes, message):
    values = changed(sliced_of("ties") if start == "sliced" else config_of(start), changes)
    before = copy.deepcopy(values)
    (sentence,) = refusals(values)
    assert sentence.startswith(message)
    assert repr(values) == repr(before), "what was given is left as it was"


def test_what_is_no_mapping():
    with pytest.raises(UserError, match="a merge configuration is a mapping of keys to values, not a list"):
        read_config([])  # type: ignore[arg-type]


def test_all_problems_at_once_each_with_its_line(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        "merge_method: slerp\n"
        "base_model: org/base\n"
        "dtype: float31\n"
        "dtype: float32\n"
        "models:\n"
        "  - model: org/a\n"
        "    parameters:\n"
        "      t: 0.5\n"
        "  - model: org/b@v@w\n"
        "  - model: org/c\n"
        "  - model: org/c\n"
        "tokenizer:\n"
        "  tokens: {}\n"
        "random_seed: x\n"
    )
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 5 problems",
        "  line 4: dtype is written twice, on lines 3 and 4",
        "  line 8: models.0.parameters.t has one value for all inputs; write it under parameters",
        "  line 9: models.1.model 'org/b@v@w' holds more than one @ in a path; write path@revision, or "
        "{model: {path: …, revision: …}} where a path holds one",
        "  line 13: tokenizer.tokens is a key of mergekit's that is not supported here; leave it out: each "
        "token's row is taken by the rules of tokenizer.source",
        "  line 14: random_seed must be a whole number, not 'x'",
    ]


def test_one_problem_in_a_file_is_one_sentence(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(config_of("ties", density=2), sort_keys=False))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}, line 8: parameters.density must be at most 1, not 2"


def test_structure_is_checked_beside_wrong_values():
    values = changed(config_of("slerp", t=2), {"models": [{"model": "org/a"}, {"model": "org/b"}]})
    assert refusals({**values, "merge_method": "slerp"}) == [
        "parameters.t must be at most 1, not 2",
        "models hold 2 models beside the base_model 'org/base'; method slerp takes exactly one",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a merge configuration is a mapping of keys such as merge_method and models"),
        (b"- a\n", "holds a list; a merge configuration is a mapping of keys to values"),
        (b"a: [\n", "is not YAML: "),
        (b"\xff", "is not UTF-8 text (byte 0); save the merge configuration as UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration(content, message, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path} {message}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^there is no merge configuration '.*x.yaml'; name a YAML file"):
        load_config(tmp_path / "x.yaml")
