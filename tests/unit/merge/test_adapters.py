"""A model with a LoRA adapter on it is read as PEFT would merge it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.delta import checkpoints as made
from trimtab.delta.locate import Located
from trimtab.errors import UserError
from trimtab.merge.adapters import Adapted
from trimtab.merge.architecture import CONV1D_FAMILIES
from trimtab.merge.inputs import FolderInput

LINEAR = ["q_proj", "o_proj", "down_proj"]


def adapter(folder: Path, base: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Put a random LoRA adapter on the model in ``base`` with PEFT and save it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights and of Conv1D
        loaded = made.loaded(base)
        if rows := settings.pop("resize", 0):
            loaded.resize_token_embeddings(rows)
        model = get_peft_model(
            loaded, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings})
        )
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            elif parameter.requires_grad:
                parameter.data *= 1.5
        model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    return folder


def merged(base: Path, folder: Path, rows: int = 0) -> dict[str, Tensor]:
    """The oracle: what PEFT makes of it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made.loaded(base)
        if rows:
            model.resize_token_embeddings(rows)
        values: dict[str, Tensor] = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return values


def adapted(base: Path, folder: Path) -> Adapted:
    return Adapted(FolderInput(Located(base, "base")), folder, "base+adapter")


def read(model: Any, key: str) -> Tensor:
    shape = model.shape(key)
    values: Tensor = model.read(
        key, 0, shape.numel() if hasattr(shape, "numel") else torch.Size(shape).numel()
    )
    return values.view(shape)


def assert_merged(base: Path, folder: Path, prefix: str = "", rows: int = 0) -> int:
    """Compare all tensors with PEFT's; fp32 within 4 ulp of the largest entry, below that one rounding.

    Returns:
        How many tensors differ from the base's.
    """
    model, oracle, before = (
        adapted(base, folder),
        merged(base, folder, rows),
        FolderInput(Located(base, "base")),
    )
    changed = 0
    for key in model.keys():  # noqa: SIM118
        ours, theirs = read(model, key), oracle[prefix + key]
        assert ours.dtype == theirs.dtype == model.dtype(key)
        assert ours.shape == theirs.shape == model.shape(key)
        scale = torch.finfo(ours.dtype).eps * float(theirs.abs().max())
        assert (
            float((ours.double() - theirs.double()).abs().max())
            <= (4 if ours.dtype == torch.float32 else 1) * scale
        )
        if ours.dtype != torch.float32:  # products differ in their last fp32 bit, so few roundings may differ
            assert float((ours != theirs).float().mean()) < 0.01
        changed += ours.shape != before.shape(key) or not torch.equal(ours, read(before, key))
    return changed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.written(made.llama(0), tmp_path_factory.mktemp("llama"), shard="1GB")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.written(made.tied_llama(0), tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, 6),
        ({"use_rslora": True}, 6),
        (
            {
                "rank_pattern": {r"layers\.0\..*q_proj": 2, r"layers\.1\..*": 3},
                "alpha_pattern": {"^model.layers.0.*": 5},
            },
            6,
        ),
        ({"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}, 8),
        ({"modules_to_save": ["lm_head", "norm"]}, 12),
        ({"modules_to_save": ["embed_tokens"]}, 7),
        ({"use_dora": True}, 6),
        ({"init_lora_weights": "gaussian", "fan_in_fan_out": True}, 6),
    ],
)
def test_it_is_what_peft_merges(settings: dict[str, Any], changed: int, llama: Path, tmp_path: Path) -> None:
    assert assert_merged(llama, adapter(tmp_path, llama, **settings)) == changed


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    base = made.written(made.llama(0).to(dtype), tmp_path / "base")
    folder = adapter(
        tmp_path / "adapter", base, stored, target_modules=[*LINEAR, "embed_tokens"], modules_to_save=["norm"]
    )
    assert assert_merged(base, folder) == 12  # the final norm and four others


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_take_the_models_place(bias: str, tmp_path: Path) -> None:
    base = made.written(made.llama(0, attention_bias=True), tmp_path / "base")
    changed = assert_merged(base, adapter(tmp_path / "adapter", base, bias=bias))
    assert changed == {"all": 6 + 8, "lora_only": 6 + 4}[bias]


@pytest.mark.parametrize("square", [True, False])
def test_conv1d_is_stored_the_other_way_round(square: bool, tmp_path: Path) -> None:
    base = made.written(made.gpt2(0), tmp_path / "base")
    targets = ["c_proj"] if square else ["c_attn", "lm_head"]
    folder = (
        adapter(tmp_path / "adapter", base, target_modules=targets, modules_to_save=None) if square else None
    )
    if folder is None:
        folder = adapter(tmp_path / "adapter", base, target_modules=["c_attn", "c_fc", "wte"])
    assert assert_merged(base, folder) == (4 if square else 5)


def test_a_checkpoint_without_the_models_prefix(tmp_path: Path) -> None:
    base = made.written(made.gpt2(0), tmp_path / "base", shard="1GB")
    folder = adapter(tmp_path / "adapter", base, target_modules=["c_attn"])
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {key.removeprefix("transformer."): value for key, value in tensors.items()}, file, {"format": "pt"}
    )
    assert "h.0.attn.c_attn.weight" in load_file(file)
    assert assert_merged(base, folder, prefix="transformer.") == 2


def test_families_with_conv1d() -> None:
    """The list is transformers' own."""
    models = Path(transformers.__file__).parent / "models"
    using = {file.parent.name for file in models.glob("*/modeling_*.py") if _imports_conv1d(file)}
    assert {name.replace("openai", "openai-gpt") for name in using} == CONV1D_FAMILIES


def _imports_conv1d(file: Path) -> bool:
    return re.search(r"pytorch_utils import .*\bConv1D\b", file.read_text(encoding="utf-8")) is not None


def test_an_entry_does_not_depend_on_what_is_read_with_it(tmp_path: Path) -> None:
    base = made.written(made.llama(0, vocab_size=75).bfloat16(), tmp_path / "base")
    targets = [*LINEAR, "embed_tokens", "lm_head"]
    model = adapted(base, adapter(tmp_path / "adapter", base, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for key in model.keys():  # noqa: SIM118
        whole = read(model, key).view(-1)
        for low, high in torch.randint(0, len(whole) + 1, (20, 2), generator=generator).sort(1)[0].tolist():
            assert torch.equal(model.read(key, low, high), whole[low:high])


def test_reading_a_few_entries_makes_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made.written(made.llama(0, vocab_size=4000), tmp_path / "base")
    model = adapted(base, adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"]))
    made_rows = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: made_rows.append(size[0]) or empty(*size, **how))
    model.read("model.embed_tokens.weight", 1000 * 16 + 3, 1010 * 16 + 3)
    assert made_rows
    assert max(made_rows) <= 11 + 62


def test_embeddings_of_a_vocabulary_that_has_grown(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", llama, resize=43, target_modules=LINEAR)
    assert assert_merged(llama, folder, rows=43) == 8
    model = adapted(llama, folder)
    assert model.shape("model.embed_tokens.weight") == (43, 16)
    assert model.config["vocab_size"] == 43
    assert model.read("lm_head.weight", 42 * 16, 43 * 16).any()


def test_grown_embeddings_of_a_tied_model_are_there_twice(tied: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tied, resize=43)
    assert "base_model.model.lm_head.weight" in load_file(folder / "adapter_model.safetensors")
    model = adapted(tied, folder)
    assert assert_merged(tied, folder, rows=43) == 7
    assert model.shape("model.embed_tokens.weight") == (43, 16)
    assert "lm_head.weight" not in model.keys()  # noqa: SIM118


def test_lora_on_a_tied_embedding_says_that_it_changes_both(tied: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tied, target_modules=[*LINEAR, "embed_tokens"])
    assert assert_merged(tied, folder) == 7
    assert "model.embed_tokens.weight changes lm_head.weight as well" in adapted(tied, folder).notes[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_half_of_a_tied_pair_is_refused(settings: dict[str, Any], tied: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tied, **settings)
    with pytest.raises(
        UserError, match=r"independently, but base ties its input and output .* untie"
    ) as raised:
        adapted(tied, folder)
    line = re.search(r'python -c "(.*)"', str(raised.value))
    assert line is not None


def test_the_line_that_unties_works(tied: Path, tmp_path: Path) -> None:
    base = made.written(made.tied_llama(0), tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    with pytest.raises(UserError) as raised:
        adapted(base, folder)
    line = re.search(r'python -c "(.*)"', str(raised.value))
    assert line is not None
    exec(line[1], {})
    untied = tmp_path / "base-untied"
    assert assert_merged(untied, folder) == 1


def test_trained_tied_embeddings(tied: Path, tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    folder = adapter(tmp_path / "adapter", tied, **settings)
    assert assert_merged(tied, folder) == 7


def test_another_base_is_allowed(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", llama)
    other = made.written(made.llama(5), tmp_path / "other")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama)
    assert assert_merged(other, folder) == 6


def test_the_adapters_tokenizer_goes_before_the_models(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", llama)
    assert adapted(llama, folder).tokenizer_folder == llama
    (folder / "tokenizer.json").write_text("{}")
    assert adapted(llama, folder).tokenizer_folder == folder


def test_fingerprints(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", llama)
    before = adapted(llama, folder).fingerprint()
    assert before == adapted(llama, folder).fingerprint() != FolderInput(Located(llama, "base")).fingerprint()
    configure(folder, lora_alpha=9)
    assert adapted(llama, folder).fingerprint() != before


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit(folder: Path, **tensors: Tensor | None) -> None:
    """Change tensors of an adapter, named without ``base_model.model.model.``; None removes one."""
    file = folder / "adapter_model.safetensors"
    named = {f"base_model.model.model.{key}": value for key, value in tensors.items()}
    values = {**load_file(file), **named}
    save_file({key: value for key, value in values.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; a merge takes adapters of type LORA only"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes the model's own",
        ),
        ({"lora_bias": True}, "uses lora_bias, which is not merged here; merge it once with PEFT"),
        ({"trainable_token_indices": [1], "use_qalora": True}, "uses trainable_token_indices, use_qalora"),
        ({"r": 0}, "r 0; a whole number above 0 was expected"),
        ({"r": "8"}, "r '8'; a whole number"),
        ({"lora_alpha": True}, "lora_alpha True; a number was expected"),
        ({"rank_pattern": [1]}, r"rank_pattern \[1\]; an object"),
        ({"rank_pattern": {"q(": 4}}, r"'q\(' in rank_pattern is no regular expression"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern.q 'x'; a number"),
        (
            {"r": 5},
            r"6 mismatched \(model.layers.0.mlp.down_proj \(its rank is 4 and 4, adapter_config.json says 5",
        ),
    ],
)
def test_settings_that_are_refused(
    settings: dict[str, Any], sentence: str, llama: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path, llama)
    configure(folder, **settings)
    with pytest.raises(UserError, match=sentence):
        adapted(llama, folder)


def test_all_misfits_are_told_at_once(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, llama)
    edit(
        folder,
        **{
            "layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16),
            "layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(16, 4),
            "layers.0.self_attn.q_proj.lora_B.weight": None,
            "layers.0.self_attn.o_proj.lora_A.weight": torch.zeros(4, 17),
            "layers.0.self_attn.o_proj.lora_B.bias": torch.zeros(16),
            "norm.weight": torch.zeros(5),
        },
    )
    with pytest.raises(UserError) as raised:
        adapted(llama, folder)
    sentence = str(raised.value)
    assert sentence.startswith("base+adapter: the adapter does not fit base: 2 missing (")
    assert "model.layers.7.self_attn.q_proj.weight" in sentence
    assert "model.layers.0.self_attn.q_proj.weight: its lora_A alone do not make a change" in sentence
    assert "1 extra (model.layers.0.self_attn.o_proj.lora_B.bias)" in sentence
    assert "model.norm.weight (5 in the adapter, 16 in the model)" in sentence
    assert "model.layers.0.self_attn.o_proj.weight (16 × 17 in the adapter, 16 × 16 in the model)" in sentence


def test_a_convolution_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, llama)
    edit(folder, **{"layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16, 1, 1)})
    with pytest.raises(UserError, match="weights of two dimensions are needed"):
        adapted(llama, folder)


def test_dora_on_what_is_no_linear_layer(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, llama, use_dora=True, target_modules=["embed_tokens"])
    with pytest.raises(
        UserError, match=r"use_dora on model.embed_tokens, which is no linear layer; merge it once"
    ):
        adapted(llama, folder)


def test_dora_without_its_norms(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, llama)
    configure(folder, use_dora=True)
    with pytest.raises(UserError, match=r"6 missing \(model.layers.0.mlp.down_proj.lora_magnitude_vector, "):
        adapted(llama, folder)


def test_an_empty_adapter(llama: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, llama)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter holds no weights"):
        adapted(llama, folder)


def test_what_is_no_adapter(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*adapter_config.json: No such file"):
        adapted(llama, tmp_path)
    folder = adapter(tmp_path, llama)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="holds pickled weights"):
        adapted(llama, folder)


def test_experts_that_lie_one_by_one(tmp_path: Path) -> None:
    """A checkpoint with one tensor per expert takes an adapter on single experts."""
    base = made.written(made.llama(0), tmp_path / "base", shard="1GB")
    folder = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    renamed = {
        key.replace("layers.0.self_attn.q_proj", "layers.0.mlp.experts.1.w1"): value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(renamed, folder / "adapter_model.safetensors")
    weight = torch.randn(16, 16)
    made.edited(base, lambda tensors: tensors.update({"model.layers.0.mlp.experts.1.w1.weight": weight}))
    start = "base_model.model.model.layers.0.mlp.experts.1.w1.lora_"
    expected = weight + 2 * renamed[f"{start}B.weight"] @ renamed[f"{start}A.weight"]
    assert torch.allclose(read(adapted(base, folder), "model.layers.0.mlp.experts.1.w1.weight"), expected)
