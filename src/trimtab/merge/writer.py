"""Safetensors shards, written front to back: a tensor is never in memory as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from trimtab.files import write_json

INDEX = "model.safetensors.index.json"
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of the output.

    Args:
        key: its name.
        shape: its shape.
        dtype: its dtype.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file of the output, and the tensors in it, in order."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return sum(entry.size for entry in self.entries)


def sharded(entries: Iterable[Entry], limit: int) -> tuple[Shard, ...]:
    """Divide tensors among files of at most ``limit`` bytes, in order; a larger tensor has one of its own.

    Files are named as transformers names them.

    Examples:
        >>> entries = [Entry(key, (3,), torch.float32) for key in "abc"]
        >>> [shard.file for shard in sharded(entries, 24)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
        >>> [shard.file for shard in sharded(entries, 100)]
        ['model.safetensors']
    """
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(one.size for one in groups[-1]) + entry.size > limit:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index that says which tensor is in which file, where there are several files."""
    if len(shards) > 1:
        weight_map = {entry.key: shard.file for shard in shards for entry in shard.entries}
        size = sum(shard.size for shard in shards)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a shard's file is there, has its header, and is as long as it must be."""
    path, header = folder / shard.file, _header(shard.entries)
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == len(header) + shard.size
    except OSError:
        return False


class ShardWriter:
    """Writes one shard under a temporary name, and gives it its own when everything is in it.

    Args:
        folder: where the file goes.
        shard: what goes into it; values have to come in this order.
        lasting: have the disk confirm it before it gets its name, since a later run may go on from it.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> shard = Shard("model.safetensors", (Entry("w", (2, 2), torch.float32),))
        >>> with ShardWriter(folder, shard) as writer:
        ...     writer.write(torch.zeros(3))
        ...     writer.write(torch.ones(1))
        >>> load_file(folder / "model.safetensors")["w"].tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, folder: Path, shard: Shard, *, lasting: bool = False) -> None:
        self._lasting = lasting
        self._path = folder / shard.file
        self._temporary = folder / f".{shard.file}.tmp"
        self._left = shard.size
        self._file: BinaryIO = self._temporary.open("wb")
        self._file.write(_header(shard.entries))

    def write(self, values: Tensor) -> None:
        """Append values: contiguous, on the CPU, in the dtype of the tensor they belong to."""
        size = values.numel() * values.element_size()
        if size > self._left:
            raise ValueError(f"{size} bytes for {self._path.name}, where {self._left} are left")
        self._left -= size
        if size:
            self._file.write(values.detach().view(torch.uint8).numpy().data)

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name; after an error, remove it."""
        try:
            if kind is None and self._lasting:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None and self._left:
                raise ValueError(f"{self._path.name} lacks {self._left} bytes")
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def _header(entries: Sequence[Entry]) -> bytes:
    """The length of the header, and the header: JSON, padded so that the values are aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.size],
        }
        at += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
