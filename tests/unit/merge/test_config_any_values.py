"""Whatever stands in a configuration: a configuration or one refusal, never another exception."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.merge.configurations import BASE, changed, config_of, sliced_of
from trimtab.errors import UserError
from trimtab.merge.config import MergeConfig, load_config, read_config
from trimtab.merge.methods import (
    METHODS,
)

NAMES = ["org/a", "org/b", BASE, "a@b+c", "union", "base", "a@", "", "ties", "linear", "hma", "1e-1", "true"]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(NAMES)
)
KEYS = st.sampled_from(
    [
        "model",
        "path",
        "lora",
        "revision",
        "sources",
        "layer_range",
        "parameters",
        "weight",
        "density",
        "t",
        "filter",
        "value",
        "source",
        "tokens",
        "normalize",
        "lambda",
        "base_model",
        "x",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
PLACES = ["merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "fidelity"]
PLACES += ["tokenizer_source", "tokenizer", "chat_template", "random_seed", "allow_partial", "modules", "x"]
PLACES += ["parameters.weight", "parameters.t", "parameters.normalize", "parameters.ratio"]
INNER = ["0.model", "0.parameters", "0.parameters.weight", "1", "1.model", "0.layer_range"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A right configuration with some keys set to anything."""
    method = draw(st.sampled_from(METHODS))
    sliced = draw(st.booleans())
    values = sliced_of(method) if sliced else config_of(method)
    where = "slices.0.sources" if sliced else "models"
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(PLACES) | st.sampled_from(INNER).map(lambda inner: f"{where}.{inner}"))
        try:
            values = changed(values, {place: draw(VALUES)})
        except (AttributeError, IndexError, KeyError, TypeError):
            continue  # an earlier change left no such place
    return values


@given(configurations())
@settings(max_examples=600, deadline=None)
def test_any_values(values):
    before = copy.deepcopy(values)
    try:
        config = read_config(values)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines[0].startswith("merge configuration: ")
        assert len(lines) == 1 or len(lines) == int(lines[0].split()[2]) + 1
    else:
        assert isinstance(config, MergeConfig)
        assert config.slices
        again = read_config(yaml.safe_load(config.text), config.text)
        assert again == config
    assert repr(values) == repr(before), "what was given is left as it was"


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_anything_at_all(values):
    with pytest.raises(UserError):
        read_config(values)


@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>'\"#, \n\t%@`?", max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, content):
    path = tmp_path / "merge.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
