"""Where a tensor stands in a model: in which layer, or before or after the layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trimtab.errors import UserError
from trimtab.merge.settings import AFTER_LAYERS, BEFORE_LAYERS, Position, layer_position

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers")
"""Names under which configurations say how many layers there are."""

_NUMBERED = re.compile(r"(?P<prefix>(?:.*?\.)?)(?P<index>\d+)\.(?P<rest>.+)")
_LAST = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output|score|classifier|qa_outputs|norm|ln_f|final_layernorm|final_layer_norm)"
    r"(?:\.|$)"
)
_HEADS = (".lm_head.weight", ".embed_out.weight", ".output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Layers:
    """The layers of a model, by the numbers in its keys.

    Args:
        counts: prefix of a stack of layers (``model.layers.``) -> how many there are.

    Examples:
        >>> layers = Layers({"model.layers.": 2})
        >>> layers.split("model.layers.1.mlp.up_proj.weight")
        ('model.layers.', 1, 'mlp.up_proj.weight')
        >>> layers.position("lm_head.weight").where
        'after'
    """

    counts: Mapping[str, int]

    @classmethod
    def of(cls, keys: Iterable[str], config: Mapping[str, Any]) -> Layers:
        """Find the stacks of layers: keys that are numbered from 0 to what the configuration says."""
        found: dict[str, set[int]] = defaultdict(set)
        for key in keys:
            match = _NUMBERED.fullmatch(key)
            if match:
                found[match["prefix"]].add(int(match["index"]))
        known = _counts(config)
        return cls(
            {
                prefix: len(indices)
                for prefix, indices in found.items()
                if len(indices) in known and indices == set(range(len(indices)))
            }
        )

    def split(self, key: str) -> tuple[str, int, str] | None:
        """Prefix, layer and the rest of a key; None for what is in no layer."""
        match = _NUMBERED.fullmatch(key)
        if match is None or match["prefix"] not in self.counts:
            return None
        return match["prefix"], int(match["index"]), match["rest"]

    def position(self, key: str) -> Position:
        """Where a tensor stands among the layers of the whole model."""
        split = self.split(key)
        if split is not None:
            return layer_position(split[1], self.counts[split[0]])
        return AFTER_LAYERS if _LAST.search(key) else BEFORE_LAYERS

    def only(self, label: str) -> tuple[str, int]:
        """Prefix and count of the one stack that a model has.

        Raises:
            UserError: it has none or several, so that ``layer_range`` does not say which is meant.
        """
        if len(self.counts) != 1:
            found = ", ".join(f"{prefix}0 to {count - 1}" for prefix, count in self.counts.items()) or "none"
            raise UserError(
                f"slices need a model with one stack of layers; {label} has {len(self.counts)} ({found}), so "
                "use models instead of slices"
            )
        return next(iter(self.counts.items()))


def tied_key(key: str, keys: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """What stands for a head that is not stored because it is the input embedding; None where it is not.

    Examples:
        >>> tied_key("lm_head.weight", ["model.embed_tokens.weight"], {"tie_word_embeddings": True})
        'model.embed_tokens.weight'
    """
    if not is_head(key) or not is_tied(config):
        return None
    return next((name for name in keys if name.endswith(_EMBEDDINGS)), None)


def is_head(key: str) -> bool:
    """Whether a key is that of the weights that turn the last hidden state into logits."""
    return f".{key}".endswith(_HEADS) and _NUMBERED.fullmatch(key) is None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the input embedding: as a configuration says, else as its class has it."""
    stated = {**_text_config(config), **config}.get("tie_word_embeddings")
    return _tied_by_default(config.get("model_type")) if stated is None else bool(stated)


@cache
def _tied_by_default(model_type: object) -> bool:
    """What the configurations of a family say where they say nothing (Gemma's: that the head is tied)."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return False
    return bool(getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))


def _counts(config: Mapping[str, Any]) -> set[int]:
    values = [where.get(name) for where in (config, _text_config(config)) for name in COUNTS]
    return {value for value in values if isinstance(value, int)}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}
