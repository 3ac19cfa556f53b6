"""What a parameter is for one tensor. The numbers were checked against mergekit's own planner once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.merge.configurations import BASE, config_of, sliced_of
from trimtab.errors import UserError
from trimtab.merge.config import Condition, MergeConfig, read_config
from trimtab.merge.methods import Parameter, parameters_of
from trimtab.merge.settings import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    Position,
    layer_position,
    value_at,
    value_of,
)

NUMBER = Parameter("weight", "number", "non_base")
FLAG = Parameter("normalize", "flag", "shared")
BLOCKS = Parameter("ratio", "blocks", "shared")
MLP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def value(
    config: MergeConfig,
    name: str,
    tensor_name: str = MLP,
    position: Position = BEFORE_LAYERS,
    *,
    slice_: int = 0,
    source: int | None = 0,
) -> Any:
    part = config.slices[slice_]
    parameter = parameters_of(config.method, config.fidelity)[name]
    given_source = None if source is None else part.sources[source]
    return value_of(config, part, given_source, parameter, tensor_name, position)


# Positions


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0]), (5, [0.0, 0.25, 0.5, 0.75, 1.0])],
)
def test_t_goes_from_the_first_layer_to_the_last(count, expected):
    assert [layer_position(index, count).t for index in range(count)] == expected


def test_what_stands_outside_the_layers_is_at_0():
    assert BEFORE_LAYERS.t == AFTER_LAYERS.t == 0.0


@given(st.integers(1, 80).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_blocks_are_consecutive_and_as_equal_as_they_can_be(count_and_blocks):
    count, blocks = count_and_blocks
    found = [layer_position(index, count).block(blocks) for index in range(count)]
    sizes = [found.count(block) for block in range(blocks)]
    assert found == sorted(found)
    assert max(sizes) - min(sizes) <= 1
    assert BEFORE_LAYERS.block(blocks) == found[0] == 0
    assert AFTER_LAYERS.block(blocks) == found[-1] == blocks - 1


def test_blocks_when_the_layers_cannot_be_shared_out_evenly():
    assert [layer_position(index, 5).block(2) for index in range(5)] == [0, 0, 0, 1, 1]
    assert [layer_position(index, 7).block(3) for index in range(7)] == [0, 0, 0, 1, 1, 2, 2]


# Lists


def test_a_list_of_numbers_is_a_gradient():
    gradient = (0.1, 0.5, 2.0)
    found = [value_at(gradient, NUMBER, MLP, layer_position(index, 5)) for index in range(5)]
    assert found == [0.1, 0.3, 0.5, 1.25, 2.0]
    assert value_at(gradient, NUMBER, MLP, layer_position(0, 1)) == 2.0
    assert [value_at(gradient, NUMBER, "lm_head", at) for at in (BEFORE_LAYERS, AFTER_LAYERS)] == [0.1, 0.1]
    assert value_at((0.7,), NUMBER, MLP, layer_position(2, 3)) == 0.7


def test_a_gradient_is_rounded_as_mergekits_is():
    # (1 - f)·a + f·b; a + f·(b - a) would give 0.15 and 0.25 between the ends
    found = [value_at((0.1, 0.3), NUMBER, MLP, layer_position(index, 5)) for index in range(5)]
    assert found == [0.1, 0.15000000000000002, 0.2, 0.24999999999999997, 0.3]


def test_a_list_of_flags_is_chosen_from():
    found = [value_at((True, False, True), FLAG, MLP, layer_position(index, 6)) for index in range(6)]
    assert found == [True, True, True, False, False, True]
    assert all(isinstance(one, bool) for one in found)


def test_a_list_of_blocks_has_steps():
    ratios = (0.2, 0.8)
    found = [value_at(ratios, BLOCKS, MLP, layer_position(index, 5)) for index in range(5)]
    assert found == [0.2, 0.2, 0.2, 0.8, 0.8]
    assert value_at(ratios, BLOCKS, "model.embed_tokens.weight", BEFORE_LAYERS) == 0.2
    assert value_at(ratios, BLOCKS, "lm_head.weight", AFTER_LAYERS) == 0.8


def test_more_blocks_than_layers():
    with pytest.raises(UserError, match=r"^ratio lists 3 blocks, and there are 2 layers; give at most one"):
        value_at((0.1, 0.2, 0.3), BLOCKS, MLP, layer_position(0, 2))


# Conditions


def test_the_first_filter_that_lets_a_tensor_through_counts():
    setting = (Condition("mlp", 1.0), Condition("layers.1.", (2.0, 4.0)), Condition(None, 3.0))
    middle = layer_position(1, 3)
    assert value_at(setting, NUMBER, MLP, middle) == 1.0
    assert value_at(setting, NUMBER, NORM, middle) == 3.0 == (2.0 + 4.0) / 2
    assert value_at(setting[:2], NUMBER, "lm_head.weight", AFTER_LAYERS) is None


@pytest.mark.parametrize("anything", [None, "*"])
def test_filters_for_every_tensor(anything):
    assert value_at((Condition(anything, 1.0), Condition("mlp", 2.0)), NUMBER, MLP, BEFORE_LAYERS) == 1.0


def test_a_filter_is_plain_text():
    assert value_at((Condition("m.p", 1.0),), NUMBER, MLP, BEFORE_LAYERS) is None
    assert value_at((Condition("mlp*", 1.0),), NUMBER, MLP, BEFORE_LAYERS) is None


# Levels


def levels(source: Any, slice_: Any, whole: Any) -> MergeConfig:
    """A ties over slices with ``weight`` at each level where one is given."""
    values = sliced_of("ties")
    del values["parameters"]
    for part in values["slices"]:
        part["sources"][0]["parameters"] = {"weight": 0.25}
    written = [(values["slices"][0]["sources"][0], source), (values["slices"][0], slice_), (values, whole)]
    for where, weight in written:
        where["parameters"] = {} if weight is None else {"weight": weight}
    return read_config(values)


@pytest.mark.parametrize(
    ("source", "slice_", "whole", "expected"),
    [
        (1, 2, 3, 1.0),
        (None, 2, 3, 2.0),
        (None, None, 3, 3.0),
        ([{"filter": "norm", "value": 1}], 2, 3, 2.0),
        ({"filter": "norm", "value": 1}, {"filter": "norm", "value": 2}, 3, 3.0),
        ([{"filter": "norm", "value": 1}, {"value": 4}], 2, 3, 4.0),
        (0, 2, 3, 0.0),
    ],
)
def test_the_nearest_level_that_gives_a_value_counts(source, slice_, whole, expected):
    assert value(levels(source, slice_, whole), "weight") == expected


def test_a_level_of_another_slice_does_not_count():
    config = levels(None, 2, 3)
    assert value(config, "weight", slice_=1) == 0.25
    assert value(config, "weight", slice_=1, source=1) == 3.0


def test_a_shared_parameter_is_the_slices_or_the_whole_merges():
    values = sliced_of("dare_linear")
    values["slices"][0]["parameters"] = {"lambda": [{"filter": "mlp", "value": 0.5}], "normalize": 1}
    values["parameters"] |= {"lambda": 2, "rescale": [True, False]}
    config = read_config(values)
    assert [value(config, "lambda", name, source=None) for name in (MLP, NORM)] == [0.5, 2.0]
    assert [value(config, "normalize", slice_=index, source=None) for index in (0, 1)] == [True, False]
    ends = (layer_position(0, 2), layer_position(1, 2))
    assert [value(config, "rescale", MLP, end, source=None) for end in ends] == [True, False]


@pytest.mark.parametrize(
    ("method", "fidelity", "expected"),
    [
        ("ties", "paper", {"density": 1.0, "lambda": 1.0, "normalize": True, "rescale": False}),
        ("dare_ties", "paper", {"density": 1.0, "lambda": 1.0, "normalize": True, "rescale": True}),
        ("dare_ties", "mergekit", {"density": 1.0, "lambda": 1.0, "normalize": False, "rescale": True}),
    ],
)
def test_defaults(method, fidelity, expected):
    config = read_config({**config_of(method), "fidelity": fidelity})
    assert {name: value(config, name) for name in expected} == expected


def test_a_default_comes_in_where_no_filter_holds():
    config = read_config(config_of("ties", density=[{"filter": "mlp", "value": 0.5}]))
    assert [value(config, "density", name) for name in (MLP, NORM)] == [0.5, 1.0]


def test_no_value_and_no_default():
    config = read_config(config_of("ties", weight=[{"filter": "mlp", "value": 0.5}]))
    assert value(config, "weight") == 0.5
    with pytest.raises(UserError) as caught:
        value(config, "weight", NORM)
    assert str(caught.value) == (
        f"weight has no value for the tensor '{NORM}' of 'org/a': no filter lets it through; add a last item "
        "without a filter, such as - value: 1.0, or weight under parameters"
    )
    config = read_config(config_of("slerp", t={"filter": "mlp", "value": 0.5}))
    with pytest.raises(UserError, match=r"^t has no value for the tensor 'lm_head.weight': no filter"):
        value(config, "t", "lm_head.weight", source=None)


def test_a_source_of_the_base_has_the_parameters_of_every_input():
    values = {**config_of("linear", weight=[0.0, 1.0]), "base_model": BASE}
    values["models"][1]["parameters"] = {"weight": 3}
    config = read_config(values)
    found = [value(config, "weight", MLP, layer_position(1, 3), source=source) for source in (0, 1)]
    assert found == [0.5, 3.0]
