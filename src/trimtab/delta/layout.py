"""How the tensors of a checkpoint become the parameters of a model, found out without reading a single value.

A model folder does not hold the model's parameters under the model's names: prefixes differ, tied weights are
there once or twice, experts lie one by one and are fused on loading. transformers knows all of it, so its
own conversion tables are applied here: to the keys, and to shapes on the meta device. What comes out is a
recipe per parameter, to be followed one parameter at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.delta.checkpoint import Checkpoint, read_json
from trimtab.delta.names import canonical_name, vocabulary_names
from trimtab.delta.problems import Problems, first_line, shape_text
from trimtab.errors import UserError

_TRAINED = re.compile(r"For[A-Z]|LMHead")  # a model with a head, as opposed to LlamaModel


@dataclass(frozen=True)
class Origin:
    """Where the values of one parameter come from.

    Args:
        keys: the checkpoint's tensors it is made of, in the order of conversion.
        patterns: for each key, the pattern of the converter it matched.
        converter: transformers' ``WeightConverter`` that makes it; None if one tensor is taken as it is.
        group: the name by which the converter knows its result (its first target).
        name: the parameter's name in the model.
        shape: its shape, as the checkpoint gives it.
        dtype: its dtype, as the checkpoint gives it.
    """

    keys: tuple[str, ...]
    patterns: tuple[str, ...]
    converter: Any
    group: str
    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def read(self, checkpoint: Checkpoint, model: Any) -> Tensor:
        """Read and convert the values of this parameter, and of nothing else."""
        if self.converter is None:
            return checkpoint.read(self.keys[0])
        return _convert(self, model, lambda key: partial(checkpoint.read, key))[self.name]


@dataclass
class Layout:
    """The parameters of a model folder, and what does not fit.

    Args:
        model: the model on the meta device (architecture only).
        origins: parameter name -> where it comes from, in the model's order, tied ones once.
        shapes: parameter name -> shape in the model.
        aliases: other names of tied parameters -> the one in ``origins``.
        vocabulary: names of the parameters with one row per token.
        problems: what the folder lacks or has too much.
    """

    model: Any
    origins: dict[str, Origin] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    vocabulary: frozenset[str] = frozenset()
    problems: Problems = field(default_factory=Problems)


def read_config(folder: Path) -> Any:
    """Read a model's configuration; code from its folder is never run.

    Raises:
        UserError: there is none, it cannot be read, or it asks for code of its own.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json, so it is no model folder; give one that save_pretrained wrote"
        )
    stated = read_json(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager")
    except Exception as error:  # validation of a config raises errors of many kinds
        code = "; it names code of its own (auto_map), which is never run" if "auto_map" in stated else ""
        raise UserError(f"cannot use {path}: {first_line(error)}{code}") from error
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise UserError(f"{folder} holds quantized weights ({method}); a delta needs them dequantized")
    return config


def model_class(config: Any) -> Any:
    """The class a model of this configuration is trained as.

    The first of the architectures that its configuration names, if that can be trained as a language or a
    reward model; else what ``AutoModelForCausalLM`` makes of it.

    Raises:
        UserError: transformers has no such class.
    """
    import transformers

    names = config.architectures or []
    classes = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    trained = [cls for cls in classes if _TRAINED.search(cls.__name__)]
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if not trained and type(config) in causal:
        found = causal[type(config)]
        trained = list(found) if isinstance(found, tuple | list) else [found]
    if trained or classes:
        return (trained or classes)[0]
    raise UserError(
        f"transformers has no model class for architectures {names} ({config.model_type}); "
        f"load both models yourself and give them instead of folders"
    )


def on_meta_device(cls: Any, config: Any) -> Any:
    """Build a model without memory for its parameters.

    Raises:
        UserError: its class refuses the configuration, or needs a package that is not installed.
    """
    try:
        with torch.device("meta"):
            return cls(deepcopy(config))
    except Exception as error:  # a model's constructor may raise anything
        raise UserError(
            f"cannot build a {cls.__name__} from the config.json of {config.name_or_path}: "
            f"{first_line(error)}"
        ) from error


def lay_out(model: Any, checkpoint: Checkpoint) -> Layout:
    """Match the tensors of a checkpoint with the parameters of a model.

    Args:
        model: a transformers model on the meta device.
        checkpoint: headers are used; values only where two stored tensors may or may not be tied.
    """
    groups, extra = _group_keys(model, checkpoint)
    layout = Layout(model, vocabulary=vocabulary_names(model))
    found = _found(layout, groups, extra, checkpoint)
    layout.problems.extra += _unexpected(model, extra)
    _settle_names(layout, found, checkpoint)
    return layout


def _found(
    layout: Layout, groups: dict[str, Origin], extra: dict[str, str], checkpoint: Checkpoint
) -> dict[str, Origin | None]:
    """Name in the model -> origin (None: it cannot be converted), for all that the checkpoint has for it."""
    found: dict[str, Origin | None] = {}
    expected = layout.model.state_dict().keys()
    for group, origin in groups.items():
        if origin.converter is None:
            found[group] = origin
            continue
        try:
            made = _convert(origin, layout.model, partial(_like, checkpoint))
        except UserError:
            raise
        except Exception as error:  # whatever a conversion stumbles over, its inputs do not fit
            text = (
                f"{group} (cannot be made of its {len(origin.keys)} checkpoint tensors: {first_line(error)})"
            )
            layout.problems.mismatched.append(text)
            found[group] = None
            continue
        for name, like in made.items():
            found[name] = replace(origin, name=name, shape=tuple(like.shape), dtype=like.dtype)
            if name not in expected:
                extra[name] = origin.keys[0]
    return found


def _group_keys(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Origin], dict[str, str]]:
    """Sort the checkpoint's keys by what they become; also what becomes nothing (renamed -> key)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    rules = get_model_conversion_mapping(model)
    converters = {
        p: rule for rule in rules if isinstance(rule, WeightConverter) for p in rule.source_patterns
    }
    rename = _renaming(model, rules)
    members: dict[str, list[tuple[str, str]]] = {}
    extra: dict[str, str] = {}
    for key in sorted(checkpoint.keys(), key=dot_natural_key):
        target, pattern = rename(key)
        if target is None or (pattern is None and target in members):
            extra[target or key] = key
        else:
            members.setdefault(target, []).append((key, pattern or ""))
    groups = {}
    for target, pairs in members.items():
        keys, patterns = zip(*pairs, strict=True)
        groups[target] = Origin(keys, patterns, converters.get(patterns[0]), target, target)
    return groups, extra


def _renaming(model: Any, rules: list[Any]) -> Callable[[str], tuple[str | None, str | None]]:
    """Key -> (name in the model or None, converter's pattern or None), as transformers' loader decides it."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix

    def rename(key: str) -> tuple[str | None, str | None]:
        target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if target not in expected and key in expected:  # already in the model's own form
            target, pattern = rename_source_key(key, [], [], prefix, expected)
        return (target, pattern) if target in expected else (None, pattern)

    return rename


def _convert(origin: Origin, model: Any, values: Callable[[str], Any]) -> dict[str, Tensor]:
    """Run a converter on ``values(key)`` (tensors, or functions that return them) of its keys."""
    converter = deepcopy(origin.converter)
    for key, pattern in zip(origin.keys, origin.patterns, strict=True):
        converter.add_tensor(origin.group, key, pattern, values(key))
    made = converter.convert(origin.group, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _like(checkpoint: Checkpoint, key: str) -> Tensor:
    return torch.empty(checkpoint.shape(key), dtype=checkpoint.dtype(key), device="meta")


def _unexpected(model: Any, extra: Mapping[str, str]) -> list[str]:
    """The left-over keys, without those that the model's class declares harmless."""
    from transformers.utils.loading_report import LoadStateDictInfo

    report = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(extra),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(report)
    return [key for name, key in extra.items() if name in report.unexpected_keys]


def _settle_names(layout: Layout, found: dict[str, Origin | None], checkpoint: Checkpoint) -> None:
    """Fill ``origins``, ``shapes`` and ``aliases``: one entry per parameter, tied names as aliases."""
    groups: dict[int, list[str]] = {}
    parameters = dict(layout.model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        for stored, served in _tied(names, found, checkpoint, layout.model):
            canonical, *others = (canonical_name(name) for name in served)
            if stored not in found:
                layout.problems.missing.append(canonical)
            elif (origin := found[stored]) is not None:
                layout.origins[canonical] = _with_header(origin, checkpoint)
                layout.shapes[canonical] = tuple(parameters[served[0]].shape)
                layout.aliases.update(dict.fromkeys(others, canonical))
                _check_shape(layout, canonical)
    order = {canonical_name(name): position for position, name in enumerate(parameters)}
    layout.origins = dict(sorted(layout.origins.items(), key=lambda item: order[item[0]]))


def _tied(
    names: list[str], found: dict[str, Origin | None], checkpoint: Checkpoint, model: Any
) -> list[tuple[str, list[str]]]:
    """Split names that the configuration ties into (stored name, names it serves).

    As in transformers: several stored copies are one parameter if they are equal; else they are not tied,
    whatever the configuration says.
    """
    stored = [name for name in names if name in found]
    readable = [origin for name in stored if (origin := found[name]) is not None]
    if len(readable) < 2:
        return [((stored or names)[0], names)]
    first = readable[0].read(checkpoint, model)
    if all(torch.equal(first, other.read(checkpoint, model)) for other in readable[1:]):
        return [(stored[0], names)]
    rest = [name for name in names if name not in stored]
    return [(stored[0], [stored[0], *rest]), *((name, [name]) for name in stored[1:])]


def _with_header(origin: Origin, checkpoint: Checkpoint) -> Origin:
    """Add shape and dtype of a tensor that is taken as it is (a converter's result has them)."""
    if origin.converter is not None:
        return origin
    key = origin.keys[0]
    return replace(origin, shape=checkpoint.shape(key), dtype=checkpoint.dtype(key))


def _check_shape(layout: Layout, name: str) -> None:
    shape, expected = layout.origins[name].shape, layout.shapes[name]
    if shape != expected:
        text = f"{name} ({shape_text(shape)}, config.json says {shape_text(expected)})"
        layout.problems.mismatched.append(text)
