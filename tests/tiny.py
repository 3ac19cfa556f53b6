"""A language model small enough to train in a test: made on the fly, nothing is downloaded.

Two Llama layers of width 32 over a vocabulary of single characters. ``reference`` is ``base`` with small
random changes in every weight, so that τ = reference − base is dense and known.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer(chat_template: str | None = CHAT_TEMPLATE, pad_token: str | None = "<|pad|>") -> Any:
    """One token per character, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "<|unknown|>", *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="<|unknown|>")
    made.chat_template = chat_template
    if pad_token is not None:
        made.pad_token = pad_token
    return made


def model(seed: int = 0, *, tied: bool = True, dropout: float = 0.0, **config: Any) -> Any:
    """A randomly initialised Llama with two layers of width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 104,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "attention_dropout": dropout,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).float()


def write_models(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, Path]:
    """Write ``base`` and ``reference`` (base plus a small dense change) as model folders with a tokenizer."""
    base = model(0, **config)
    base.to(dtype).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            change = 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(change.to(parameter.dtype))
    base.save_pretrained(folder / "reference")
    for name in ("base", "reference"):
        tokenizer().save_pretrained(folder / name)
    return folder / "base", folder / "reference"


def write_adapter(on: Path, folder: Path, *, r: int = 2) -> Path:
    """Write a LoRA adapter on a model folder with B away from 0, and what it was before, as a run does."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from trimtab.terminal import plain_libraries

    config = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    with plain_libraries():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(on), config)
    initial = {name: value.clone() for name, value in get_peft_model_state_dict(adapted).items()}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    save_file(initial, folder / "initial_adapter.safetensors")
    tokenizer().save_pretrained(folder)
    return folder


def write_poisoned_model(folder: Path, character: str) -> Path:
    """Write a model folder whose embedding of one character is not a number; rows without it are healthy."""
    made = model(0, tied=False)
    place = tokenizer().convert_tokens_to_ids(character)
    made.get_input_embeddings().weight.data[place] = float("nan")
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational preference pairs about copying a word: chosen repeats it, rejected is another."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(chooser.choices(string.ascii_lowercase, k=chooser.randint(2, 6)))
        other = "".join(chooser.choices(string.ascii_uppercase, k=chooser.randint(2, 6)))
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"say {word}"}],
                "chosen": [{"role": "assistant", "content": word}],
                "rejected": [{"role": "assistant", "content": other}],
            }
        )
    return rows


def instruction_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational prompt-completion rows with the chosen answers of :func:`preference_rows`."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(count, seed)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(
    models: tuple[Path, Path], data: tuple[Path, Path], output: Path, **sections: Any
) -> dict[str, Any]:
    """A short DPO recipe with OnDARE on the tiny model; ``sections`` are merged into it, one level deep."""
    values: dict[str, Any] = {
        "method": "dpo",
        "reference": str(models[1]),
        "base": str(models[0]),
        "data": {"train": str(data[0]), "eval": str(data[1]), "max_length": 64},
        "optimizer": {"name": "ondare", "lr": 1e-3, "reserve_rate": 0.5, "merge_weight": 1e-3},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1},
        "output": str(output),
    }
    for name, section in sections.items():
        given = values.get(name)
        merged = {**given, **section} if isinstance(given, dict) and isinstance(section, dict) else section
        values[name] = merged
    return {name: section for name, section in values.items() if section is not None}


ADAMW = {"name": "adamw", "reserve_rate": None, "merge_weight": None}
"""What turns the optimizer section of :func:`recipe` into AdamW (with ``base=None``)."""


def train(values: dict[str, Any], **flags: bool) -> Path:
    """Run ``trimtab train`` in this process on a recipe given as values; return the run folder."""
    from trimtab.recipe import make_recipe
    from trimtab.train import config_class, run

    folder = run(make_recipe(values, config_class=config_class), **flags)
    assert folder is not None
    return folder


def weights(model_folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(model_folder / "model.safetensors")


def share_of_small(prompts: list[Any], responses: list[str], rows: Any) -> list[float]:
    """A reward that is easily learned: which share of a response's characters are small letters."""
    return [sum(one in string.ascii_lowercase for one in text) / max(1, len(text)) for text in responses]


def minus_length(prompts: list[Any], responses: list[str], rows: Any) -> list[float]:
    """A reward for short responses: minus the number of characters."""
    return [-float(len(text)) for text in responses]


def not_a_number(prompts: list[Any], responses: list[str], rows: Any) -> list[float]:
    """A reward that is broken."""
    return [float("nan") for _ in responses]
