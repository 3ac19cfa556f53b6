"""Is this folder a model that can be loaded? Answered from file names, sizes and headers, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

LONGEST_HEADER = 100 * 2**20
"""safetensors' own bound on its header."""


def model_folder_problem(folder: Path) -> str | None:
    """Return what keeps ``folder`` from being a model folder, or None.

    Weights must be safetensors, whole to the last byte; pickles are refused unread, because loading one runs
    whatever code is in it.
    """
    if not folder.is_dir():
        return f"{str(folder)!r} is a file; a model is a folder with config.json and safetensors weights"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(
            file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(suffix)
        )
        if pickles:
            return f"{str(folder)!r} holds pickled weights ({pickles[0]}), unread here; save as safetensors"
        return f"{str(folder)!r} has no safetensors weights"
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"{str(folder)!r} has no config.json, so it is not a model folder"
    problems = (safetensors_problem(file) for file in weights)
    return next((problem for problem in problems if problem), None) or _missing_shard(folder)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def _missing_shard(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{str(index)!r} is not a safetensors index"
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    return f"{str(folder)!r} lacks {missing[0]}, which its index names" if missing else None


def safetensors_problem(file: Path) -> str | None:
    """Return what is wrong with a safetensors file's header or size, or None.

    The file is an 8-byte length, a JSON header of that length with each tensor's extent, and the tensors.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > LONGEST_HEADER:
            return f"{str(file)!r} is not a safetensors file"
        if size < 8 + length:
            return f"{str(file)!r} is cut short: its header alone is {length} bytes and the file has {size}"
        header = handle.read(length)
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError):
        return f"{str(file)!r} is not a safetensors file: its header cannot be read"
    if size != 8 + length + end:
        return (
            f"{str(file)!r} is damaged: its header promises {8 + length + end} bytes and the file has {size}"
        )
    return None
