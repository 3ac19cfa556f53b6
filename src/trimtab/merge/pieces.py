"""The pieces of a merge's configuration, read one by one; what is wrong with them is collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trimtab.errors import UserError, nearest
from trimtab.merge.model_ref import ModelRef
from trimtab.yaml_file import Key, Problem, WrongValue, dotted, spelled, text_in

T = TypeVar("T")

_NOT_HERE = "is a key of mergekit's that is not supported here; "
MERGEKIT_KEYS: dict[str, dict[str, str]] = {
    "top": {"modules": "give models or slices, which are merged as one causal language model"},
    "slice": {"residual_weight": "leave it out: mergekit reads it and does nothing with it"},
    "tokenizer": {
        "tokens": "leave it out: each token's row is taken by the rules of tokenizer.source",
        "pad_to_multiple_of": "leave it out: the rows are as many as the vocabulary needs",
    },
    "model": {"override_architecture": "leave it out: the architecture is the one in config.json"},
}
"""What mergekit reads and we do not, by where it stands, and what to do instead."""


@dataclass
class Pieces:
    """Reads pieces, and knows what was wrong with them.

    Args:
        problems: what is wrong so far.
    """

    problems: list[Problem] = field(default_factory=list)

    def model(self, value: Any, key: Key) -> ModelRef | None:
        """Read a model: its name as text, or a mapping with model and lora."""
        if value is None:
            return None
        if not isinstance(value, dict):
            return self._parsed(value, key)
        values = self.mapping(value, key, ("model", "lora"), "model")
        if values.get("model") is None:
            if not {"path", "revision"} & value.keys():  # which was refused
                self.wrong((*key, "model"), "is missing; name a folder or a hub id")
            return None
        model = self._path(values["model"], (*key, "model"))
        lora = self._path(values.get("lora"), (*key, "lora"))
        if model is None or (lora is None and values.get("lora") is not None):
            return None
        if lora is None:
            return model
        return ModelRef(model.path, model.revision, lora.path, lora.revision)

    def _path(self, value: Any, key: Key) -> ModelRef | None:
        """Read one half of a model's mapping: ``path@revision``, or a mapping with path and revision."""
        if value is None:
            return None
        if not isinstance(value, dict):
            read = self._parsed(value, key)
            if read is not None and read.lora is not None:
                self.wrong(
                    key,
                    f"{spelled(value)} holds a +; an adapter goes under lora, alone",
                )
                return None
            return read
        values = self.mapping(value, key, ("path", "revision"), "path")
        if values.get("path") is None:
            self.wrong((*key, "path"), "is missing; name a folder or a hub id")
            return None
        path = self.scalar(values, "path", text_in, key)
        revision = self.scalar(values, "revision", text_in, key)
        return None if path is None else ModelRef(path, revision)

    def _parsed(self, value: Any, key: Key) -> ModelRef | None:
        try:
            return ModelRef.parse(value)
        except UserError as error:
            self.wrong(key, str(error))
            return None

    def scalar(
        self, values: Mapping[str, Any], name: str, read: Callable[[Any], T], key: Key = ()
    ) -> T | None:
        """Return what ``read`` makes of the value ``name`` of the mapping at ``key``; None without one."""
        if values.get(name) is None:
            return None
        try:
            return read(values[name])
        except WrongValue as error:
            self.wrong((*key, name), str(error))
            return None

    def word(self, values: Mapping[str, Any], name: str, words: Iterable[T]) -> T | None:
        """Return the word that was written at the top; None where none was."""
        value = values.get(name)
        if value is None:
            return None
        for word in words:
            if isinstance(value, str) and value == word:
                return word
        known = [str(word) for word in words]
        close = nearest(value, known) if isinstance(value, str) else None
        if close:
            self.wrong((name,), f"{spelled(value)} is not known; did you mean {close}?")
            return None
        self.wrong((name,), f"must be {', '.join(known[:-1])} or {known[-1]}, not {spelled(value)}")
        return None

    def items(self, value: Any, key: Key) -> list[Any]:
        """Return a list with something in it; none at all where nothing was written."""
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            self.wrong(key, f"must be a list, not {spelled(value)}")
            return []
        if not value:
            self.wrong(key, "must not be empty")
        return list(value)

    def mapping(self, value: Any, key: Key, known: tuple[str, ...], kind: str) -> dict[str, Any]:
        """Return the keys of a mapping that are known; the others are refused, as is what is no mapping.

        Args:
            value: what was written.
            key: where.
            known: the keys it may have.
            kind: what it is: ``top``, ``slice``, ``source``, ``tokenizer``, ``model`` or ``path``.
        """
        if not isinstance(value, dict):
            hint = _instead(value, kind)
            self.wrong(key, f"must be a mapping, not {spelled(value)}{hint}")
            return {}
        found = {str(name): item for name, item in value.items()}
        for name, item in found.items():
            if name not in known and not (item is None and name in MERGEKIT_KEYS.get(kind, {})):
                self.wrong((*key, name), _unknown_key(name, key, known, kind))
        return {name: item for name, item in found.items() if name in known}

    def wrong(self, key: Key, message: str) -> None:
        """Note what is wrong at ``key``; the message continues a sentence that opens with the key."""
        self.problems.append(Problem(key, message))


def _unknown_key(name: str, key: Key, known: tuple[str, ...], kind: str) -> str:
    if name in MERGEKIT_KEYS.get(kind, {}):
        return _NOT_HERE + MERGEKIT_KEYS[kind][name]
    if name == "layer_range" and kind == "source":
        return "belongs under slices.N.sources; models are merged with all their layers"
    if name in ("path", "revision") and kind == "model":
        return "belongs one level deeper: write {model: {path: …, revision: …}}"
    close = nearest(name, known)
    hint = f"did you mean {dotted((*key, close))}?" if close else f"known here: {', '.join(known)}"
    return f"is not a key of a merge configuration; {hint}"


def _instead(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        return ""
    if kind == "source":
        return f"; write model: {value}"
    return f"; write tokenizer_source: {value}" if kind == "tokenizer" else ""
