"""What a merge decides before it begins: which tensors, from where, in which dtype, with which parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.merge import made
from trimtab.errors import UserError
from trimtab.merge.config import read_config
from trimtab.merge.layers import Layers
from trimtab.merge.plan import Output, Plan, make_plan
from trimtab.ops.combine import Operator

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LAYERS = 4
SHAPES = {
    "model.embed_tokens.weight": (6, 2),
    **{f"model.layers.{i}.{part}.weight": (2, 2) for i in range(LAYERS) for part in ("attn", "mlp")},
    "model.norm.weight": (2,),
    "lm_head.weight": (6, 2),
}


class Place:
    """Makes models of the same tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(
        self,
        name: str,
        dtype: torch.dtype = F32,
        tensors: Mapping[str, Tensor] | None = None,
        without: Sequence[str] = (),
        **config: Any,
    ) -> Path:
        made_up = made.random_tensors(SHAPES, len(name) + ord(name[0])) if tensors is None else tensors
        kept = {key: value.to(dtype) for key, value in made_up.items() if key not in without}
        return made.folder(self.folder / name, kept, **{"num_hidden_layers": LAYERS, **config})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def plan_of(values: Mapping[str, Any]) -> Plan:
    return make_plan(read_config(dict(values)))


def outputs(plan: Plan) -> dict[str, Output]:
    return {output.entry.key: output for output in plan.outputs}


def ties(base: Path, models: Sequence[Path], **top: Any) -> Plan:
    each = [{"weight": 1, "density": 0.5}] * len(models)
    return plan_of(made.values_of("ties", base, models, each, **top))


# which models, which tensors


def test_the_base_comes_first_and_each_model_once(place: Place) -> None:
    base, one, two = (place.model(name) for name in ("base", "one", "two"))
    plan = ties(base, [one, two])
    assert [model.folder for model in plan.inputs] == [base, one, two]
    assert plan.donor == 0
    plan = plan_of(made.values_of("linear", None, [two, one], [{"weight": 1}] * 2))
    assert [model.folder for model in plan.inputs] == [two, one]
    assert plan.donor == 0


def test_every_tensor_of_the_base_from_the_same_tensor_of_each_model(place: Place) -> None:
    plan = ties(place.model("base"), [place.model("one"), place.model("two")])
    found = outputs(plan)
    assert sorted(found) == sorted(SHAPES)
    for key, output in found.items():
        assert output.entry.shape == SHAPES[key]
        assert [(part.origin.model, part.origin.key) for part in output.parts] == [(1, key), (2, key)]
        assert output.base is not None
        assert (output.base.model, output.base.key) == (0, key)
    count = sum(output.entry.count for output in plan.outputs)
    assert plan.size == 4 * count
    assert plan.reading == 3 * 4 * count
    assert plan.layers is None


def test_what_models_compute_themselves_is_neither_missing_nor_written(place: Place) -> None:
    stale = {"model.layers.0.rotary_emb.inv_freq": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)}
    tensors = made.random_tensors(SHAPES, 3)
    with_them = place.model("base", tensors=tensors | stale)
    assert sorted(outputs(ties(with_them, [place.model("one")]))) == sorted(SHAPES)
    assert sorted(outputs(ties(place.model("one"), [with_them]))) == sorted(SHAPES)


# tied heads


def test_a_model_that_ties_its_head_gives_its_embedding_for_it(place: Place) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    one = place.model("one", without=[head], tie_word_embeddings=True)
    output = outputs(ties(place.model("base"), [one]))[head]
    assert output.parts[0].origin.key == embedding
    assert output.base is not None
    assert output.base.key == head


def test_a_head_that_the_base_ties_and_a_model_has_of_its_own(place: Place) -> None:
    """There is no place for it in the output, which is configured as the base is."""
    base = place.model("base", without=["lm_head.weight"], tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"1 extra \(lm_head.weight in .*one\)"):
        ties(base, [place.model("one")])


def test_a_head_that_is_missing_and_not_tied(place: Place) -> None:
    one = place.model("one", without=["lm_head.weight"], tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"1 missing \(lm_head.weight in"):
        ties(place.model("base"), [one])


def test_a_stored_head_is_the_embedding_where_it_is_tied(place: Place) -> None:
    """Both store it though it is tied: the copy in the other model is no extra tensor."""
    base = place.model("base", without=["lm_head.weight"], tie_word_embeddings=True)
    one = place.model("one", tie_word_embeddings=True)
    assert "lm_head.weight" not in outputs(ties(base, [one]))


# dtypes


@pytest.mark.parametrize(
    ("dtypes", "fidelity", "asked", "expected"),
    [
        # models (the base first), fidelity, (dtype, out_dtype), (read as, arithmetic in, written as)
        ((F32, F32), "paper", {}, (None, F32, F32)),
        ((BF16, BF16), "paper", {}, (None, F32, BF16)),
        ((BF16, F16), "paper", {}, (None, F32, F32)),
        ((BF16, F64), "paper", {}, (None, F64, F64)),
        ((F32, F32), "paper", {"dtype": "bfloat16"}, (None, F32, BF16)),
        ((F32, F32), "paper", {"dtype": "float64"}, (None, F64, F64)),
        ((F64, F64), "paper", {"dtype": "float32"}, (None, F64, F32)),
        ((BF16, BF16), "paper", {"out_dtype": "float32"}, (None, F32, F32)),
        ((F32, F32), "paper", {"dtype": "float32", "out_dtype": "float16"}, (None, F32, F16)),
        ((F32, F32), "mergekit", {}, (F32, F32, F32)),
        ((BF16, BF16), "mergekit", {}, (BF16, BF16, BF16)),
        ((F16, F32), "mergekit", {}, (F32, F32, F32)),
        ((F32, F32), "mergekit", {"dtype": "bfloat16"}, (BF16, BF16, BF16)),
        ((BF16, BF16), "mergekit", {"dtype": "float32"}, (F32, F32, F32)),
        ((BF16, BF16), "mergekit", {"dtype": "float32", "out_dtype": "bfloat16"}, (F32, F32, BF16)),
    ],
)
def test_dtypes(
    place: Place,
    dtypes: tuple[torch.dtype, torch.dtype],
    fidelity: str,
    asked: dict[str, str],
    expected: tuple[torch.dtype | None, torch.dtype, torch.dtype],
) -> None:
    plan = ties(place.model("base", dtypes[0]), [place.model("one", dtypes[1])], fidelity=fidelity, **asked)
    for output in plan.outputs:
        assert (output.read, output.dtype, output.entry.dtype) == expected


def test_sums_of_16_bit_models_are_formed_in_fp32_in_both_fidelities(place: Place) -> None:
    models = [place.model("one", BF16), place.model("two", BF16)]
    for fidelity in ("paper", "mergekit"):
        plan = plan_of(made.values_of("linear", None, models, [{"weight": 1}] * 2, fidelity=fidelity))
        assert {(output.dtype, output.entry.dtype) for output in plan.outputs} == {(F32, BF16)}


# parameters


def test_a_gradient_runs_over_the_layers(place: Place) -> None:
    each = [{"weight": [0, 3], "density": [1, 0.5, 0.25]}]
    found = outputs(plan_of(made.values_of("ties", place.model("base"), [place.model("one")], each)))
    parts = [found[f"model.layers.{i}.mlp.weight"].parts[0] for i in range(LAYERS)]
    assert [part.weight for part in parts] == pytest.approx([0, 1, 2, 3])
    assert [part.rate for part in parts] == pytest.approx([1, 2 / 3, 5 / 12, 0.25])
    for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert (found[key].parts[0].weight, found[key].parts[0].rate) == (0, 1)


def test_filters_look_into_the_name(place: Place) -> None:
    weight = [{"filter": "mlp", "value": 0.25}, {"filter": "lm_head", "value": 3}, {"value": 1}]
    each = [{"weight": weight}, {"weight": 2}]
    models = [place.model("one"), place.model("two")]
    found = outputs(plan_of(made.values_of("linear", None, models, each)))
    for key, output in found.items():
        expected = 0.25 if "mlp" in key else 3 if "lm_head" in key else 1
        assert [part.weight for part in output.parts] == [expected, 2]


def test_a_models_own_value_goes_before_the_shared_one(place: Place) -> None:
    models, each = [place.model("one"), place.model("two")], [{"weight": 2}, {}]
    shared = {"weight": 7, "lambda": 0.5, "normalize": False, "density": 0.25}
    values = made.values_of("ties", place.model("base"), models, each, parameters=shared)
    for output in plan_of(values).outputs:
        assert [(part.weight, part.rate) for part in output.parts] == [(2, 0.25), (7, 0.25)]
        assert output.scale == 0.5
        assert output.operator == Operator("top", "none", "sign", normalize=False)


@pytest.mark.parametrize(
    ("method", "fidelity", "shared", "operator"),
    [
        ("ties", "paper", {"rescale": True}, Operator("top", "l1", "sign", normalize=True)),
        (
            "ties",
            "mergekit",
            {},
            Operator("top", "none", "sign_or_plus", normalize=True, counting="truncate"),
        ),
        ("dare_linear", "paper", {}, Operator("bernoulli", "expected")),
        ("dare_linear", "paper", {"rescale": False}, Operator("bernoulli")),
        ("dare_linear", "mergekit", {}, Operator("bernoulli", "l1")),
        ("dare_ties", "paper", {}, Operator("bernoulli", "expected", "sign", normalize=True)),
        ("dare_ties", "mergekit", {"normalize": True}, Operator("bernoulli", "l1", "sign_or_plus", True)),
        ("task_arithmetic", "paper", {"normalize": True}, Operator(normalize=True)),
    ],
)
def test_the_operator_is_the_methods_row_with_what_was_written(
    place: Place, method: str, fidelity: str, shared: dict[str, Any], operator: Operator
) -> None:
    values = made.values_of(
        method, place.model("base"), [place.model("one")], [{"weight": 1}], fidelity=fidelity,
        parameters=shared,
    )  # fmt: skip
    assert {output.operator for output in plan_of(values).outputs} == {operator}


def test_hma_has_a_ratio_for_each_block_of_layers(place: Place) -> None:
    base, one = place.model("base"), place.model("one")
    found = outputs(plan_of(made.values_of("hma", base, [one], parameters={"ratio": [0.25, 0.75]})))
    for key, output in found.items():
        late = key.startswith(("model.layers.2", "model.layers.3", "model.norm", "lm_head"))
        assert [part.weight for part in output.parts] == ([0.25, 0.75] if late else [0.75, 0.25])
        assert output.base is None


def test_slerp_goes_from_the_base_to_the_other(place: Place) -> None:
    base, one = place.model("base"), place.model("one")
    values = made.values_of("slerp", base, [one, base], parameters={"t": [0, 1]})
    found = outputs(plan_of(values))
    for i in range(LAYERS):
        output = found[f"model.layers.{i}.attn.weight"]
        assert output.operator is None
        assert [part.origin.model for part in output.parts] == [0, 1]
        assert output.position == pytest.approx(i / (LAYERS - 1))


# slices


def sliced(*slices: Sequence[tuple[Path, tuple[int, int], dict[str, Any]]], **top: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": str(path), "layer_range": list(layers), "parameters": own}
                    for path, layers, own in one
                ]
            }
            for one in slices
        ],
        **top,
    }


def test_slices(place: Place) -> None:
    """Layers in turn; what is before them as in the first slice, what is after them as in the last."""
    one, two = place.model("one"), place.model("two")
    values = sliced(
        [(one, (0, 2), {"weight": 1}), (two, (2, 4), {"weight": 2})],
        [(two, (1, 4), {"weight": 3}), (one, (0, 3), {"weight": 4})],
    )
    plan = plan_of(values)
    found = outputs(plan)
    assert plan.layers == 5
    assert plan.spans == ((0, 2), (1, 4))
    order = list(found)
    assert order[0] == "model.embed_tokens.weight"
    assert set(order[-2:]) == {"model.norm.weight", "lm_head.weight"}
    assert len(order) == 5 * 2 + 3
    from_layers = [(0, 2), (1, 3), (1, 0), (2, 1), (3, 2)]
    for i, layers in enumerate(from_layers):
        parts = found[f"model.layers.{i}.mlp.weight"].parts
        assert [p.origin.key for p in parts] == [f"model.layers.{j}.mlp.weight" for j in layers]
        assert [p.origin.model for p in parts] == ([0, 1] if i < 2 else [1, 0])
        assert [p.weight for p in parts] == ([1, 2] if i < 2 else [3, 4])
    assert [p.weight for p in found["model.embed_tokens.weight"].parts] == [1, 2]
    assert [p.weight for p in found["lm_head.weight"].parts] == [3, 4]


def test_a_gradient_runs_over_the_layers_of_its_slice(place: Place) -> None:
    one, two = place.model("one"), place.model("two")
    values = sliced(
        [(one, (0, 3), {"weight": [0, 1]}), (two, (0, 3), {"weight": 1})],
        [(one, (3, 4), {"weight": [0, 1]}), (two, (3, 4), {"weight": 1})],
    )
    found = outputs(plan_of(values))
    weights = [found[f"model.layers.{i}.attn.weight"].parts[0].weight for i in range(4)]
    assert weights == [0, 0.5, 1, 1]


def test_an_anchored_merge_of_slices_takes_the_base_of_its_layers(place: Place) -> None:
    base, one = place.model("base"), place.model("one")
    values = sliced(
        [(one, (0, 2), {"weight": 1}), (base, (0, 2), {})],
        [(one, (2, 4), {"weight": 1}), (base, (1, 3), {})],
        base_model=str(base),
    )
    found = outputs(plan_of({**values, "merge_method": "task_arithmetic"}))
    bases = [found[f"model.layers.{i}.attn.weight"].base for i in range(4)]
    assert [one.key for one in bases if one] == [f"model.layers.{i}.attn.weight" for i in (0, 1, 1, 2)]


def test_what_a_source_of_a_slice_has_and_the_others_do_not_is_told(place: Place) -> None:
    """In its layers that are used, and before and after them where it is used; nowhere else."""
    one = place.model("one")
    more = {f"{stem}.bias": torch.ones(2) for stem in ("model.pre", "model.norm", "model.layers.1.mlp")}
    two = place.model("two", tensors=made.random_tensors(SHAPES, 5) | more)

    def slices(*spans: tuple[int, int]) -> dict[str, Any]:
        return sliced(*([(one, span, {"weight": 1}), (two, span, {"weight": 1})] for span in spans))

    with pytest.raises(UserError) as caught:
        plan_of(slices((0, 2), (3, 4)))
    assert "3 extra (" in str(caught.value)
    assert all(key in str(caught.value) for key in more)
    with pytest.raises(UserError) as caught:
        plan_of(slices((0, 1), (2, 4)))
    assert "2 extra (model.pre.bias in" in str(caught.value)
    between = sliced(
        [(one, (0, 2), {"weight": 1})], [(two, (2, 4), {"weight": 1})], [(one, (0, 2), {"weight": 1})]
    )
    assert len(plan_of(between).outputs) == 6 * 2 + 3


# where tensors stand


@pytest.mark.parametrize(
    ("keys", "config", "counts"),
    [
        (["model.layers.0.a", "model.layers.1.a"], {"num_hidden_layers": 2}, {"model.layers.": 2}),
        (["h.0.a", "h.1.a", "wte.weight"], {"n_layer": 2}, {"h.": 2}),
        (["model.layers.0.a"], {"text_config": {"num_hidden_layers": 1}}, {"model.layers.": 1}),
        (["model.layers.0.a", "model.layers.2.a"], {"num_hidden_layers": 2}, {}),
        (["model.layers.0.a"], {}, {}),
    ],
)
def test_stacks_of_layers(keys: list[str], config: dict[str, Any], counts: dict[str, int]) -> None:
    assert Layers.of(keys, config).counts == counts


def test_experts_are_no_layers() -> None:
    keys = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(2) for j in range(4)]
    layers = Layers.of(keys, {"num_hidden_layers": 2})
    assert layers.counts == {"model.layers.": 2}
    assert layers.split("model.layers.1.mlp.experts.3.w") == ("model.layers.", 1, "mlp.experts.3.w")


def test_as_many_experts_as_layers_are_no_layers_either() -> None:
    keys = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(4) for j in range(4)]
    assert Layers.of(keys, {"num_hidden_layers": 4}).counts == {"model.layers.": 4}
