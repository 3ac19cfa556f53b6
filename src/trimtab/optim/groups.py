"""Parameter groups by regular expressions on canonical names."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.errors import UserError, nearest, unknown
from trimtab.ops import canonical_name

Groups = list[dict[str, Any]]
"""Parameter groups as torch takes them, with ``params`` as (name, parameter) pairs."""

_MERGING = ("lr", "merge_weight", "reserve_rate", "merge_every", "merge_weight_follows_lr", "weight_decay")
_TORCH = ("betas", "eps", "amsgrad", "maximize", "momentum", "dampening", "nesterov")
_KNOWN = ("pattern", "frozen", *_MERGING, *_TORCH)
_NAMED = "model.named_parameters(), or (name, parameter) pairs"


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    rules: Sequence[Mapping[str, Any]] = (),
    *,
    weight_decay: float | None = None,
    decayed: Container[str] | None = None,
    where: str = "rules",
) -> Groups:
    """Sort parameters into groups of equal settings, in the order in which the model names them.

    Each parameter goes by the first rule whose pattern is found in its canonical name: the name without what
    ``torch.compile``, DDP, FSDP, activation checkpointing and PEFT put around it. Those that no rule finds
    keep the optimizer's defaults.

    Args:
        named_parameters: ``model.named_parameters()``. Those that require no gradient are left out.
        rules: mappings with a ``pattern`` (``re.search``) and either the settings that differ (``lr``,
            ``merge_weight``, ``reserve_rate``, ``merge_every``, ``weight_decay``, ``betas``, ``momentum``
            and their like) or ``frozen: True``, which sets ``requires_grad=False`` and leaves the parameters
            out. A ``weight_decay`` written here holds for norms and biases too. What only some other
            optimizer knows can be set in the groups that are returned: they are plain dicts.
        weight_decay: decoupled decay rate λ of the parameters that are ``decayed``; the others get 0. Default
            None leaves it to the optimizer, which then decays all.
        decayed: names of the parameters that decay, as the model or as canonical names; default all with two
            or more dimensions, so neither biases nor norms.
        where: what errors call the rules.

    Returns:
        Groups with ``params`` as (name, parameter) pairs, ``weight_decay`` where given, and the overriding
        settings.

    Raises:
        UserError: a rule finds no parameter that an earlier one has not taken, its pattern is no regular
            expression, it has a key that is not known, or nothing is left to train. Nothing is frozen then.

    Examples:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 1)})
        >>> rules = [{"pattern": "^head", "frozen": True}, {"pattern": "bias$", "merge_weight": 0.0}]
        >>> groups = parameter_groups(model.named_parameters(), rules, weight_decay=0.1)
        >>> [([name for name, _ in g["params"]], g["weight_decay"], g.get("merge_weight")) for g in groups]
        [(['up.weight'], 0.1, None), (['up.bias'], 0.0, 0.0)]
        >>> model["head"].weight.requires_grad
        False
    """
    pairs = _pairs(named_parameters)
    chosen = _chosen(pairs, rules, where)
    freezes = [rule >= 0 and bool(rules[rule].get("frozen")) for rule in chosen]
    sorted_into: dict[tuple[int, bool], list[tuple[str, Tensor]]] = {}
    for (name, p), rule, frozen in zip(pairs, chosen, freezes, strict=True):
        if p.requires_grad and not frozen:
            decays = weight_decay is not None and _decays(name, p, decayed)
            sorted_into.setdefault((rule, decays), []).append((name, p))
    if not sorted_into:
        raise UserError("no parameter of the model is trainable")
    for (_, p), frozen in zip(pairs, freezes, strict=True):
        if frozen:
            p.requires_grad_(False)
    split = weight_decay is not None
    return [
        {
            "params": params,
            **({"weight_decay": weight_decay if decays else 0.0} if split else {}),
            **_settings(rules, rule),
        }
        for (rule, decays), params in sorted_into.items()
    ]


def _chosen(pairs: Sequence[tuple[str, Tensor]], rules: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """The rule of each parameter, −1 for none, once every rule is known to be in order and of use."""
    patterns = [_pattern(rule, f"{where}.{index}") for index, rule in enumerate(rules)]
    names = [canonical_name(name) for name, _ in pairs]
    chosen = [next((i for i, q in enumerate(patterns) if q.search(name)), -1) for name in names]
    # A rule that freezes has done its work where its parameters are frozen already: the call can be repeated.
    found = [(i, p.requires_grad) for i, (_, p) in zip(chosen, pairs, strict=True) if i >= 0]
    used = {i for i, trains in found if trains or rules[i].get("frozen")}
    trained = [p.requires_grad for _, p in pairs]
    _refuse_idle(patterns, used, list(zip(names, trained, strict=True)), where)
    return chosen


def _decays(name: str, p: Tensor, decayed: Container[str] | None) -> bool:
    if decayed is None:
        return p.dim() >= 2
    return name in decayed or canonical_name(name) in decayed


def _settings(rules: Sequence[Mapping[str, Any]], rule: int) -> dict[str, Any]:
    if rule < 0:
        return {}
    return {key: value for key, value in rules[rule].items() if key not in ("pattern", "frozen")}


def _pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    pairs = list(named_parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"parameter_groups goes by names: pass {_NAMED}, not a {type(pair).__name__}")
    return pairs


def _pattern(rule: Mapping[str, Any], place: str) -> re.Pattern[str]:
    """The rule's pattern, once the rule is known to be in order."""
    for key in rule:
        if key not in _KNOWN:
            raise unknown("key", key, _KNOWN, where=place)
    if not isinstance(rule.get("pattern"), str):
        raise UserError(f"{place} needs a pattern: a regular expression for parameter names")
    if rule.get("frozen") and len(rule) > 2:
        others = ", ".join(key for key in rule if key not in ("pattern", "frozen"))
        raise UserError(f"{place} freezes its parameters, so it cannot set their {others}; leave one out")
    try:
        return re.compile(rule["pattern"])
    except re.error as error:
        raise UserError(f"{place}.pattern {rule['pattern']!r} is no regular expression ({error})") from error


def _refuse_idle(
    patterns: Sequence[re.Pattern[str]], used: set[int], names: Sequence[tuple[str, bool]], where: str
) -> None:
    """Refuse a rule that no parameter goes by. With each name comes whether it requires a gradient."""
    for index, pattern in enumerate(patterns):
        if index in used:
            continue
        hits = [grad for name, grad in names if pattern.search(name)]
        if any(hits):
            problem = "finds only parameters that an earlier group has taken; put it first"
        elif hits:
            problem = "finds only parameters that require no gradient"
        else:
            trained = [name for name, grad in names if grad] or [name for name, _ in names]
            close = nearest(pattern.pattern, trained)
            hint = f"the nearest is {close!r}" if close else f"they are called like {trained[0]!r}"
            problem = f"finds none of the {len(trained)} trained parameters; {hint}"
        raise UserError(f"{where}.{index}.pattern {pattern.pattern!r} {problem}")
