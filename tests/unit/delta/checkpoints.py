"""Tiny random models of several architectures, and folders made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(seed: int, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **settings}))


def tied_llama(seed: int, **settings: Any) -> Any:
    return llama(seed, tie_word_embeddings=True, **settings)


def gpt2(seed: int, **settings: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**{**shape, **settings}))


def qwen3_moe(seed: int, **settings: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    shape = {**SIZES, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, **experts, **settings}))


def mixtral(seed: int, **settings: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    shape = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**{**shape, **settings}))


def hrm_text(seed: int, **settings: Any) -> Any:
    """Its checkpoints hold fused attention and MLP weights, the model split ones."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return HrmTextForCausalLM(HrmTextConfig(**{**shape, "num_attention_heads": 2, "head_dim": 8, **settings}))


def reward(seed: int, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    shape = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_labels": 1, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(**{**shape, **settings}))


def written(model: Any, folder: Path, shard: str = "6KB", **options: Any) -> Path:
    """Save a model in shards small enough that there are several."""
    model.save_pretrained(folder, max_shard_size=shard, **options)
    return folder


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a folder with a single safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reconfigured(folder: Path, **settings: Any) -> Path:
    """Change keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def expected(reference: Any, base: Any) -> dict[str, Tensor]:
    """The oracle: named parameters of two loaded models, subtracted in fp32 or wider."""
    theirs = dict(base.named_parameters())
    differences = {}
    for name, ours in reference.named_parameters():
        wide = torch.promote_types(torch.promote_types(ours.dtype, theirs[name].dtype), torch.float32)
        differences[name] = (ours.detach().to(wide) - theirs[name].detach().to(wide)).contiguous()
    return differences


def loaded(folder: Path) -> Any:
    """A folder as a user loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
