"""Where a source's rows come from, opened: local files, a saved dataset, or the hub through ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trimtab.data.locate import Source, choose_split, is_hub_id, is_saved_dataset, local_files, missing_file
from trimtab.data.readers import Record, read_file, without_nulls
from trimtab.errors import UserError


@dataclass(frozen=True)
class Origin:
    """An opened source: what it is called, what is read, and its rows as often as they are asked for."""

    name: str
    files: tuple[str, ...]
    limit: int | None
    rows: Callable[[], Iterator[Record]]

    def records(self) -> Iterator[Record]:
        """Yield the rows, at most ``limit``.

        Raises:
            UserError: if there is not one.
        """
        found = 0
        for record in islice(self.rows(), self.limit):
            found += 1
            yield record
        if not found:
            raise UserError(f"{self.name} is empty: there is not one row in {', '.join(self.files)}")


def open_source(source: Source, part: str, *, streaming: bool = False) -> Origin:
    """Find what a source names.

    Args:
        source: as the recipe gives it.
        part: ``train`` or ``eval``: which split is meant where the recipe does not say.
        streaming: read a hub dataset as it is downloaded, instead of after. Local files are read row by row
            anyway.

    Raises:
        UserError: if there is nothing of that name, here or on the hub, or not the split or subset asked for.
    """
    path = Path(source.path).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return _dataset_origin(source, part, _load_saved(path, source))
    if path.exists():
        files = local_files(source, part)
        return Origin(
            source.path,
            tuple(map(str, files)),
            source.limit,
            lambda: chain.from_iterable(map(read_file, files)),
        )
    if not is_hub_id(source.path):
        raise missing_file(source.path)
    return _dataset_origin(source, part, _load_hub(source, streaming))


def _load_saved(path: Path, source: Source) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source.path} is a saved dataset that cannot be loaded: {_first_line(error)}"
        ) from None
    if source.split is not None and not isinstance(loaded, dict):
        raise UserError(
            f"{source.path} is one saved dataset, which has no splits: leave out split: {source.split}"
        )
    return loaded


def _load_hub(source: Source, streaming: bool) -> Any:
    import datasets
    import datasets.exceptions

    try:
        return datasets.load_dataset(source.path, name=source.subset, split=source.split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        close = missing_file(source.path)
        here = str(close) if "did you mean" in str(close) else f"{source.path!r} is no file or folder here"
        raise UserError(f"{here}, and as a hub dataset it cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dataset_origin(source: Source, part: str, loaded: Any) -> Origin:
    """A dataset of the ``datasets`` library, or one split of a dictionary of them."""
    split = source.split
    if isinstance(loaded, dict):
        if split is not None and split not in loaded:
            raise UserError(f"{source.path} has no split {split!r}; it has {', '.join(loaded)}")
        split = split or choose_split(loaded, part, source.path)
        loaded = loaded[split]
    name = source.path if split is None else f"{source.path}[{split}]"
    return Origin(source.path, (name,), source.limit, lambda: _dataset_records(loaded, name))


def _dataset_records(dataset: Iterable[Any], name: str) -> Iterator[Record]:
    for number, row in enumerate(dataset, 1):
        yield Record(without_nulls(row), name, number, False)
