"""The configuration of a merge: mergekit's YAML, typed, frozen, checked in full before a model is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

from trimtab.errors import UserError
from trimtab.merge.model_ref import ModelRef
from trimtab.merge.settings import Condition, Scalar, Setting
from trimtab.yaml_file import Places, Problem, read_yaml_file, refusal, spelled

if TYPE_CHECKING:
    from trimtab.ops.presets import MergeFidelity, MergeMethod

__all__ = [
    "Condition",
    "MergeConfig",
    "ModelRef",
    "Scalar",
    "Setting",
    "Slice",
    "Source",
    "load_config",
    "read_config",
]


@dataclass(frozen=True)
class Source:
    """One input of a slice.

    Args:
        model: which model.
        layers: the first of its layers, and the one after the last; None for all.
        parameters: what was written for it alone.
    """

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result.

    Args:
        sources: what they are made from; no model twice.
        base: the base_model that holds here: the slice's own, else the configuration's.
        parameters: what was written for the slice.
    """

    sources: tuple[Source, ...]
    base: ModelRef | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class MergeConfig:
    """A merge, as it was asked for.

    Args:
        method: the row of :data:`trimtab.ops.presets.MERGES`, with ``fidelity``.
        slices: the parts of the result, in order; one where models are merged whole.
        sliced: whether ``slices`` was written, and not ``models``.
        base_model: the model that deltas are taken to, where the slices do not say otherwise.
        parameters: what was written for the whole merge.
        dtype: what the inputs are read in: float32, float16, bfloat16 or float64; None as they are.
        out_dtype: what the result is written in; None as ``dtype``.
        tokenizer_source: whose tokenizer and vocabulary the result has; None leaves both alone.
        chat_template: Jinja text for the result's tokenizer.
        seed: from which masks are drawn.
        fidelity: whether the papers' formulas are followed, or mergekit's code.
        allow_partial: whether tensors may be missing from some inputs.
        text: the YAML as it was written.
        notes: what was accepted and has no effect, in sentences.
    """

    method: MergeMethod
    slices: tuple[Slice, ...]
    sliced: bool
    base_model: ModelRef | None
    parameters: Mapping[str, Setting]
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: Literal["base", "union"] | ModelRef | None
    chat_template: str | None
    seed: int
    fidelity: MergeFidelity
    allow_partial: bool
    text: str
    notes: tuple[str, ...]


def load_config(path: str | os.PathLike[str]) -> MergeConfig:
    """Read a configuration's file and check it in full.

    Args:
        path: a YAML file as mergekit reads it, with ``fidelity``, ``random_seed`` and ``allow_partial`` as
            further keys.

    Raises:
        UserError: naming everything that is wrong, each with its line and its place.
    """
    file = read_yaml_file(path, "merge configuration", "merge_method and models")
    return _checked(file.values, file.text, str(path), Places(file.places), file.twice)


def read_config(values: dict[str, Any], text: str = "") -> MergeConfig:
    """Check a configuration given as plain values, as :func:`load_config` checks one from a file.

    Args:
        values: what the YAML would hold; left as it is.
        text: the YAML that they were read from; written anew where it is not given.

    Examples:
        >>> models = [{"model": "org/chat", "parameters": {"weight": 0.5}}, {"model": "org/base"}]
        >>> config = read_config({"merge_method": "ties", "base_model": "org/base", "models": models})
        >>> [str(source.model) for source in config.slices[0].sources], config.fidelity
        (['org/chat', 'org/base'], 'paper')
    """
    return _checked(values, text, "merge configuration", Places(), [])


def _checked(
    values: dict[str, Any], text: str, source: str, places: Places, known: list[Problem]
) -> MergeConfig:
    from trimtab.merge.reading import Reading

    if not isinstance(values, dict):
        raise UserError(f"a {source} is a mapping of keys to values, not {spelled(values)}")
    reading = Reading(list(known))
    config = reading.config(values, text)
    if reading.problems:
        raise refusal(source, reading.problems, places)
    return config


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return values that were given from Python as YAML."""
    return yaml.safe_dump(_plain(values), sort_keys=False)


def _plain(value: Any) -> Any:
    """The value in types that YAML has: a NumPy number, say, is a number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
