"""PEFT adapters as models a delta is taken between, and what an adapter was before its training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.delta.checkpoint import Checkpoint, open_checkpoint, read_json
from trimtab.delta.locate import Located
from trimtab.delta.names import adapter_settings, canonical_name
from trimtab.delta.problems import Problems
from trimtab.errors import UserError

INITIAL_ADAPTER = "initial_adapter.safetensors"
"""An adapter's tensors as they were before its training, beside those after it, under the same keys."""

_ZERO_B = (True, "gaussian", "eva")
"""PEFT's ways to initialise a LoRA adapter (``init_lora_weights``) that let B start at 0."""


class AdapterFolder:
    """A folder with a PEFT adapter (``adapter_config.json`` and ``adapter_model.safetensors``).

    Args:
        located: the folder.
        initial: read the tensors from before the training, :data:`INITIAL_ADAPTER`, instead.

    Raises:
        UserError: its files are unusable.
    """

    kind = "adapter"
    vocabulary: frozenset[str] = frozenset()

    def __init__(self, located: Located, *, initial: bool = False) -> None:
        self.located = located
        self.label = f"{located.label}/{INITIAL_ADAPTER}" if initial else located.label
        self.configuration = read_json(located.folder / "adapter_config.json")
        self.settings: Mapping[str, str] = adapter_settings(self.configuration)
        self.aliases: Mapping[str, str] = {}
        self.problems = Problems()
        self._checkpoint: Checkpoint = (
            Checkpoint(located.folder, [INITIAL_ADAPTER])
            if initial
            else open_checkpoint(located.folder, adapter=True)
        )
        self._keys = {_adapter_name(key): key for key in self._checkpoint.keys()}  # noqa: SIM118

    def names(self) -> tuple[str, ...]:
        """Canonical names: without PEFT's prefix."""
        return tuple(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter."""
        return self._checkpoint.shape(self._keys[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one parameter, as stored."""
        return self._checkpoint.dtype(self._keys[name])

    def tensor(self, name: str) -> Tensor:
        """Values of one parameter."""
        return self._checkpoint.read(self._keys[name])

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of one parameter."""
        return self._checkpoint.read_slice(self._keys[name], slices)


class AssumedStart(AdapterFolder):
    """What a LoRA adapter is assumed to have been before its training, where that was not kept.

    PEFT starts B at 0 (of an embedding's adapter, A). Everything else, A above all, is random or the model's
    own, and is taken to have started as it is now.

    Args:
        located: the adapter's folder.

    Raises:
        UserError: it is no LoRA, or one whose B did not start at 0.
    """

    def __init__(self, located: Located) -> None:
        super().__init__(located)
        kind, how = self.configuration.get("peft_type"), self.configuration.get("init_lora_weights", True)
        if kind != "LORA" or how not in _ZERO_B:
            what = f"is of type {kind}" if kind != "LORA" else f"was initialised by {how!r}"
            raise UserError(
                f"the adapter {self.label!r} {what} and has no {INITIAL_ADAPTER}, so what it started from is "
                "not known; give the adapter from before its training as base"
            )
        self.label += " with B = 0"

    @property
    def assumption(self) -> str:
        """What is assumed, in a sentence."""
        return (
            f"{self.located.label!r} has no {INITIAL_ADAPTER}, so its B are assumed to have started at 0 and "
            "its A as they are now: τ is B, and 0 everywhere else"
        )

    def tensor(self, name: str) -> Tensor:
        """Values of one parameter."""
        now = super().tensor(name)
        return torch.zeros_like(now) if _starts_at_zero(name) else now

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of one parameter."""
        now = super().slice(name, slices)
        return torch.zeros_like(now) if _starts_at_zero(name) else now


def start_of(adapter: AdapterFolder) -> AdapterFolder:
    """An adapter as it was before its training: as it was kept, or as it is assumed to have been."""
    if (adapter.located.folder / INITIAL_ADAPTER).is_file():
        return AdapterFolder(adapter.located, initial=True)
    return AssumedStart(adapter.located)


def _starts_at_zero(name: str) -> bool:
    return ".lora_B." in name or name.endswith(".lora_embedding_A")


def _adapter_name(key: str) -> str:
    """Canonical name of an adapter file's key; DoRA's vectors lose their ``.weight`` there."""
    name = canonical_name(key)
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name
