"""What a model's class says about its checkpoint's tensors: which are tied, transposed, one row per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.delta.layout import model_class, on_meta_device, read_config
from trimtab.delta.names import canonical_name, vocabulary_names

CONV1D_FAMILIES = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Model types of transformers some of whose weights are ``Conv1D``: stored as (inputs, outputs)."""


class Keys:
    """The keys of a checkpoint, found by the names that parameters have in the model.

    A checkpoint may have been written from a larger model than it is read into, or from a smaller one
    (``LlamaModel`` writes ``layers.0…`` where ``LlamaForCausalLM`` says ``model.layers.0…``): whole path
    components may be missing at the front of one of the two. Nothing else is guessed.

    Examples:
        >>> keys = Keys(["embed.weight", "layers.0.q.weight", "a.score.weight", "b.score.weight"])
        >>> keys.matching("model.layers.0.q.weight"), keys.matching("score.weight")
        (('layers.0.q.weight',), ('a.score.weight', 'b.score.weight'))
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(keys)

    def matching(self, name: str) -> tuple[str, ...]:
        """The keys that ``name`` may stand for: one if it is found, several if it is ambiguous."""
        if name in self._keys:
            return (name,)
        shorter = [ending for ending in _endings(name) if ending in self._keys]
        return tuple(sorted({*shorter, *self._by_ending.get(name, ())}))

    def find(self, name: str) -> str | None:
        """The only key that ``name`` may stand for, or None."""
        found = self.matching(name)
        return found[0] if len(found) == 1 else None

    @cached_property
    def _by_ending(self) -> Mapping[str, list[str]]:
        endings: dict[str, list[str]] = {}
        for key in self._keys:
            for ending in _endings(key):
                endings.setdefault(ending, []).append(key)
        return endings


class Architecture:
    """A model's class, built without memory for its parameters when it is first asked something.

    Args:
        folder: a model folder; only its ``config.json`` is read.
        model_type: what that says in ``model_type``, if the caller has read it.

    Raises:
        UserError: (when asked) transformers has no such model, or refuses its configuration.
    """

    def __init__(self, folder: Path, model_type: object = None) -> None:
        self._folder = folder
        self._type = model_type

    @cached_property
    def module(self) -> Any:
        """The model on the meta device."""
        config = read_config(self._folder)
        return on_meta_device(model_class(config), config)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Names of the parameters with one row per token, tied ones under all their names."""
        return vocabulary_names(self.module)

    @cached_property
    def conv1d(self) -> frozenset[str]:
        """Names of the modules whose weight is stored as (inputs, outputs)."""
        if self._type is not None and self._type not in CONV1D_FAMILIES:
            return frozenset()
        modules = self.module.named_modules()
        return frozenset(name for name, module in modules if type(module).__name__ == "Conv1D")

    def tied_to(self, name: str) -> tuple[str, ...]:
        """The other names of the parameter ``name``."""
        groups: dict[int, list[str]] = {}
        for other, parameter in self.module.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(canonical_name(other))
        found = next((names for names in groups.values() if name in names), [])
        return tuple(other for other in found if other != name)


def resized(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A ``config.json`` for another number of tokens; ``vocab_size`` is replaced wherever it stands.

    Examples:
        >>> resized({"model_type": "x", "text_config": {"vocab_size": 3, "n": 1}}, 5)
        {'model_type': 'x', 'text_config': {'vocab_size': 5, 'n': 1}}
    """
    changed = dict(config)
    if "vocab_size" in changed:
        changed["vocab_size"] = size
    if isinstance(inner := changed.get("text_config"), Mapping):
        changed["text_config"] = resized(inner, size)
    return changed


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of rows that a ``config.json`` says the embedding has; None if it does not say.

    Examples:
        >>> vocabulary_size({"text_config": {"vocab_size": 3}}), vocabulary_size({})
        (3, None)
    """
    inner = config.get("text_config")
    stated = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    return stated if isinstance(stated, int) else None


def _endings(name: str) -> Iterable[str]:
    """What is left of a dotted name without its first components, longest first."""
    while "." in name:
        name = name.partition(".")[2]
        yield name
