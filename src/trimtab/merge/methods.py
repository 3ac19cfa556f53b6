"""Which parameters each method of merging takes: their kinds, where they may be written, their defaults.

What a method does stands in :data:`trimtab.ops.presets.MERGES`; the names that its row's fields have in a
configuration stand here, apart, so that a configuration can be checked without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trimtab.ops.presets import MergeFidelity, MergeMethod

Kind = Literal["number", "flag", "blocks"]
"""``number``: a list of them is a gradient over the layers. ``flag``: a list is chosen from by layer.
``blocks``: a list of numbers is one for each of as many blocks of consecutive layers."""

Scope = Literal["shared", "input", "non_base"]
"""Whether a parameter has one value for all inputs, one for each, or one for each but the base."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Args:
        name: as it is written in a configuration.
        kind: what its values are, and what a list of them means.
        scope: what it has a value for.
        default: its value where none is written; None if one must be.
        low: the least value.
        high: the greatest value.
    """

    name: str
    kind: Kind
    scope: Scope
    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf


_WEIGHT = Parameter("weight", "number", "non_base")
_DENSITY = Parameter("density", "number", "non_base", 1.0, low=0.0, high=1.0)
_LAMBDA = Parameter("lambda", "number", "shared", 1.0)
# The defaults of these two are the method's: parameters_of takes them from its row.
_NORMALIZE = Parameter("normalize", "flag", "shared")
_RESCALE = Parameter("rescale", "flag", "shared")
_INT8_MASK = Parameter("int8_mask", "flag", "shared", False)
_SPARSE = (_WEIGHT, _DENSITY, _NORMALIZE, _RESCALE, _LAMBDA)

_TAKEN: dict[MergeMethod, tuple[Parameter, ...]] = {
    "linear": (replace(_WEIGHT, scope="input"), _NORMALIZE),
    "task_arithmetic": (_WEIGHT, _NORMALIZE, _LAMBDA),
    "ties": _SPARSE,
    "dare_linear": _SPARSE,
    "dare_ties": _SPARSE,
    "slerp": (Parameter("t", "number", "shared", low=0.0, high=1.0),),
    "hma": (Parameter("ratio", "blocks", "shared", low=0.0, high=1.0),),
}

_DROPS_NOTHING = "task_arithmetic drops no entries"
_NO_MASKS_KEPT = "masks are drawn or found where they are used and never kept, so they have no dtype"
_IDLE: dict[MergeMethod, dict[Parameter, str]] = {
    "task_arithmetic": {_DENSITY: _DROPS_NOTHING, _RESCALE: _DROPS_NOTHING, _INT8_MASK: _NO_MASKS_KEPT},
    "ties": {_INT8_MASK: _NO_MASKS_KEPT},
    "dare_linear": {_INT8_MASK: _NO_MASKS_KEPT},
    "dare_ties": {_INT8_MASK: _NO_MASKS_KEPT},
}

METHODS: tuple[MergeMethod, ...] = tuple(_TAKEN)
FIDELITIES: tuple[MergeFidelity, ...] = ("paper", "mergekit")

NEEDS_BASE: dict[MergeMethod, str] = {
    "task_arithmetic": "adds up what the other models differ by from it",
    "ties": "adds up what the other models differ by from it",
    "dare_linear": "adds up what the other models differ by from it",
    "dare_ties": "adds up what the other models differ by from it",
    "slerp": "goes from it to the other model",
    "hma": "averages it, the reference, with the other model",
}
"""The methods that need a base_model, and what they do with it."""

TAKES_TWO: tuple[MergeMethod, ...] = ("slerp", "hma")
"""The methods that take the base_model and exactly one other."""

MERGEKIT_METHODS: tuple[str, ...] = (
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
)
"""mergekit's methods that are not here."""

MERGEKIT_PARAMETERS: dict[str, str] = {
    "alpha": "ramplus_tl",
    "eps": "multislerp",
    "epsilon": "della, della_linear, ram and ramplus_tl",
    "filter_wise": "model_stock",
    "gamma": "breadcrumbs and breadcrumbs_ties",
    "max_iter": "karcher",
    "normalize_weights": "multislerp",
    "nuslerp_flatten": "nuslerp",
    "nuslerp_row_wise": "nuslerp",
    "r": "ramplus_tl",
    "scale": "passthrough",
    "select_topk": "sce",
    "tol": "karcher",
}
"""Parameters that only methods of mergekit's which are not here take, and which those are."""


def parameters_of(method: MergeMethod, fidelity: MergeFidelity) -> Mapping[str, Parameter]:
    """Return the parameters of ``method`` that have an effect, with the defaults of its row.

    Examples:
        >>> parameters_of("ties", "paper")["normalize"].default
        True
        >>> parameters_of("dare_linear", "mergekit")["rescale"].default
        True
    """
    from trimtab.ops.presets import MERGES

    operator = MERGES[method, fidelity].operator
    taken = {parameter.name: parameter for parameter in _TAKEN[method]}
    if operator is not None and "normalize" in taken:
        taken["normalize"] = replace(taken["normalize"], default=operator.normalize)
    if operator is not None and "rescale" in taken:
        taken["rescale"] = replace(taken["rescale"], default=operator.rescale != "none")
    return taken


def taken_by(method: MergeMethod) -> Mapping[str, Parameter]:
    """Return the parameters of ``method`` that have an effect; the defaults of its flags are left out."""
    return {parameter.name: parameter for parameter in _TAKEN[method]}


def required_by(method: MergeMethod) -> tuple[str, ...]:
    """Return the parameters that must be written.

    Examples:
        >>> required_by("ties"), required_by("slerp")
        (('weight',), ('t',))
    """
    return tuple(p.name for p in _TAKEN[method] if p.default is None and p.kind != "flag")


def idle_in(method: MergeMethod) -> Mapping[str, tuple[Parameter, str]]:
    """Return the parameters that ``method`` accepts, as mergekit does, and that change nothing; and why.

    Examples:
        >>> sorted(idle_in("task_arithmetic"))
        ['density', 'int8_mask', 'rescale']
    """
    return {parameter.name: (parameter, why) for parameter, why in _IDLE.get(method, {}).items()}


def methods_with(name: str) -> tuple[MergeMethod, ...]:
    """Return the methods in which the parameter ``name`` means something.

    Examples:
        >>> methods_with("density")
        ('ties', 'dare_linear', 'dare_ties')
    """
    return tuple(method for method in METHODS if name in taken_by(method) or name in _idle_everywhere(method))


def _idle_everywhere(method: MergeMethod) -> tuple[str, ...]:
    return tuple(p.name for p in _IDLE.get(method, {}) if p is _INT8_MASK)
