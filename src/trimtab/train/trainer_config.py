"""The arguments of our own trainers: transformers', with the defaults that TRL's have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


@dataclass
class TrainerConfig(TrainingArguments):
    """transformers' arguments, and how the model is loaded.

    Args:
        logging_steps: steps between logs, 10 as in TRL.
        model_init_kwargs: arguments of ``from_pretrained``.
    """

    logging_steps: float = 10
    model_init_kwargs: dict[str, Any] | None = None
