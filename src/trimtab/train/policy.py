"""The policy of our own trainers, with the recipe's adapter on it; TRL's put theirs on themselves."""

from __future__ import annotations

from typing import Any

from trimtab.model_folder import load_model
from trimtab.train.models import lora_config
from trimtab.train.parts import Parts


def load_policy(parts: Parts) -> Any:
    """Load what is trained: the recipe's model, under a fresh adapter where the recipe has one."""
    model = load_model(parts.policy, parts.model_settings, trainable=True)
    adapter = parts.recipe.adapter
    if adapter is None:
        return model
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(parts.arguments.seed)  # the adapter's weights are drawn here
    return get_peft_model(model, lora_config(adapter, parts.recipe.method))
