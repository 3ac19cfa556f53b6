"""Rows gathered into an Arrow dataset of ``datasets``: in memory while small, in a temporary folder when not.

Nothing goes to the user's dataset cache. Rows are turned into Arrow a thousand at a time, so that Python
never holds all of them, and what exceeds a budget goes to files that are memory-mapped and removed when the
process ends.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.messages import is_plain
from trimtab.data.outcome import Dropped

if TYPE_CHECKING:
    import datasets
    import pyarrow

Row = dict[str, Any]

CHUNK = 1000
"""Rows that are turned into Arrow at once."""

MEMORY = 256 * 2**20
"""Bytes of Arrow kept in memory before the rest goes to files."""

# Kept for the life of the process: a dataset that was derived from ours may still read these folders.
_folders: list[tempfile.TemporaryDirectory[str]] = []


@dataclass
class _Chunk:
    """Some rows as Arrow: a table, or the file it went to, and whether its messages are plain."""

    plain: bool
    table: pyarrow.Table | None
    file: Path | None = None

    def load(self) -> Any:
        from datasets.table import InMemoryTable, MemoryMappedTable

        return InMemoryTable(self.table) if self.file is None else MemoryMappedTable.from_file(str(self.file))


class Collector:
    """Takes rows and makes a dataset of them.

    Messages that are a role and a text become a struct of the two. As soon as one row has more (tool calls,
    whose arguments have other keys in every row), all messages are stored as JSON objects: a struct would
    give each row the keys of all.

    Args:
        columns: of every row; :func:`_kinds` says which hold neither text nor messages;
            ``tools`` is added when a row has it.
        conversational: whether they hold messages rather than text.
        memory: bytes kept in memory; see :data:`MEMORY`.
    """

    def __init__(self, columns: tuple[str, ...], conversational: bool, memory: int = MEMORY) -> None:
        self._columns = columns
        self._spoken = tuple(column for column in columns if column not in _kinds())
        self._conversational = conversational
        self._memory = memory
        self._rows: list[Row] = []
        self._chunks: list[_Chunk] = []
        self._held = 0
        self._count = 0
        self._tools = False
        self._hash = hashlib.blake2b(digest_size=16)

    def __len__(self) -> int:
        return self._count

    def add(self, row: Row, content: bytes) -> None:
        """Add a row; its content, as :func:`canonical` gives it, goes into the fingerprint."""
        self._hash.update(content)
        self._rows.append(row)
        self._count += 1
        self._tools = self._tools or "tools" in row
        if len(self._rows) == CHUNK:
            self._flush()

    def finish(self) -> datasets.Dataset:
        """Return the dataset; its fingerprint depends on the rows and their order, and on nothing else."""
        from datasets import Dataset, DatasetInfo
        from datasets.table import concat_tables

        self._flush()
        plain = all(chunk.plain for chunk in self._chunks)
        features = self._features(plain)
        tables = [self._conformed(chunk, plain, features).load() for chunk in self._chunks]
        return Dataset(
            concat_tables(tables),
            info=DatasetInfo(features=features),
            fingerprint=self._hash.hexdigest()[:16],
        )

    def fingerprint(self) -> str:
        """Return the hash of the rows added so far."""
        return self._hash.hexdigest()

    def _features(self, plain: bool) -> datasets.Features:
        from datasets import Features, Json, List, Value

        text = Value("string")
        message = {"role": text, "content": text} if plain else Json()
        kind = List(message) if self._conversational else text
        tools = {"tools": text} if self._tools else {}
        kinds = {column: _kinds().get(column, kind) for column in self._columns}
        return Features({**kinds, **tools})

    def _flush(self) -> None:
        if self._rows:
            plain = not self._conversational or all(is_plain(message) for message in self._messages())
            self._chunks.append(self._stored(self._table(self._rows, plain), plain))
            self._rows = []

    def _messages(self) -> Iterator[Row]:
        return (message for row in self._rows for column in self._spoken for message in row[column])

    def _table(self, rows: list[Row], plain: bool) -> pyarrow.Table:
        from datasets import Dataset

        names = [*self._columns, *(["tools"] if self._tools else [])]
        columns = {name: [row.get(name) for row in rows] for name in names}
        return Dataset.from_dict(columns, features=self._features(plain)).data.table

    def _stored(self, table: pyarrow.Table, plain: bool) -> _Chunk:
        """Keep a table in memory while there is room, else in a file."""
        if self._held + table.nbytes <= self._memory:
            self._held += table.nbytes
            return _Chunk(plain, table)
        return _Chunk(plain, None, _written(table))

    def _conformed(self, chunk: _Chunk, plain: bool, features: datasets.Features) -> _Chunk:
        """Return the chunk in the final schema: it was made before later rows were known."""
        table = chunk.load()
        if table.schema.equals(features.arrow_schema):
            return chunk
        from datasets import Dataset

        return self._stored(self._table(list(Dataset(table)), plain), plain)


def _kinds() -> dict[str, Any]:
    """The columns that hold neither text nor messages, and what they hold."""
    from datasets import List, Value

    ids = List(Value("int64"))
    return {
        "label": Value("bool"),
        "prompt_ids": ids,
        "response_ids": List(ids),
        "scores": List(Value("float64")),
        "row": Value("string"),
    }


def _written(table: pyarrow.Table) -> Path:
    import pyarrow

    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="trimtab-data-"))
    with tempfile.NamedTemporaryFile(dir=_folders[0].name, suffix=".arrow", delete=False) as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        return Path(file.name)


def canonical(row: Row) -> bytes:
    r"""Return a row as bytes that are the same for the same content.

    Raises:
        Dropped: ``broken_unicode``, if a text holds half of a surrogate pair, which neither Arrow nor a
            tokenizer takes.

    Examples:
        >>> canonical({"text": "é"})
        b'{"text":"\xc3\xa9"}'
    """
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise Dropped("broken_unicode") from None
