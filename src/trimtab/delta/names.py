"""Which parameters of a live model count, and under which name."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.ops import canonical_name

__all__ = ["adapter_settings", "canonical_name", "live_parameters", "unwrapped", "vocabulary_names"]

_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def live_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], bool]:
    """Return a model's parameters by canonical name, and whether they are those of an adapter.

    Tied parameters appear once, under the name ``named_parameters()`` gives them. A model that carries PEFT
    adapters is represented by its *active* adapters alone: the weights underneath are frozen, and the
    reference copy of an adapter that DPO trainers add must not be mistaken for the one that is trained.

    Args:
        model: plain, compiled, checkpoint-wrapped, DDP- or PEFT-wrapped.

    Raises:
        UserError: two parameters have the same canonical name.

    Examples:
        >>> live_parameters(nn.Sequential(nn.Linear(1, 1)))[0].keys()
        dict_keys(['0.weight', '0.bias'])
    """
    named = dict(model.named_parameters())
    adapters = _active_adapter_names(model, named)
    chosen = adapters or list(named)
    parameters: dict[str, nn.Parameter] = {}
    origin: dict[str, str] = {}
    for name in chosen:
        canonical = canonical_name(name)
        if canonical in parameters:
            raise UserError(
                f"parameters {origin[canonical]!r} and {name!r} of this {type(model).__name__} both have the "
                f"canonical name {canonical!r}; keep one of them (a single active adapter, one wrapped copy)"
            )
        parameters[canonical], origin[canonical] = named[name], name
    return parameters, bool(adapters)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile`` and DDP.

    Examples:
        >>> inner = nn.Linear(1, 1)
        >>> unwrapped(nn.DataParallel(inner)) is inner
        True
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def vocabulary_names(model: nn.Module) -> frozenset[str]:
    """Canonical names of the parameters that have one row per token: input and output embeddings."""
    owners: list[object] = []
    for accessor in ("get_input_embeddings", "get_output_embeddings"):
        method = getattr(model, accessor, None)
        layer = method() if callable(method) else None
        owners += [getattr(layer, "weight", None), getattr(layer, "bias", None)]
    ids = {id(owner) for owner in owners if isinstance(owner, Tensor)}
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(canonical_name(name) for name, parameter in named if id(parameter) in ids)


def adapter_settings(configuration: dict[str, object]) -> dict[str, str]:
    """The settings of a PEFT configuration that decide what its weights mean.

    Examples:
        >>> adapter_settings({"r": 8, "lora_alpha": 16, "revision": None})
        {'r': '8', 'lora_alpha': '16'}
    """
    return {key: str(configuration[key]) for key in _SETTINGS if key in configuration}


def _active_adapter_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of the parameters that belong to the active adapters; empty for a model without any."""
    containers, active = {"modules_to_save"}, set[str]()
    for module in model.modules():
        kinds = getattr(module, "adapter_layer_names", None)
        adapters = getattr(module, "active_adapters", None)
        if isinstance(kinds, tuple) and isinstance(adapters, list):  # a PEFT layer, without importing PEFT
            containers.update(kinds)
            active.update(adapters)
    return [name for name in names if _belongs(name.split("."), containers, active)]


def _belongs(path: list[str], containers: set[str], active: set[str]) -> bool:
    return any(part in containers and after in active for part, after in pairwise(path))
