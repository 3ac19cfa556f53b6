"""Folders of models to merge, and configurations of merges of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.merge import merge
from trimtab.merge.config import read_config


def folder(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder with these tensors in one file, and just enough of a configuration to be merged."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Normal numbers in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(s), generator=generator) * scale for name, s in shapes.items()}


def moved(tensors: Mapping[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """The same tensors with small random changes, as tuning makes them."""
    change = random_tensors({name: value.shape for name, value in tensors.items()}, seed, scale)
    return {name: value + change[name].to(value.dtype) for name, value in tensors.items()}


def values_of(
    method: str,
    base: Path | None,
    models: Sequence[Path],
    each: Sequence[Mapping[str, Any]] | None = None,
    **top: Any,
) -> dict[str, Any]:
    """What the YAML of a merge of ``models`` holds; ``each`` are their own parameters."""
    own = each if each is not None else [{}] * len(models)
    listed = [{"model": str(m), "parameters": dict(p)} for m, p in zip(models, own, strict=True)]
    values: dict[str, Any] = {"merge_method": method, "models": listed, **top}
    if base is not None:
        values["base_model"] = str(base)
    return values


def merged(out: Path, values: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    """Merge, and read what was written."""
    return weights(merge(read_config(dict(values)), out, **options))


def weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from however many files."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def files_in(path: Path) -> dict[str, int]:
    """Every path below a folder, hidden ones too, and the sizes of the files."""
    return {str(one.relative_to(path)): one.stat().st_size if one.is_file() else 0 for one in path.rglob("*")}
