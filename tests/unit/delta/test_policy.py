"""Whether a policy equals the reference, in whatever dtype it was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.errors import UserError
from trimtab.ops import content_hash

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, ReferenceDelta]:
    """By the dtype of the reference's checkpoint."""
    folder = tmp_path_factory.mktemp("deltas")
    base = made.written(made.tied_llama(0), folder / "base")
    saved = {}
    for dtype in DTYPES:
        reference = made.written(made.tied_llama(1).to(dtype), folder / str(dtype))
        delta = ReferenceDelta.between(reference=reference, base=base)
        saved[dtype] = ReferenceDelta.load(delta.save(folder / f"delta-{dtype}"))
    return saved


@pytest.mark.parametrize("policy", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_the_reference_in_any_dtype_matches(
    deltas: dict[torch.dtype, ReferenceDelta], stored: torch.dtype, policy: torch.dtype
) -> None:
    model = made.tied_llama(1).to(stored).to(policy)
    deltas[stored].check_policy(model.named_parameters())


@pytest.mark.parametrize("policy", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_another_model_does_not(
    deltas: dict[torch.dtype, ReferenceDelta], stored: torch.dtype, policy: torch.dtype
) -> None:
    model = made.tied_llama(0).to(policy)
    names = [name for name, _ in model.named_parameters() if "norm" not in name]  # norms start at 1 in both
    matches = [deltas[stored].reference_matches(name, model.get_parameter(name)) for name in names]
    assert matches == [False] * len(names)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_entry_is_enough(deltas: dict[torch.dtype, ReferenceDelta], dtype: torch.dtype) -> None:
    weight = made.tied_llama(1).model.layers[1].mlp.up_proj.weight.detach().to(dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    assert deltas[dtype].reference_matches(name, weight)
    weight.view(-1)[200] *= 1.5
    assert not deltas[dtype].reference_matches(name, weight)
    weight.view(-1)[200] /= 1.5


def test_exchanged_entries_and_other_shapes_do_not_match(deltas: dict[torch.dtype, ReferenceDelta]) -> None:
    weight = made.tied_llama(1).model.layers[1].mlp.up_proj.weight.detach()
    name = "model.layers.1.mlp.up_proj.weight"
    assert not deltas[torch.float32].reference_matches(name, weight.flip(0))
    assert not deltas[torch.float32].reference_matches(name, weight.reshape(16, 24))
    assert not deltas[torch.float32].reference_matches(name, weight[:20])


def test_the_sentence_counts_all_and_names_the_first(deltas: dict[torch.dtype, ReferenceDelta]) -> None:
    policy = made.tied_llama(1)
    with torch.no_grad():
        for layer in policy.model.layers:
            for projection in (layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.q_proj):
                projection.weight.mul_(1.01)
    with pytest.raises(UserError) as raised:
        deltas[torch.float32].check_policy(policy.named_parameters())
    sentence = str(raised.value)
    assert "in 6 of 20 parameters (model.layers.0.self_attn.q_proj.weight, " in sentence
    assert ", …)" in sentence
    assert "policy_differs=True" in sentence


def test_parameters_that_the_delta_lacks_are_passed_over(deltas: dict[torch.dtype, ReferenceDelta]) -> None:
    named = [*made.tied_llama(1).named_parameters(), ("value_head.weight", torch.ones(2))]
    deltas[torch.float32].check_policy(named)


def test_shards_sum_up_to_the_whole(deltas: dict[torch.dtype, ReferenceDelta]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = made.tied_llama(1).get_parameter(name).detach()
    dtype, expected = deltas[torch.bfloat16].reference_hash(name, torch.float32)
    assert dtype == torch.bfloat16
    halves = weight.to(dtype).view(-1).tensor_split(3)
    offsets = [0, len(halves[0]), len(halves[0]) + len(halves[1])]
    parts = [content_hash(part, offset=offset) for part, offset in zip(halves, offsets, strict=True)]
    assert sum(parts) % 2**64 == expected


def test_the_hash_may_be_the_callers(deltas: dict[torch.dtype, ReferenceDelta]) -> None:
    asked: list[Any] = []

    def hash_of(tensor: Tensor) -> int:
        asked.append(tensor.dtype)
        return content_hash(tensor)

    model = made.tied_llama(1)
    deltas[torch.float16].check_policy(model.named_parameters(), hash_of)
    assert asked == [torch.float16] * 20


def test_a_delta_of_a_larger_vocabulary(tmp_path: Path) -> None:
    reference, base = made.tied_llama(1, vocab_size=44), made.tied_llama(0)
    delta = ReferenceDelta.between(reference=reference, base=base)
    delta.check_policy(reference.named_parameters())
    with pytest.raises(UserError, match=r"in \d+ of 20 parameters \(model.embed_tokens.weight"):
        delta.check_policy(base.named_parameters())
