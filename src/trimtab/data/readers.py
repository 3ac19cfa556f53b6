"""Rows of local files, one at a time, each with its place; what is wrong with a file is said with its line.

Rows are read here rather than by ``datasets``' own readers for three reasons: a fault has a line, an object
keeps exactly the keys it was written with (Arrow gives every row the keys of all), and nothing is copied to
a cache.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.data.locate import suffix_of
from trimtab.data.outcome import describe
from trimtab.errors import UserError

Row = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
_LISTS = frozenset({"messages", "conversations", "responses", "scores", "history", "tools"})
_PARQUET_BATCH = 256


class Record(NamedTuple):
    """A row and where it was found: a line of a text file, else its number, from 1."""

    row: Row
    file: str
    number: int
    by_line: bool

    @property
    def place(self) -> str:
        """The place as an error names it.

        Examples:
            >>> Record({}, "a.jsonl", 17, True).place, Record({}, "a.parquet", 17, False).place
            ('a.jsonl:17', 'a.parquet, row 17')
        """
        return f"{self.file}:{self.number}" if self.by_line else f"{self.file}, row {self.number}"


def read_file(path: Path) -> Iterator[Record]:
    """Yield the rows of a JSONL, JSON, CSV, TSV or Parquet file, gzipped or not.

    Raises:
        UserError: if the file cannot be read or a row is malformed; the sentence names the file and the line.
    """
    try:
        yield from _READERS[suffix_of(path) or ""](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        raise UserError(f"{path}:{number} is not UTF-8 ({found}); save the file as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield number, _decode(line.removeprefix(_BOM) if number == 1 else line, path, number)


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            yield Record(_object(_parse(line, path, number), path, number), str(path), number, True)


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line.rstrip("\r\n"))  # else a fault at the end is said to be in column 1
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}:{number} is not JSON that can be read: it is nested too deeply") from None


def _object(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number} is {describe(value)}; every row must be an object with columns")
    return value


def _json(path: Path) -> Iterator[Record]:
    """A ``.json`` file holds one list of rows, or (whatever its name says) a row on each line."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    if not start.startswith(b"["):
        yield from _json_lines(path)
        return
    with _open(path) as file:
        content = file.read().removeprefix(_BOM)
    lines = enumerate(content.split(b"\n"), 1)
    yield from _json_list("\n".join(_decode(line, path, number) for number, line in lines), path)


def _json_list(text: str, path: Path) -> Iterator[Record]:
    """Yield the items of a list one by one, so that only the text is in memory, not all that it holds."""
    decoder = json.JSONDecoder()
    at, line, counted = _after_space(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(path, text, error.pos, error.msg) from None
        except RecursionError:
            raise _broken(path, text, at, "Nested too deeply") from None
        yield Record(_object(value, path, line), str(path), line, True)
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise _broken(path, text, at, "Expecting a row after the comma")
        elif text[at : at + 1] != "]":
            raise _broken(path, text, at, "Expecting ',' or ']'")
    if text[at + 1 :].strip():
        raise _broken(path, text, _after_space(text, at + 1), "Extra data after the list")


def _broken(path: Path, text: str, at: int, message: str) -> UserError:
    line = text.count("\n", 0, at) + 1
    return UserError(f"{path}:{line} is not JSON: {message} at column {at - text.rfind(chr(10), 0, at)}")


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _table(path: Path) -> Iterator[Record]:
    # The csv module refuses fields above 128 KiB unless told otherwise; long answers are longer.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if names is None:
                names = _header(cells, path)
            elif cells:
                yield Record(_cells(names, cells, path, reader.line_num), str(path), reader.line_num, True)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is not CSV: {error}") from None


def _header(cells: list[str], path: Path) -> list[str]:
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise UserError(f"{path}:1 names the column {twice[0]!r} twice")
    return cells


def _cells(names: list[str], cells: list[str], path: Path, number: int) -> Row:
    if len(cells) != len(names):
        raise UserError(f"{path}:{number} has {len(cells)} cells where the header has {len(names)} columns")
    row: Row = dict(zip(names, cells, strict=True))
    for name in _LISTS & row.keys():
        if row[name].lstrip().startswith(("[", "{")):
            row[name] = _parse(row[name], path, number)
    return row


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(without_nulls(row), str(path), number, False)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}"
        ) from None


def without_nulls(row: Row) -> Row:
    """Return an Arrow row without the nulls inside its columns: keys that only other rows have.

    Examples:
        >>> without_nulls({"messages": [{"role": "user", "name": None}], "system": None})
        {'messages': [{'role': 'user'}], 'system': None}
    """
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
