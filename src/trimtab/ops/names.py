"""Canonical parameter names: the name a parameter has when nothing is wrapped around its model."""

from __future__ import annotations

import re
from functools import lru_cache

# Each wrapper inserts a path component: torch.compile, activation checkpointing, FSDP1, DDP / DataParallel.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PEFT_LAYER = re.compile(r"\.base_layer\.")
_PEFT_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+)\.[^.]+\.(?=[^.]+$)")
_PEFT_VECTOR = re.compile(r"\.(lora_embedding_[AB])\.[^.]+$")
_PEFT_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")


@lru_cache(maxsize=1 << 16)  # asked for each parameter in each step
def canonical_name(name: str) -> str:
    """Return ``name`` without the prefixes of wrappers and without the adapter's name.

    Strips what ``torch.compile`` (``_orig_mod.``), activation checkpointing
    (``_checkpoint_wrapped_module.``), FSDP (``_fsdp_wrapped_module.``), DDP (a leading ``module.``) and PEFT
    (``base_model.model.``, ``.base_layer.``, the adapter name in ``lora_A.default.weight``) insert.
    Idempotent.

    Args:
        name: a key of ``named_parameters()``.

    Examples:
        >>> canonical_name("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj.weight'
        >>> canonical_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
        'model.layers.0.q_proj.lora_A.weight'
        >>> canonical_name("base_model.model.model.layers.0.q_proj.base_layer.weight")
        'model.layers.0.q_proj.weight'
    """
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    name = name.removeprefix("base_model.model.")
    name = _PEFT_LAYER.sub(".", name)
    name = _PEFT_SAVED.sub(".", name)
    name = _PEFT_ADAPTER.sub(r".\1.", name)
    return _PEFT_VECTOR.sub(r".\1", name)
