"""Where a tensor stands in a model: in which layer, or before or after the layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.merge.settings import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    Condition,
    Position,
    Setting,
    layer_position,
)
from trimtab.yaml_file import Key, dotted

if TYPE_CHECKING:
    from trimtab.merge.config import MergeConfig
    from trimtab.merge.inputs import Input

COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
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
        surplus: prefix -> how many more are stored behind them, which predict further tokens (MTP).

    Examples:
        >>> layers = Layers({"model.layers.": 2})
        >>> layers.split("model.layers.1.mlp.up_proj.weight")
        ('model.layers.', 1, 'mlp.up_proj.weight')
        >>> layers.position("lm_head.weight").where
        'after'
    """

    counts: Mapping[str, int]
    surplus: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[str], config: Mapping[str, Any]) -> Layers:
        """Find the stacks of layers: keys that are numbered from 0 to what the configuration says.

        More may be stored than it says, where it says how many (``num_nextn_predict_layers``), or where the
        stack is the only one.
        """
        found: dict[str, set[int]] = defaultdict(set)
        for key in keys:
            match = _NUMBERED.fullmatch(key)
            if match:
                found[match["prefix"]].add(int(match["index"]))
        stacks = {prefix: len(own) for prefix, own in found.items() if own == set(range(len(own)))}
        known, further = _counts(config), _further(config)
        counts = {prefix: count for prefix, count in stacks.items() if count in known}
        if not counts and further:
            counts = {prefix: count - further for prefix, count in stacks.items() if count - further in known}
        if not counts and len(found) == len(stacks) == len(known) == 1:
            (prefix, stored), (stated,) = *stacks.items(), known
            counts = {prefix: stated} if stored > stated > 0 else {}
        return cls(
            counts,
            {prefix: stacks[prefix] - count for prefix, count in counts.items() if stacks[prefix] > count},
        )

    def split(self, key: str) -> tuple[str, int, str] | None:
        """Prefix, layer and the rest of a key; None for what is in no layer, or behind the last one."""
        match = _NUMBERED.fullmatch(key)
        if match is None or int(match["index"]) >= self.counts.get(match["prefix"], 0):
            return None
        return match["prefix"], int(match["index"]), match["rest"]

    def position(self, key: str) -> Position:
        """Where a tensor stands among the layers of the whole model."""
        split = self.split(key)
        if split is not None:
            return layer_position(split[1], self.counts[split[0]])
        match = _NUMBERED.fullmatch(key)
        behind = match is not None and match["prefix"] in self.surplus
        return AFTER_LAYERS if behind or _LAST.search(key) else BEFORE_LAYERS

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
        for prefix, further in self.surplus.items():
            raise UserError(
                f"slices need a model whose layers are all of one kind; {label} stores {further} more than "
                f"the {self.counts[prefix]} that its config.json states ({prefix}{self.counts[prefix]}), so "
                "use models instead of slices"
            )
        return next(iter(self.counts.items()))


def check_lists(config: MergeConfig, layers: Layers, model: Input) -> None:
    """Refuse values listed over the layers of a model in which no layers are found.

    Args:
        config: of a merge of whole models.
        layers: those found in the model whose tensors the output has.
        model: that model.

    Raises:
        UserError: names the first such list.
    """
    if layers.counts:
        return
    places: list[tuple[Key, Mapping[str, Setting]]] = [(("parameters",), config.parameters)]
    for source, one in enumerate(config.slices[0].sources):
        places.append((("models", source, "parameters"), one.parameters))
    for key, parameters in places:
        for name, setting in parameters.items():
            if (values := _listed(setting)) > 1:
                stated = ", ".join(map(str, sorted(_counts(model.config)))) or "none"
                raise UserError(
                    f"{dotted((*key, name))} lists {values} values over the layers, but none are found in "
                    f"{model.label}: its config.json states {stated}, and no tensors are numbered from 0 up "
                    "to that; give one value, or correct the model's config.json"
                )


def _listed(setting: Setting) -> int:
    """How many values a setting lists over the layers, at most."""
    if not isinstance(setting, tuple):
        return 1
    if any(isinstance(item, Condition) for item in setting):
        return max(_listed(item.value) for item in setting if isinstance(item, Condition))
    return len(setting)


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


def _further(config: Mapping[str, Any]) -> int:
    """How many layers for further tokens (MTP) a configuration says are stored behind the others."""
    stated = {**_text_config(config), **config}.get("num_nextn_predict_layers")
    return stated if isinstance(stated, int) else 0


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}
