"""A delta on disk: one folder with ``delta.safetensors`` (τ) and ``delta.json`` (what is known of it)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trimtab.delta.checkpoint import DTYPES, Checkpoint, read_json
from trimtab.delta.record import DeltaRecord, dtype_name, from_json, to_json
from trimtab.errors import IncompatibleState, UserError

TENSORS = "delta.safetensors"
RECORD = "delta.json"
FORMAT = "trimtab-delta"
VERSION = 1

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNSEALED = "0" * 32


@dataclass(frozen=True)
class TensorSpec:
    """What a file's header says of one tensor.

    Args:
        name: its key.
        dtype: one of those in ``DTYPES``.
        shape: its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor, so that no more than one is in memory.

    The header comes first, since names, dtypes and shapes are known beforehand; then the values, in the
    header's order. The fingerprint is known only after the last of them and is put into its place in the
    header by :meth:`seal`.

    Args:
        path: the file; it is written in place, so give a temporary name.
        specs: what will be written, in any order.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> with SafetensorsWriter(path, [TensorSpec("a", torch.float32, (2,))]) as writer:
        ...     writer.write("a", torch.tensor([1.0, 2.0]))
        ...     writer.seal("f" * 32)
        >>> load_file(path)["a"].tolist()
        [1.0, 2.0]
    """

    def __init__(self, path: str | Path, specs: Sequence[TensorSpec]) -> None:
        self.path = Path(path)
        # Wider types first, so that every tensor starts at a multiple of its entries' size.
        self.specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
        self._written = 0

    @property
    def order(self) -> tuple[str, ...]:
        """The names in the order in which :meth:`write` wants them."""
        return tuple(spec.name for spec in self.specs)

    def __enter__(self) -> SafetensorsWriter:
        self._file = self.path.open("wb")
        self._file.write(self._header(_UNSEALED))
        return self

    def write(self, name: str, values: Tensor) -> None:
        """Append the values of the next tensor."""
        spec = self.specs[self._written]
        assert (name, values.dtype, tuple(values.shape)) == (spec.name, spec.dtype, spec.shape)
        flat = values.detach().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        self._written += 1

    def seal(self, fingerprint: str) -> None:
        """Put the fingerprint into the header, after the last tensor."""
        assert self._written == len(self.specs), "not all tensors were written"
        assert len(fingerprint) == len(_UNSEALED)
        self._file.seek(0)
        self._file.write(self._header(fingerprint))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _header(self, fingerprint: str) -> bytes:
        entries: dict[str, Any] = {
            "__metadata__": {"format": FORMAT, "version": str(VERSION), "fingerprint": fingerprint}
        }
        position = 0
        for spec in self.specs:
            entries[spec.name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class StoredDelta:
    """τ in a folder, read one parameter at a time.

    Args:
        folder: a delta folder.
        record: what its ``delta.json`` says.

    Raises:
        UserError: the two files do not belong together.
    """

    def __init__(self, folder: Path, record: DeltaRecord) -> None:
        self._checkpoint = Checkpoint(folder, [TENSORS])
        self._names = tuple(record.tensors)
        stated = {
            name: (tensor.statistics.shape, tensor.statistics.dtype)
            for name, tensor in record.tensors.items()
        }
        found = {
            name: (self._checkpoint.shape(name), dtype_name(self._checkpoint.dtype(name)))
            for name in self._checkpoint.keys()  # noqa: SIM118
        }
        fingerprint = self._checkpoint.metadata(TENSORS).get("fingerprint")
        if stated != found or fingerprint != record.fingerprint:
            raise IncompatibleState(
                f"{folder / TENSORS} and {RECORD} beside it do not belong together (fingerprints "
                f"{fingerprint} and {record.fingerprint}); save the delta again"
            )

    def names(self) -> tuple[str, ...]:
        """Canonical names."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of τ of one parameter."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of τ of one parameter, as stored."""
        return self._checkpoint.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """τ of one parameter."""
        return self._checkpoint.read(name)

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of τ of one parameter; only that part is read."""
        return self._checkpoint.read_slice(name, slices)


def record_json(record: DeltaRecord) -> dict[str, Any]:
    """The content of ``delta.json``."""
    from trimtab import __version__

    return {"format": FORMAT, "version": VERSION, "trimtab": __version__, **to_json(record)}


def read_record(folder: Path) -> DeltaRecord:
    """Read the ``delta.json`` of a delta folder.

    Raises:
        UserError: there is none, or it is none of ours, or of a later version.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise UserError(
            f"there is no delta folder {str(folder)!r}; make one with "
            f"`trimtab delta --reference R --base B OUT`"
        )
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {RECORD}, so it is no delta; give a folder that trimtab delta wrote"
        )
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise UserError(f"{path} is no delta's record (format {value.get('format')!r}, not {FORMAT!r})")
    if value.get("version") != VERSION:
        raise IncompatibleState(
            f"{path} is of version {value.get('version')!r} and this trimtab reads version {VERSION}; "
            f"use the trimtab that wrote it ({value.get('trimtab', 'unknown')}), or make the delta again"
        )
    try:
        return from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); make the delta again"
        ) from error


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse to write where something else lies.

    Raises:
        UserError: ``path`` exists and is not to be overwritten, or is no delta folder and so never is; or it
            lies below a file.
    """
    file = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise UserError(f"{path} cannot be made, since {file} is a file; give a folder to write the delta to")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; give the name of a folder to write the delta to")
    others = [file.name for file in path.iterdir() if file.name not in (TENSORS, RECORD)]
    if others:
        raise UserError(
            f"{path} holds other files ({sorted(others)[0]}), so it is not replaced by a delta; "
            f"give a new folder"
        )
    if not overwrite and any(path.iterdir()):
        raise UserError(f"{path} already holds a delta; give another folder, or --overwrite (overwrite=True)")
