"""Files of every kind give the same rows, and what is wrong with one is said with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trimtab.data.readers import read_file
from trimtab.errors import UserError

ROWS = [{"prompt": f"q{number}", "chosen": 'say "yes",\nplease é', "rejected": "no"} for number in range(3)]


def rows(path: Path) -> list[dict]:
    return [record.row for record in read_file(path)]


def places(path: Path) -> list[str]:
    return [record.place for record in read_file(path)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json", "a.json.gz", "lines.json", "bom.jsonl"]
)
def test_json_of_every_kind(folder, write, name):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    content = {"a.json": ROWS, "a.json.gz": ROWS, "bom.jsonl": "\ufeff" + lines}.get(name, lines)
    assert rows(write(name, content)) == ROWS


def test_blank_lines_are_no_rows_but_count_as_lines(folder, write):
    path = write("a.jsonl", f"{json.dumps(ROWS[0])}\n\n   \n{json.dumps(ROWS[1])}\n")
    assert rows(path) == ROWS[:2]
    assert places(path) == ["a.jsonl:1", "a.jsonl:4"]


def test_items_of_a_list_are_placed_by_line(folder, write):
    assert places(write("a.json", '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}]\n')) == [
        "a.json:2",
        "a.json:4",
        "a.json:5",
    ]


def test_a_line_that_json_but_not_python_would_split(folder, write):
    """U+2028 and U+0085 are line ends to str.splitlines, and ordinary characters inside JSON."""
    row = {"text": "one\u2028two\u0085three"}
    assert rows(write("a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")) == [row]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_tables(folder, write, delimiter):
    cells = '"say ""yes"",\nplease é"'
    text = delimiter.join(["prompt", "chosen", "rejected"]) + "\n"
    text += "".join(delimiter.join([f"q{number}", cells, "no"]) + "\n" for number in range(3))
    path = write("a.csv" if delimiter == "," else "a.tsv", text)
    assert rows(path) == ROWS
    assert places(path) == [f"{path}:3", f"{path}:5", f"{path}:7"]


def test_lists_in_the_cells_of_a_table(folder, write):
    path = write("a.csv", 'prompt,responses,scores\nq,"[""a"", ""[b]""]","[1, 2]"\n')
    assert rows(path) == [{"prompt": "q", "responses": ["a", "[b]"], "scores": [1, 2]}]


def test_a_long_cell(folder, write):
    path = write("a.csv", f"text\n{'x' * 200_000}\n")
    assert len(rows(path)[0]["text"]) == 200_000


def test_parquet_without_the_nulls_that_arrow_adds(folder):
    messages = [
        [{"role": "user", "content": "q", "name": None}],
        [{"role": "user", "content": "q", "name": "Ann"}],
    ]
    table = pyarrow.table({"messages": messages, "system": [None, "be kind"]})
    pyarrow.parquet.write_table(table, "a.parquet")
    assert rows(Path("a.parquet")) == [
        {"messages": [{"role": "user", "content": "q"}], "system": None},
        {"messages": [{"role": "user", "content": "q", "name": "Ann"}], "system": "be kind"},
    ]
    assert places(Path("a.parquet")) == ["a.parquet, row 1", "a.parquet, row 2"]


def test_parquet_is_read_in_batches(folder, monkeypatch):
    """A first row must not cost the whole file."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 1000}), "a.parquet")
    taken = []
    original = pyarrow.RecordBatch.to_pylist

    class Counting:
        def __init__(self, batch):
            self.batch = batch

        def to_pylist(self):
            taken.append(self.batch.num_rows)
            return original(self.batch)

    batches = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, **options: map(Counting, batches(self, **options)),
    )
    next(read_file(Path("a.parquet")))
    assert taken == [256]


GOOD = json.dumps(ROWS[0]) + "\n"
FAULTS = {
    "broken.jsonl": (
        GOOD * 16 + '{"prompt": "q" "chosen": "a"}\n',
        "broken.jsonl:17 is not JSON: Expecting ',' delimiter at column 16",
    ),
    "cut.jsonl": (
        GOOD + '{"prompt": "q',
        "cut.jsonl:2 is not JSON: Unterminated string starting at at column 12",
    ),
    "list.jsonl": (
        GOOD + "[1, 2]\n",
        "list.jsonl:2 is a list of numbers; every row must be an object with columns",
    ),
    "number.jsonl": ("3\n", "number.jsonl:1 is the number 3; every row must be an object with columns"),
    "latin.jsonl": (
        GOOD.encode() + '{"text": "é"}\n'.encode("latin-1"),
        "latin.jsonl:2 is not UTF-8 (byte 0xe9 at 11); save the file as UTF-8",
    ),
    "wide.jsonl": (
        GOOD.encode("utf-16"),
        "wide.jsonl:1 is not UTF-8 (byte 0xff at 1); save the file as UTF-8",
    ),
    "deep.jsonl": ("[" * 200_000, "deep.jsonl:1 is not JSON that can be read: it is nested too deeply"),
    "comma.json": ('[\n {"a": 1}\n {"a": 2}]', "comma.json:3 is not JSON: Expecting ',' or ']' at column 2"),
    "trailing.json": (
        '[{"a": 1},\n]',
        "trailing.json:2 is not JSON: Expecting a row after the comma at column 1",
    ),
    "open.json": ('[{"a": 1},\n', "open.json:2 is not JSON: Expecting value at column 1"),
    "after.json": ('[{"a": 1}]\n[]', "after.json:2 is not JSON: Extra data after the list at column 1"),
    "bare.json": ('[{"a": 1}, 7]', "bare.json:1 is the number 7; every row must be an object with columns"),
    "inner.json": ('[{"a": 1},\n {"a" 2}]', "inner.json:2 is not JSON: Expecting ':' delimiter at column 7"),
    "ragged.csv": ("a,b\n1,2\n3\n", "ragged.csv:3 has 1 cells where the header has 2 columns"),
    "twice.csv": ("a,a\n1,2\n", "twice.csv:1 names the column 'a' twice"),
    "quote.csv": ('a,b\n1,"2\n', "quote.csv:2 is not CSV: unexpected end of data"),
    "not.parquet": (b"PAR1 but not really", "not.parquet is not a Parquet file that can be read: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said_with_its_line(folder, write, name):
    content, sentence = FAULTS[name]
    path = write(name, content)
    with pytest.raises(UserError) as caught:
        list(read_file(path))
    assert str(caught.value).startswith(sentence)
    assert len(str(caught.value).splitlines()) == 1


def test_a_gzip_file_that_is_none_or_was_cut(folder, write):
    whole = (folder / write("whole.jsonl.gz", ROWS)).read_bytes()
    (folder / "cut.jsonl.gz").write_bytes(whole[:-12])
    (folder / "plain.jsonl.gz").write_text(GOOD)
    for name in ("cut.jsonl.gz", "plain.jsonl.gz"):
        with pytest.raises(UserError, match=f"^{name} is not a whole gzip file: "):
            list(read_file(Path(name)))


def test_rows_before_a_fault_are_given_first(folder, write):
    """Reading is lazy: a stream must not need the whole file to give its first row."""
    reader = read_file(write("a.jsonl", GOOD + "oops\n"))
    assert next(reader).row == ROWS[0]
    with pytest.raises(UserError, match=r"^a.jsonl:2 is not JSON"):
        next(reader)
