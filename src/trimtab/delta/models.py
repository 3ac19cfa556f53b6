"""The models a delta is taken between: model folders and live modules; adapters have a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from trimtab.delta.checkpoint import open_checkpoint
from trimtab.delta.layout import Layout, lay_out, model_class, on_meta_device, read_config
from trimtab.delta.locate import Located
from trimtab.delta.names import (
    adapter_settings,
    canonical_name,
    live_parameters,
    unwrapped,
    vocabulary_names,
)
from trimtab.delta.problems import Problems, shape_text
from trimtab.errors import UserError

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Model(Protocol):
    """Named parameters that are read one at a time.

    Attributes:
        label: how to speak of it.
        kind: a model's name of its architecture family (``llama``), or ``adapter``.
        vocabulary: names of the parameters with one row per token.
        aliases: other names of tied parameters -> the one in ``names()``.
        problems: what is wrong with the model itself.
        settings: settings that two models must share for their difference to mean anything.
    """

    label: str
    kind: str
    vocabulary: frozenset[str]
    aliases: Mapping[str, str]
    problems: Problems
    settings: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """Canonical names, tied parameters once."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one parameter."""

    def tensor(self, name: str) -> Tensor:
        """Values of one parameter, on the CPU; not to be written to."""

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A rectangular part of one parameter, on the CPU; not to be written to."""


class FolderModel:
    """A folder as ``save_pretrained`` writes it, read through the names of the model it becomes.

    Args:
        located: the folder.
        like: a model as whose class it is read, if that is a folder of the same kind; default the class that
            its own configuration names.

    Raises:
        UserError: no such model, or its files are unusable.
    """

    def __init__(self, located: Located, like: Model | None = None) -> None:
        config = read_config(located.folder)
        self.label = located.label
        self.kind = str(config.model_type)
        self.cls: type = model_class(config)
        if isinstance(like, FolderModel) and like.kind == self.kind:
            self.cls = like.cls
        self.settings: Mapping[str, str] = {}
        self._checkpoint = open_checkpoint(located.folder)
        self._layout: Layout = lay_out(on_meta_device(self.cls, config), self._checkpoint)
        self.vocabulary = self._layout.vocabulary
        self.aliases: Mapping[str, str] = self._layout.aliases
        self.problems = self._layout.problems

    def names(self) -> tuple[str, ...]:
        """Canonical names, in the model's order."""
        return tuple(self._layout.origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter."""
        return self._layout.origins[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one parameter, as stored."""
        return self._layout.origins[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Read, and where needed convert, the values of one parameter."""
        return self._layout.origins[name].read(self._checkpoint, self._layout.model)

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Read a part of one parameter; one that has to be converted is read whole."""
        origin = self._layout.origins[name]
        if origin.converter is None:
            return self._checkpoint.read_slice(origin.keys[0], slices)
        return self.tensor(name)[slices]


class LiveModel:
    """A module in memory. It may change under our hands, so what is taken from it is taken at once.

    Args:
        model: plain or wrapped (compiled, checkpoint-wrapped, DDP, PEFT).

    Raises:
        UserError: a parameter is quantized, sharded, offloaded, or two share a canonical name.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        config = getattr(inner, "config", None)
        self.label = f"{type(inner).__name__} in memory"
        self._parameters, adapter = live_parameters(model)
        self.kind = "adapter" if adapter else str(getattr(config, "model_type", type(inner).__name__))
        self.vocabulary = frozenset() if adapter else vocabulary_names(inner)
        self.aliases: Mapping[str, str] = {} if adapter else _aliases(model, self._parameters)
        self.problems = Problems()
        self.settings: Mapping[str, str] = _live_settings(inner) if adapter else {}
        for name, parameter in self._parameters.items():
            _check_readable(name, parameter, self.label)

    def names(self) -> tuple[str, ...]:
        """Canonical names, in the module's order."""
        return tuple(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter."""
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one parameter."""
        return self._parameters[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Values of one parameter."""
        return self._parameters[name].detach().cpu()

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of one parameter."""
        return self._parameters[name].detach()[slices].cpu()


def check_model(model: Model, role: str) -> None:
    """Refuse a model that does not fit its own configuration.

    Args:
        model: the model.
        role: ``reference`` or ``base``, for the sentence.

    Raises:
        UserError: with all problems counted and the first few named.
    """
    model.problems.refuse(f"the weights of the {role} {model.label!r} do not fit its config.json")
    if not model.names():
        raise UserError(f"the {role} {model.label!r} has no parameters")


def _aliases(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    owners = {id(parameter): name for name, parameter in parameters.items()}
    named = model.named_parameters(remove_duplicate=False)
    pairs = ((canonical_name(name), owners[id(parameter)]) for name, parameter in named)
    return {name: owner for name, owner in pairs if name != owner}


def _live_settings(model: nn.Module) -> dict[str, str]:
    configurations = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapter", None)
    if not isinstance(configurations, dict) or not isinstance(active, str):
        return {}
    return adapter_settings(dict(configurations[active].to_dict()))


def _check_readable(name: str, parameter: nn.Parameter, label: str) -> None:
    if parameter.device.type == "meta":
        raise UserError(
            f"parameter {name!r} of the {label} has no values (it is on the meta device or offloaded)"
        )
    if parameter.dtype not in _FLOATING:
        raise UserError(
            f"parameter {name!r} of the {label} is {parameter.dtype} ({shape_text(tuple(parameter.shape))}); "
            f"a delta needs floating-point weights, so dequantize the model first"
        )
    if hasattr(parameter, "full_tensor"):
        raise UserError(
            f"parameter {name!r} of the {label} is sharded; take the delta between folders instead"
        )
