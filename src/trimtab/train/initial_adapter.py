"""What an adapter was before its training, kept so that τ in adapter space can be taken later.

A LoRA adapter adds s·B A to a weight, with B = 0 and a random A₀ at the start. Its delta is (A − A₀, B), and
A₀ is known at no other time than this.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from trimtab.delta.adapters import INITIAL_ADAPTER
from trimtab.files import replacing_file
from trimtab.model_folder import ModelFolder


def keep_initial_adapter(model: Any, policy: ModelFolder, run: Path) -> None:
    """Write ``initial_adapter.safetensors`` into a run folder; nothing where no adapter is trained.

    An adapter that is trained further keeps what it was before its first training, where that is known.

    Args:
        model: the model, before the first step.
        policy: where it was loaded from.
        run: the run folder.
    """
    if policy.is_adapter:
        copy_initial_adapter(policy.folder, run)
    elif isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, adapter_name="default")
        with replacing_file(run / INITIAL_ADAPTER) as temporary:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)


def copy_initial_adapter(source: Path, target: Path) -> None:
    """Copy ``initial_adapter.safetensors`` from one folder to another, where it is there."""
    if (source / INITIAL_ADAPTER).is_file():
        with replacing_file(target / INITIAL_ADAPTER) as temporary:
            shutil.copyfile(source / INITIAL_ADAPTER, temporary)
