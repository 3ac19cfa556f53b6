"""Model folders: their safetensors files, opened lazily and read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes a delta can be computed from, by their safetensors code."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT_MODEL = (
    "from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained({folder!r}).save_pretrained({target!r})"
)
_CONVERT_ADAPTER = (
    "import torch; from safetensors.torch import save_file; "
    "save_file(torch.load({file!r}, weights_only=True), {target!r})"
)


class Checkpoint:
    """The tensors of one or more safetensors files, by key.

    Headers are read when it is made; values only when they are asked for. Handles are opened on first use and
    do not travel through pickling or copying.

    Args:
        folder: the folder the files lie in.
        files: their names inside it.
        mapped: map the files into memory: tensors are views, and what is read stays the system's to forget.
            Else they are read into memory of their own.

    Raises:
        UserError: a file is missing, truncated or no safetensors file, or a key occurs twice.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.arange(6.0).view(2, 3)}, f"{folder}/model.safetensors")
        >>> checkpoint = Checkpoint(folder, ["model.safetensors"])
        >>> checkpoint.shape("w"), checkpoint.read_slice("w", (slice(1, 2),)).tolist()
        ((2, 3), [[3.0, 4.0, 5.0]])
    """

    def __init__(self, folder: str | Path, files: Sequence[str], *, mapped: bool = False) -> None:
        self.folder = Path(folder)
        self.files = tuple(files)
        self._mapped = mapped
        self._handles: dict[str, Any] = {}
        self._file: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._code: dict[str, str] = {}
        for file in files:
            self._read_header(file)

    def keys(self) -> tuple[str, ...]:
        """All keys, file by file."""
        return tuple(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self._shape[key]

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor, from the header.

        Raises:
            UserError: it is none that a difference can be taken in (quantized or integer weights).
        """
        code = self._code[key]
        if code not in DTYPES:
            raise UserError(
                f"tensor {key!r} in {self.folder / self._file[key]} is of type {code}; a delta needs weights "
                f"in {', '.join(DTYPES)}, so dequantize the model first"
            )
        return DTYPES[code]

    def code(self, key: str) -> str:
        """Dtype of one tensor as safetensors writes it, from the header; integers included."""
        return self._code[key]

    def file(self, key: str) -> str:
        """Name of the file that one tensor lies in."""
        return self._file[key]

    def metadata(self, file: str) -> dict[str, str]:
        """The free-text metadata in the header of ``file``."""
        return dict(self._open(file).metadata() or {})

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._guarded(key, lambda handle: handle.get_tensor(key))

    def read_slice(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """Read a rectangular part of one tensor.

        Args:
            key: the tensor's key.
            slices: one slice of step 1 per leading dimension.
        """
        shape = self.shape(key)
        part = [whole.indices(size)[:2] for whole, size in zip(slices, shape, strict=False)]
        lengths = [max(stop - start, 0) for start, stop in part]
        if 0 in lengths:  # safetensors refuses empty ranges at the end
            return torch.empty([*lengths, *shape[len(part) :]], dtype=self.dtype(key))
        exact = tuple(slice(start, stop) for start, stop in part)
        return self._guarded(key, lambda handle: handle.get_slice(key)[exact])

    def _guarded(self, key: str, read: Any) -> Tensor:
        file = self._file[key]
        try:
            tensor: Tensor = read(self._open(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {key!r} from {self.folder / file}: {error}") from error
        return tensor

    def _read_header(self, file: str) -> None:
        handle = self._open(file)
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            if key in self._file:
                raise UserError(
                    f"tensor {key!r} occurs twice in {self.folder}: in {self._file[key]} and in {file}; "
                    f"remove the file that does not belong there"
                )
            part = handle.get_slice(key)
            self._file[key], self._code[key] = file, part.get_dtype()
            self._shape[key] = tuple(part.get_shape())

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.folder / file
            if not path.is_file():
                raise UserError(f"{path} is missing, although the folder's index names it; copy it there")
            try:
                # Pages of a map count as memory until the file is closed, so a map has to be asked for.
                backend = "mmap" if self._mapped else "pread"
                self._handles[file] = safe_open(path, framework="pt", device="cpu", backend=backend)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is no whole safetensors file ({error}); copy or download it again"
                ) from error
        return self._handles[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


def open_checkpoint(folder: Path, *, adapter: bool = False, mapped: bool = False) -> Checkpoint:
    """Open the weights of a model or adapter folder.

    As transformers does, ``model.safetensors`` is preferred over ``model.safetensors.index.json`` with its
    shards.

    Args:
        folder: a folder as ``save_pretrained`` writes it.
        adapter: look for ``adapter_model.safetensors`` instead.
        mapped: see :class:`Checkpoint`.

    Raises:
        UserError: there are no safetensors in it (pickles are never read), the index is broken, or a file is.
    """
    single = "adapter_model.safetensors" if adapter else _named_in_config(folder) or "model.safetensors"
    index = folder / f"{single.removesuffix('.index.json')}.index.json"
    if (folder / single).is_file() and not single.endswith(".index.json"):
        return Checkpoint(folder, [single], mapped=mapped)
    if index.is_file():
        return _open_sharded(folder, index, mapped=mapped)
    raise _no_weights(folder, single)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, is not JSON or nested too deeply, or holds something else than an
            object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; a JSON object was expected")
    return value


def shard_files(index: Path) -> list[str]:
    """Names of the shards that an index lists, sorted.

    Raises:
        UserError: the index has no ``weight_map``, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensor names to files; copy or download it again")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index} names {file!r}, which is no safetensors file in the same folder")
    return files


def _open_sharded(folder: Path, index: Path, *, mapped: bool) -> Checkpoint:
    checkpoint = Checkpoint(folder, shard_files(index), mapped=mapped)
    lost = [key for key in read_json(index)["weight_map"] if key not in checkpoint]
    if lost:
        raise UserError(
            f"{len(lost)} tensors that {index} lists are in none of its files (first: {lost[0]!r}); "
            f"copy or download the folder again"
        )
    return checkpoint


def _named_in_config(folder: Path) -> str | None:
    """The weights file that a config names itself (``transformers_weights``), if it does."""
    config = folder / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(
            f"{config} names {name!r} in transformers_weights, which is no file in the same folder"
        )
    return name


def _no_weights(folder: Path, wanted: str) -> UserError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return _pickled(folder, pickles, adapter=wanted.startswith("adapter"))
    if next(folder.glob("*.gguf"), None):
        return UserError(
            f"{folder} holds GGUF files and no {wanted}; dequantize it to safetensors first "
            f"(from_pretrained with gguf_file=, then save_pretrained)"
        )
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
    return UserError(f"{folder} holds no {wanted} (found: {found}); give a folder that save_pretrained wrote")


def _pickled(folder: Path, pickles: list[str], *, adapter: bool) -> UserError:
    if adapter:
        line = _CONVERT_ADAPTER.format(
            file=str(folder / pickles[0]), target=str(folder / "adapter_model.safetensors")
        )
    else:
        line = _CONVERT_MODEL.format(folder=str(folder), target=f"{folder}-safetensors")
    return UserError(
        f"{folder} holds pickled weights ({pickles[0]}) and no safetensors; reading a pickle can run code, "
        f'so convert it once, if you trust it, with: python -c "{line}"'
    )
