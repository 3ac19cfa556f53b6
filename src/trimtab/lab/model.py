"""The tiny model: a Llama of 0.33 million parameters, built, saved and loaded through transformers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.lab.vocabulary import BOS_ID, END_ID, PAD_ID, WORDS

CONTEXT = 64


def config() -> LlamaConfig:
    """Return the architecture: 3 layers of width 96, 4 heads, tied embeddings, fp32."""
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=96,
        intermediate_size=240,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",
        dtype="float32",
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """Return a model with random weights fixed by ``seed``; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config())
