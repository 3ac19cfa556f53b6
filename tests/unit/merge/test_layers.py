"""Stacks of layers of which more are stored than stated, or none is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.merge import made
from tests.unit.merge.test_plan import LAYERS, Place, outputs, plan_of, sliced
from trimtab.errors import UserError
from trimtab.merge import merge
from trimtab.merge.config import read_config
from trimtab.merge.layers import Layers


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}.w" for index in range(count)]


@pytest.mark.parametrize(
    ("keys", "config", "counts", "surplus"),
    [
        (numbered("model.layers.", 4), {"num_hidden_layers": 3}, {"model.layers.": 3}, {"model.layers.": 1}),
        (numbered("model.layers.", 2), {"num_hidden_layers": 3}, {}, {}),
        (numbered("model.layers.", 2), {"num_hidden_layers": 0}, {}, {}),
        (
            numbered("decoder.layers.", 2) + numbered("encoder.layers.", 3),
            {"decoder_layers": 2, "encoder_layers": 3},
            {"decoder.layers.": 2, "encoder.layers.": 3},
            {},
        ),
        (  # a tower beside it is no stack of the text's
            numbered("model.layers.", 4) + numbered("vision.blocks.", 5),
            {"text_config": {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}},
            {"model.layers.": 3},
            {"model.layers.": 1},
        ),
        (
            numbered("model.layers.", 4) + numbered("vision.blocks.", 5),
            {"text_config": {"num_hidden_layers": 3}},
            {},
            {},
        ),
    ],
)
def test_stacks(
    keys: list[str], config: dict[str, Any], counts: dict[str, int], surplus: dict[str, int]
) -> None:
    layers = Layers.of(keys, config)
    assert (layers.counts, layers.surplus) == (counts, surplus)


def test_layers_behind_the_last_one_stand_after_the_layers(place: Place) -> None:
    one, base = (place.model(name, num_hidden_layers=LAYERS - 1) for name in ("one", "base"))
    found = outputs(plan_of(made.values_of("hma", base, [one], parameters={"ratio": [0.25, 0.5, 0.75]})))
    ratios = [found[f"model.layers.{i}.mlp.weight"].parts[1].weight for i in range(LAYERS)]
    assert ratios == [0.25, 0.5, 0.75, 0.75]
    each = [{"weight": [0, 2], "density": 1}]
    found = outputs(plan_of(made.values_of("ties", base, [one], each)))
    weights = [found[f"model.layers.{i}.mlp.weight"].parts[0].weight for i in range(LAYERS)]
    assert weights == [0, 1, 2, 0]  # after the layers: at 0, as in mergekit


def test_slices_do_not_place_them(place: Place) -> None:
    one = place.model("one", num_hidden_layers=LAYERS - 1)
    with pytest.raises(
        UserError, match=r"stores 1 more than the 3 that its config.json states \(model.layer"
    ):
        plan_of(sliced([(one, (0, 2), {"weight": 1})]))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (
            {"method": "ties", "each": [{"weight": [0, 1], "density": 1}]},
            "models.0.parameters.weight lists 2",
        ),
        ({"method": "hma", "parameters": {"ratio": [0, 1, 0.5]}}, "parameters.ratio lists 3"),
        (
            {"method": "slerp", "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}},
            "parameters.t lists 2",
        ),
    ],
)
def test_a_list_over_layers_that_are_not_found_is_refused(
    place: Place, values: dict[str, Any], key: str
) -> None:
    one, base = (place.model(name, num_hidden_layers=LAYERS + 1) for name in ("one", "base"))
    values = dict(values)
    method, each = values.pop("method"), values.pop("each", None)
    with pytest.raises(UserError) as caught:
        plan_of(made.values_of(method, base, [one], each, **values))
    assert f"{key} values over the layers, but none are found in" in str(caught.value)
    assert "its config.json states 5" in str(caught.value)


def test_one_value_needs_no_layers(place: Place) -> None:
    one, base = (place.model(name, num_hidden_layers=LAYERS + 1) for name in ("one", "base"))
    for ratio in (0.5, [0.5]):
        assert plan_of(made.values_of("hma", base, [one], parameters={"ratio": ratio})).outputs


SHAPES_OF_THREE = {"model.embed_tokens.weight": (2, 2), **{f"model.layers.{i}.w": (2,) for i in range(3)}}


@pytest.mark.parametrize("top", [{}, {"num_hidden_layers": 3}, {"num_hidden_layers": 7}])
def test_slices_change_the_count_where_it_stands(tmp_path: Path, top: dict[str, Any]) -> None:
    """And the lists with an entry per layer beside it; the tower's own count stays."""
    text = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "no_rope_layers": [1, 1, 0], "eos": [1]}
    vision = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}
    one = made.folder(
        tmp_path / "one",
        made.random_tensors(SHAPES_OF_THREE, 1),
        **top,
        text_config=text,
        vision_config=vision,
    )
    values = sliced([(one, (0, 2), {"weight": 1})], [(one, (0, 3), {"weight": 1})])
    out = merge(read_config(values), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"] == {
        "num_hidden_layers": 5,
        "layer_types": ["a", "b", "a", "b", "c"],
        "no_rope_layers": [1, 1, 1, 1, 0],
        "eos": [1],
    }
    assert config["vision_config"] == vision
    stated = top.get("num_hidden_layers")
    assert config.get("num_hidden_layers") == (5 if stated == 3 else stated)
