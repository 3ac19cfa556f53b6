"""Whatever stands in a recipe, the answer is a recipe or one refusal, never another exception."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.recipe.conftest import DPO, SFT
from trimtab.errors import UserError
from trimtab.recipe import METHODS, Recipe, load_recipe, make_recipe
from trimtab.recipe.problems import fields_at

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["ondare", "online_merging", "top", "none", "linear", "released", "1e-3", "org/name", "("]
    )
)
KEYS = st.sampled_from(
    ["path", "pattern", "type", "lr", "end", "warmup_steps", "name", "merge_weight", "x", ""]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A right recipe with some keys set to anything."""
    values = copy.deepcopy(draw(st.sampled_from([DPO, SFT])))
    model = METHODS[values["method"]]
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from(list(model.model_fields)))
        inner = fields_at(model, (section,))
        if inner and draw(st.booleans()):
            if not isinstance(values.get(section), dict):
                values[section] = {}
            values[section][draw(st.sampled_from(inner))] = draw(VALUES)
        else:
            values[section] = draw(VALUES)
    return values


@given(recipes())
@settings(max_examples=400, deadline=None)
def test_any_values(values):
    before = copy.deepcopy(values)
    try:
        recipe = make_recipe(values)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines[0].startswith("recipe: ")
        assert len(lines) == 1 or len(lines) == int(lines[0].split()[1]) + 1
    else:
        assert isinstance(recipe, Recipe)
        assert make_recipe(recipe.resolved()) == recipe
    assert repr(values) == repr(before), "what was given is left as it was"


@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>'\"#, \n\t%@`?", max_size=60).map(str.encode))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:  # nothing so short is a recipe
        load_recipe(path)
    assert str(path) in str(caught.value)


@given(st.lists(st.text(alphabet="data.train0=1[]{}: ", max_size=16), max_size=3))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_overrides(written, overrides):
    try:
        load_recipe(written(SFT), overrides)
    except UserError:
        return
