"""Models on this machine: finding one without loading it, and loading it with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.delta.checkpoint import open_checkpoint, read_json
from trimtab.delta.locate import Located, locate
from trimtab.delta.problems import first_line
from trimtab.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine whose files have been looked at, but not loaded.

    Args:
        name: how the recipe, or the adapter on it, calls it.
        folder: where it lies.
        label: the name, with the revision where it came from the hub.
        is_adapter: whether it is a PEFT adapter and not a whole model.
        base: the model that an adapter stands on.
    """

    name: str
    folder: Path
    label: str
    is_adapter: bool
    base: ModelFolder | None = None


def find_model(source: str, key: str, base: str | None = None) -> ModelFolder:
    """Find a model and check that its weights are whole safetensors files, reading headers only.

    Args:
        source: a model folder or a hub id.
        key: where the recipe names it, for the sentence when it is not there.
        base: the model that it stands on if it is an adapter; None, or another adapter, leaves that to its
            configuration.

    Raises:
        UserError: if it cannot be found, is pickled or truncated, or has no configuration.
    """
    try:
        located = locate(source)
        is_adapter = (located.folder / ADAPTER_CONFIG).is_file()
        open_checkpoint(located.folder, adapter=is_adapter)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    config = ADAPTER_CONFIG if is_adapter else "config.json"
    if not (located.folder / config).is_file():
        raise UserError(f"{key}: {source!r} has no {config}; give a folder that save_pretrained wrote")
    stands_on = _base_of(located, key, base) if is_adapter else None
    return ModelFolder(source, located.folder, located.label, is_adapter, stands_on)


def _base_of(adapter: Located, key: str, base: str | None) -> ModelFolder:
    """The whole model that an adapter stands on: the one given, else the one its configuration names."""
    given = None if base is None else find_model(base, "base")
    if given is not None and not given.is_adapter:
        return given
    named = read_json(adapter.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    try:
        found = find_model(str(named), f"the model that the adapter {adapter.label!r} stands on")
    except UserError as error:
        raise UserError(f"{key}: {error}; give the model it stands on as base") from error
    if found.is_adapter:
        raise UserError(f"{key}: the adapter {adapter.label!r} stands on {found.label!r}, an adapter itself")
    return found


def read_tokenizer(model: ModelFolder) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer as it is.

    Raises:
        UserError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{model.label!r} has no tokenizer that can be loaded ({first_line(error)}); "
            "save one there with tokenizer.save_pretrained"
        ) from error


def load_tokenizer(model: ModelFolder) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; where it has no padding token, the end-of-sequence token pads, as in TRL.

    Raises:
        UserError: if there is none, or it has neither a padding nor an end-of-sequence token.
    """
    tokenizer = read_tokenizer(model)
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {model.label!r} has no end-of-sequence token, so answers would have no end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: ModelFolder, settings: dict[str, Any], *, trainable: bool) -> PreTrainedModel:
    """Load a causal language model, in fp32 unless ``settings`` name another dtype.

    transformers 5 would load in the checkpoint's dtype, often bf16, where an update of 1e-6 rounds to
    nothing.

    Args:
        model: what :func:`find_model` found.
        settings: further arguments of ``from_pretrained`` (the recipe's ``training.model_init_kwargs``).
        trainable: whether a PEFT adapter found there is to be trained on.

    Raises:
        UserError: if transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    arguments = {"dtype": torch.float32, **settings, "trust_remote_code": False, "use_safetensors": True}
    try:
        if model.base is not None:
            return _load_adapter(model, model.base, arguments, trainable=trainable)
        return AutoModelForCausalLM.from_pretrained(model.folder, **arguments)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{model.label!r} cannot be loaded as a causal language model: {first_line(error)}"
        ) from error


def _load_adapter(
    adapter: ModelFolder, base: ModelFolder, arguments: dict[str, Any], *, trainable: bool
) -> Any:
    """Load a model with an adapter on it, which is saved with the name of the model it stands on here."""
    from peft import PeftConfig, PeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base.folder, **arguments)
    if (adapter.folder / "tokenizer_config.json").is_file():  # tokens that came with the adapter
        tokens = len(AutoTokenizer.from_pretrained(adapter.folder, trust_remote_code=False))
        if tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(tokens)
    config = PeftConfig.from_pretrained(adapter.folder)
    config.base_model_name_or_path = model.name_or_path  # PEFT warns of any other than was in the adapter
    try:
        adapted = PeftModelForCausalLM.from_pretrained(
            model, adapter.folder, is_trainable=trainable, config=config
        )
    except (RuntimeError, ValueError) as error:  # tensors of other shapes; modules that are not there
        said = str(error).strip().splitlines()[:2][-1].strip(" \t.")  # torch's first line is a heading
        raise UserError(
            f"the adapter {adapter.label!r} does not fit the model {base.label!r} ({said}); give the model "
            "it stands on as base"
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = base.name
    return adapted
