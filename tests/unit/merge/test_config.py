"""What is read from a merge's configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from tests.unit.merge.configurations import BASE, changed, config_of, sliced_of
from trimtab.merge.config import Condition, ModelRef, load_config, read_config
from trimtab.merge.methods import (
    METHODS,
)


def test_the_whole_of_a_configuration():
    config = read_config(
        yaml.safe_load(
            """
            merge_method: dare_ties
            base_model: org/base@main
            models:
              - model: org/base@main
              - model: org/a@v1+runs/lora@v2
                parameters: {weight: 1e-1, density: [0.25, 0.5]}
              - model: {model: {path: /models/a+b@c, revision: r}, lora: runs/x@y}
                parameters:
                  weight: [{filter: mlp, value: [1, 2]}, {value: 3}]
                  density: {filter: norm, value: 1}
            parameters: {normalize: true, rescale: "false", lambda: 0.5}
            dtype: torch.bfloat16
            out_dtype: float32
            tokenizer_source: union
            chat_template: "{{ messages }}"
            random_seed: 3
            fidelity: mergekit
            allow_partial: true
            """
        ),
        "the text",
    )
    (slice_,) = config.slices
    base = ModelRef("org/base", "main")
    assert config.method == "dare_ties"
    assert (config.base_model, slice_.base, config.sliced) == (base, base, False)
    assert [source.model for source in slice_.sources] == [
        base,
        ModelRef("org/a", "v1", "runs/lora", "v2"),
        ModelRef("/models/a+b@c", "r", "runs/x", "y"),
    ]
    assert [source.layers for source in slice_.sources] == [None, None, None]
    assert slice_.sources[1].parameters == {"weight": 0.1, "density": (0.25, 0.5)}
    assert slice_.sources[2].parameters == {
        "weight": (Condition("mlp", (1.0, 2.0)), Condition(None, 3.0)),
        "density": (Condition("norm", 1.0),),
    }
    assert config.parameters == {"normalize": True, "rescale": False, "lambda": 0.5}
    assert (config.dtype, config.out_dtype) == ("bfloat16", "float32")
    assert (config.tokenizer_source, config.chat_template) == ("union", "{{ messages }}")
    assert (config.seed, config.fidelity, config.allow_partial) == (3, "mergekit", True)
    assert (config.text, config.notes) == ("the text", ())


def test_defaults():
    config = read_config(config_of("linear"))
    assert (config.base_model, config.dtype, config.out_dtype) == (None, None, None)
    assert (config.tokenizer_source, config.chat_template) == (None, None)
    assert (config.seed, config.fidelity, config.allow_partial) == (0, "paper", False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [config_of, sliced_of])
def test_every_method_is_read_whole_and_in_slices(method, make):
    config = read_config(make(method))
    assert config.method == method
    assert [len(slice_.sources) for slice_ in config.slices] == [2] * len(config.slices)
    assert {slice_.base for slice_ in config.slices} == {
        None if method == "linear" else ModelRef(BASE),
    }


def test_slices():
    values = changed(
        sliced_of("ties"),
        {
            "base_model": ...,
            "slices.0.base_model": BASE,
            "slices.1.base_model": "org/a",
            "slices.1.parameters": {"lambda": [0.5, 1]},
            "slices.1.sources.0.layer_range": ["2", 4.0],
        },
    )
    config = read_config(values)
    assert config.sliced
    assert [slice_.base for slice_ in config.slices] == [ModelRef(BASE), ModelRef("org/a")]
    assert [source.layers for source in config.slices[1].sources] == [(2, 4), (0, 2)]
    assert [slice_.parameters for slice_ in config.slices] == [{}, {"lambda": (0.5, 1.0)}]


@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_is_not_listed_is_the_last_input(method):
    values = changed(config_of(method), {"models": [{"model": "org/a"}], "base_model": BASE})
    (slice_,) = read_config(values).slices
    assert [str(source.model) for source in slice_.sources] == ["org/a", BASE]
    assert slice_.sources[1].parameters == {}


def test_linear_slices_take_no_base():
    values = changed(sliced_of("linear"), {"base_model": "org/other"})
    assert [len(slice_.sources) for slice_ in read_config(values).slices] == [2, 2]


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("a", ModelRef("a")),
        ("a@b", ModelRef("a", "b")),
        ("a+l", ModelRef("a", None, "l")),
        ("a@b+l@m", ModelRef("a", "b", "l", "m")),
        ("./a b/c", ModelRef("./a b/c")),
    ],
)
def test_names_of_models(text, model):
    assert ModelRef.parse(text) == model
    assert str(model) == text


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "org/t@v"}, ModelRef("org/t", "v")),
        ({"tokenizer_source": {"model": "org/t"}}, ModelRef("org/t")),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer": {"source": "org/t"}}, ModelRef("org/t")),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer": {"source": "base", "tokens": None, "pad_to_multiple_of": None}}, "base"),
        ({"tokenizer": None, "tokenizer_source": None, "modules": None}, None),
    ],
)
def test_tokenizer_sources(written, read):
    assert read_config({**config_of("ties"), **written}).tokenizer_source == read


def test_what_has_no_effect_is_said_once():
    values = changed(
        config_of("task_arithmetic", rescale=True, int8_mask=1),
        {
            "models.0.parameters": {"density": [0.5, 1], "int8_mask": True},
            "models.1.parameters": {"weight": 1, "density": 0.5},
        },
    )
    config = read_config(values)
    assert config.notes == (
        "rescale has no effect here: task_arithmetic drops no entries",
        "int8_mask has no effect here: masks are drawn or found where they are used and never kept, so they "
        "have no dtype",
        "density has no effect here: task_arithmetic drops no entries",
        "models.1.parameters.weight has no effect: this model is the base_model, which has no weight",
    )
    assert config.slices[0].sources[0].parameters == {}
    assert config.parameters == {"weight": 0.5}


def test_the_weight_of_a_base_counts_in_linear():
    values = changed(config_of("linear"), {"base_model": BASE, "models.1.parameters": {"weight": 2}})
    config = read_config(values)
    assert config.notes == ()
    assert config.slices[0].sources[1].parameters == {"weight": 2.0}


def test_the_text_is_kept_or_made(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(f"# as written\n{yaml.safe_dump(config_of('ties'))}")
    assert load_config(path).text == path.read_text()
    made = read_config(config_of("ties")).text
    assert yaml.safe_load(made) == config_of("ties")


def test_a_check_loads_nothing_heavy(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(config_of("ties")))
    code = (
        "import sys; from trimtab.merge.config import load_config; load_config(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
