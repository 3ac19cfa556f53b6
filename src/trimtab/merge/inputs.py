"""A model as an input of a merge: its tensors by key, read in ranges."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.delta.checkpoint import DTYPES, open_checkpoint, read_json
from trimtab.delta.locate import Located
from trimtab.errors import UserError
from trimtab.ops.fingerprint import combined_digest

_INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WILL_NEED = 3  # POSIX_MADV_WILLNEED
_SAMPLED = 64
"""Places of a file whose bytes go into its fingerprint."""


def will_need(values: Tensor) -> None:
    """Tell the system that a view of a mapped file will be read soon; it reads ahead and returns at once."""
    size = values.numel() * values.element_size()
    advise = _advise()
    if size and advise is not None:
        start = values.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, values.data_ptr() + size - start, _WILL_NEED)


@cache
def _advise() -> Any:
    """The system's ``posix_madvise``, where it has one."""
    found = getattr(ctypes.CDLL(None), "posix_madvise", None) if os.name == "posix" else None
    if found is not None:
        found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found


class Input(Protocol):
    """Named tensors that are read in ranges of their entries.

    Attributes:
        label: how to speak of it.
        folder: where its configuration and tokenizer lie.
        config: its ``config.json``.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]

    def keys(self) -> tuple[str, ...]:
        """Keys, in the order of the files."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor."""

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Entries ``low … high−1`` of one tensor in row-major order, flat, on the CPU; not to be written to.

        Memory of the order of ``high − low`` entries is used at most, whatever the tensor's size.
        """

    def expect(self, key: str, low: int, high: int) -> None:
        """Say that these entries will be read soon, so that they are fetched while others are worked on."""

    def fingerprint(self) -> str:
        """What tells this model's content apart from another's, in 32 hex digits."""


def stamps(folder: Path) -> str:
    """Names, sizes and times of change of a folder's files: what is new if one of them is written."""
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


class FolderInput:
    """A folder as ``save_pretrained`` writes it, its files mapped into memory.

    Args:
        located: the folder.

    Raises:
        UserError: it has no ``config.json`` or no safetensors, or they are unusable.

    Examples:
        >>> import json, tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        >>> save_file({"w": torch.arange(6.0).view(2, 3)}, folder / "model.safetensors")
        >>> FolderInput(Located(folder, "here")).read("w", 2, 5).tolist()
        [2.0, 3.0, 4.0]
    """

    def __init__(self, located: Located) -> None:
        self.label = located.label
        self.folder = located.folder
        self.config: Mapping[str, Any] = read_json(located.folder / "config.json")
        self._checkpoint = open_checkpoint(located.folder, mapped=True)
        self._open: tuple[str, Tensor] = ("", torch.empty(0))

    def keys(self) -> tuple[str, ...]:
        """Keys, file by file, by name in each."""
        return self._checkpoint.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self._checkpoint.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor, from the header; whole numbers are an answer here."""
        code = self._checkpoint.code(key)
        if code in _INTEGERS:
            return _INTEGERS[code]
        if code not in DTYPES:
            raise UserError(
                f"tensor {key!r} in {self.folder / self._checkpoint.file(key)} is of type {code}; a merge "
                f"needs weights in {', '.join(DTYPES)}, so dequantize the model first"
            )
        return DTYPES[code]

    def read(self, key: str, low: int, high: int) -> Tensor:
        """A view of the mapped file."""
        name, flat = self._open
        if name != key:
            flat = self._checkpoint.read(key).reshape(-1)
            self._open = key, flat
        return flat[low:high]

    def expect(self, key: str, low: int, high: int) -> None:
        """Have the system read ahead."""
        will_need(self._checkpoint.read(key).reshape(-1)[low:high])

    def fingerprint(self) -> str:
        """BLAKE2b of each file's name, size, header and of 64 places of 4 kB, spread evenly over it.

        It tells apart models that differ as training or merging makes them differ, at no cost; it is no
        defence against forgery.
        """
        parts = []
        for file in self._checkpoint.files:
            path = self.folder / file
            size = path.stat().st_size
            parts += [file, str(size)]
            with path.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
                parts.append(opened.read(header).decode("latin-1"))
                first, left = opened.tell(), size - opened.tell()
                for place in range(_SAMPLED):
                    opened.seek(first + left * place // _SAMPLED)
                    parts.append(opened.read(4096).decode("latin-1"))
        return combined_digest(parts)
