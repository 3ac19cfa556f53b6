"""The delta of an adapter against what it was before its training."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.delta import checkpoints as made
from trimtab import ReferenceDelta, UserError
from trimtab.delta import command

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = "base_model.model.model.embed_tokens"
SHAPES = {
    f"{LAYER}.lora_A.weight": (2, 6),
    f"{LAYER}.lora_B.weight": (5, 2),
    f"{LAYER}.lora_B.bias": (5,),
    f"{LAYER}.lora_magnitude_vector": (5,),
    f"{TOKENS}.lora_embedding_A": (2, 7),
    f"{TOKENS}.lora_embedding_B": (6, 2),
    "base_model.model.score.weight": (1, 6),
}
STARTS_AT_ZERO = {
    "model.layers.0.self_attn.q_proj.lora_B.weight",
    "model.layers.0.self_attn.q_proj.lora_B.bias",
    "model.embed_tokens.lora_embedding_A",
}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def canonical(key: str) -> str:
    name = key.removeprefix("base_model.model.")
    return f"{name}.weight" if name.endswith("vector") else name


def adapter(
    folder: Path, initial: dict[str, Tensor] | None = None, **configuration: Any
) -> tuple[Path, dict[str, Tensor]]:
    """Write an adapter folder; its tensors by canonical name."""
    folder.mkdir()
    trained = tensors(1)
    save_file(trained, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "init_lora_weights": True, **configuration}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if initial is not None:
        save_file(initial, folder / "initial_adapter.safetensors")
    return folder, {canonical(key): value for key, value in trained.items()}


def test_what_was_kept_is_subtracted(tmp_path: Path) -> None:
    initial = tensors(2)
    folder, trained = adapter(tmp_path / "a", initial)
    delta = ReferenceDelta.between(reference=folder)
    assert set(delta.names()) == set(trained)
    for key, before in initial.items():
        assert torch.equal(delta.tensor(canonical(key)), trained[canonical(key)] - before), key
    assert delta.assumption is None
    assert delta.reference.source == str(folder)
    assert delta.base.source == f"{folder}/initial_adapter.safetensors"
    delta.check_policy(trained.items())
    delta.save(tmp_path / "tau")
    assert ReferenceDelta.load(tmp_path / "tau").fingerprint == delta.fingerprint


def test_without_it_b_is_taken_to_have_started_at_zero(tmp_path: Path) -> None:
    folder, trained = adapter(tmp_path / "a")
    delta = ReferenceDelta.between(reference=folder)
    moved = {name for name in trained if bool(delta.tensor(name).any())}
    assert moved == STARTS_AT_ZERO
    for name in moved:
        assert torch.equal(delta.tensor(name), trained[name])
        assert torch.equal(delta.slice(name, (slice(1, 2),)), trained[name][1:2])
    assert not delta.slice("model.layers.0.self_attn.q_proj.lora_A.weight", (slice(1, 2),)).any()
    sentence = (
        f"'{folder}' has no initial_adapter.safetensors, so its B are assumed to have started at 0 and its A "
        "as they are now: τ is B, and 0 everywhere else"
    )
    assert delta.assumption == sentence
    assert delta.base.source == f"{folder} with B = 0"


@pytest.mark.parametrize(
    ("configuration", "what"),
    [
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"init_lora_weights": "pissa"}, "was initialised by 'pissa'"),
        ({"init_lora_weights": False}, "was initialised by False"),
    ],
)
def test_where_b_did_not_start_at_zero_it_must_have_been_kept(
    configuration: dict[str, Any], what: str, tmp_path: Path
) -> None:
    folder, _ = adapter(tmp_path / "a", **configuration)
    with pytest.raises(
        UserError, match=rf"{what} and has no initial_adapter\.safetensors, so what it started"
    ):
        ReferenceDelta.between(reference=folder)
    folder, trained = adapter(tmp_path / "b", tensors(2), **configuration)
    assert len(ReferenceDelta.between(reference=folder)) == len(trained)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}]
)
def test_kinds_of_lora_are_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    folder, trained = adapter(tmp_path / "a", **settings)
    delta = ReferenceDelta.between(reference=folder)
    assert {name for name in trained if bool(delta.tensor(name).any())} == STARTS_AT_ZERO


def test_an_initial_adapter_of_another_one_is_refused(tmp_path: Path) -> None:
    initial = tensors(2)
    del initial[f"{LAYER}.lora_A.weight"]
    folder, _ = adapter(tmp_path / "a", initial)
    with pytest.raises(UserError, match=r"1 missing \(model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight\)"):
        ReferenceDelta.between(reference=folder)


def test_a_whole_model_needs_a_base(tmp_path: Path) -> None:
    made.llama(0).save_pretrained(tmp_path / "m")
    for reference in (tmp_path / "m", made.llama(0)):
        with pytest.raises(
            UserError, match=r"base is missing: the reference .* is no adapter folder, so give"
        ):
            ReferenceDelta.between(reference=reference)


def test_the_command_says_what_it_assumes(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    console = Console(file=StringIO(), width=200)
    command.run(str(folder), None, str(tmp_path / "tau"), console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "so its B are assumed to have started at 0" in said
    assert f"base      {ReferenceDelta.load(tmp_path / 'tau').base.fingerprint}  {folder} with B = 0" in said
