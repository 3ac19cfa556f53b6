"""From what a recipe names to what is read: files, folders of files, saved datasets, hub ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from trimtab.errors import UserError, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Files that are read; all but Parquet also with ``.gz`` after it."""

EVALUATION_SPLITS = ("validation", "valid", "val", "eval", "dev", "test")
"""What held-out rows are called, in the order they are looked for."""

_NOT_DATA = frozenset(
    {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "package.json"}
)


class Source(Protocol):
    """What a recipe says about one source of rows.

    Attributes:
        path: a file, a folder, or a hub id.
        weight: passes over the source in one epoch.
        split: of a hub dataset, or a word in the names of a folder's files.
        subset: configuration of a hub dataset.
        limit: rows to read at most, from the start.
    """

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def split(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def limit(self) -> int | None: ...


def suffix_of(path: Path) -> str | None:
    """Return the suffix that says how a file is read, ``.gz`` left off, or None if it is not read at all.

    Examples:
        >>> suffix_of(Path("train.jsonl.gz")), suffix_of(Path("README.md"))
        ('.jsonl', None)
    """
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)
    return None if suffix == ".parquet" and plain != name else suffix


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by ``Dataset.save_to_disk``."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def is_hub_id(path: str) -> bool:
    """Return whether a name that is no file can be a dataset's name on the hub.

    Examples:
        >>> is_hub_id("Anthropic/hh-rlhf"), is_hub_id("data/train.jsonl"), is_hub_id("./data")
        (True, False, False)
    """
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)) and suffix_of(Path(path)) is None


def local_files(source: Source, part: str) -> list[Path]:
    """Return the data files of a file or folder, sorted by name.

    In a folder, files are told apart by the words in their names: with ``split``, those that carry it;
    without, those that carry ``train`` for training and ``validation`` (or another name for it) for
    evaluation; where no file carries any such word, all of them.

    Raises:
        UserError: if a file is of no known kind, or a folder has no data files, or none of the split.
    """
    path = Path(source.path).expanduser()
    if source.subset is not None:
        raise UserError(
            f"{source.path} is on this disk, where there are no subsets: leave out subset: {source.subset}"
        )
    if path.is_dir():
        return _files_in(path, source, part)
    if suffix_of(path) is None:
        raise UserError(
            f"{source.path} is no data file that is read here; known kinds: {', '.join(SUFFIXES)} (and .gz)"
        )
    if source.split is not None:
        raise UserError(f"{source.path} is one file, which has no splits: leave out split: {source.split}")
    return [path]


def _files_in(folder: Path, source: Source, part: str) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if _is_data(file, folder))
    if not found:
        raise UserError(
            f"folder {source.path} has no data files; known kinds: {', '.join(SUFFIXES)} (and .gz)"
        )
    if source.split is not None:
        chosen = [file for file in found if source.split.lower() in _words(file, folder)]
        if not chosen:
            names = ", ".join(str(file.relative_to(folder)) for file in found[:5])
            raise UserError(f"folder {source.path} has no file of split {source.split!r}; it has {names}")
        return chosen
    return _of_part(found, folder, part)


def _of_part(found: list[Path], folder: Path, part: str) -> list[Path]:
    words = {file: _words(file, folder) for file in found}
    for split in ("train",) if part == "train" else EVALUATION_SPLITS:
        chosen = [file for file in found if split in words[file]]
        if chosen:
            return chosen
    return found


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(piece.startswith(".") for piece in file.relative_to(folder).parts)
    return file.is_file() and not hidden and file.name not in _NOT_DATA and suffix_of(file) is not None


def _words(file: Path, folder: Path) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower()))


def missing_file(path: str) -> UserError:
    """Return the error for a path where there is nothing, with the name nearest to it that is there."""
    parent = Path(path).expanduser().parent
    close = nearest(Path(path).name, _names(parent))
    if close:
        return UserError(f"there is no {path!r}; did you mean {str(parent / close)!r}?")
    place = f"there is no folder {str(parent)!r}" if not parent.is_dir() else "no such file or folder"
    return UserError(f"cannot read data from {path!r}: {place}, and it is no hub id")


def _names(folder: Path) -> Iterable[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def choose_split(names: Iterable[str], part: str, where: str) -> str:
    """Return the split of a dataset that a part is read from when the recipe does not say.

    Raises:
        UserError: if there is none that fits.

    Examples:
        >>> choose_split(["train", "test"], "eval", "org/name")
        'test'
    """
    names = list(names)
    for name in ("train",) if part == "train" else EVALUATION_SPLITS:
        if name in names:
            return name
    raise UserError(f"{where} has no split for {part}: it has {', '.join(names)}; say which with split:")
