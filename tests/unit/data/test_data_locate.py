"""Names become files: folders and their splits, hub ids, and what is said when there is nothing."""

from __future__ import annotations

import datasets
import pytest

from tests.unit.data.conftest import Source, pair
from trimtab.data.locate import is_hub_id, local_files, suffix_of
from trimtab.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    names = [
        "train-00000.jsonl",
        "train-00001.jsonl",
        "test.jsonl",
        "validation.jsonl.gz",
        "README.md",
        ".hidden.jsonl",
    ]
    for name in names:
        write(f"data/{name}", "{}")
    return tmp_path


def names(source, part):
    return [path.name for path in local_files(source, part)]


def test_a_folder_is_split_by_the_words_in_its_names(folder):
    assert names(Source("data"), "train") == ["train-00000.jsonl", "train-00001.jsonl"]
    assert names(Source("data"), "eval") == ["validation.jsonl.gz"]
    assert names(Source("data", split="test"), "eval") == ["test.jsonl"]


def test_a_folder_without_such_words_is_read_whole(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.json", "deep/c.parquet", "dataset_info.json"):
        write(f"data/{name}", "{}")
    for part in ("train", "eval"):
        assert names(Source("data"), part) == ["a.json", "b.jsonl", "c.parquet"]


def test_a_word_is_a_word(tmp_path, monkeypatch, write):
    """``latest.jsonl`` carries no ``test``."""
    monkeypatch.chdir(tmp_path)
    write("data/latest.jsonl", "{}")
    write("data/train.jsonl", "{}")
    assert names(Source("data"), "eval") == ["latest.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            Source("data", split="tset"),
            "folder data has no file of split 'tset'; it has test.jsonl, train-00000.jsonl",
        ),
        (Source("data/README.md"), "data/README.md is no data file that is read here; known kinds: .jsonl"),
        (
            Source("data", subset="en"),
            "data is on this disk, where there are no subsets: leave out subset: en",
        ),
        (Source("data/test.jsonl", split="test"), "data/test.jsonl is one file, which has no splits"),
    ],
)
def test_what_cannot_be_located(folder, source, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        local_files(source, "train")


def test_a_folder_without_data_files(load, write):
    write("data/README.md", "nothing")
    assert load.error("dpo", "data").startswith("folder data has no data files; known kinds: .jsonl, ")


def test_a_missing_file_and_the_nearest_there_is(load, write):
    write("data/train.jsonl", [pair()])
    assert (
        load.error("dpo", "data/trian.jsonl")
        == "there is no 'data/trian.jsonl'; did you mean 'data/train.jsonl'?"
    )
    assert load.error("dpo", "data/other.csv") == (
        "cannot read data from 'data/other.csv': no such file or folder, and it is no hub id"
    )
    assert load.error("dpo", "dta/train.jsonl") == (
        "cannot read data from 'dta/train.jsonl': there is no folder 'dta', and it is no hub id"
    )


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("Anthropic/hh-rlhf", True),
        ("org/name-v0.1", True),
        ("squad", True),
        ("org/data.jsonl", False),
        ("./name", False),
        ("~/name", False),
        ("/abs/name", False),
        ("a/b/c", False),
    ],
)
def test_what_can_be_a_hub_id(name, hub):
    assert is_hub_id(name) is hub


def test_kinds_of_file(tmp_path):
    kinds = {
        "a.JSONL": ".jsonl",
        "a.json.gz": ".json",
        "a.parquet": ".parquet",
        "a.parquet.gz": None,
        "a.txt": None,
    }
    assert {name: suffix_of(tmp_path / name) for name in kinds} == kinds


ROWS = [pair(f"q{number}") for number in range(6)]


def fake_hub(monkeypatch, loaded):
    asked = []

    def load_dataset(path, name=None, split=None, streaming=False):
        asked.append((path, name, split, streaming))
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_and_its_splits(load, monkeypatch):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    asked = fake_hub(monkeypatch, datasets.DatasetDict(splits))
    assert load("dpo", Source("org/name", subset="en")).report.rows == 6
    made = load("dpo", Source("org/name", limit=1), part="eval")
    assert made.report.rows == 1
    assert made.report.sources[0].files == ("org/name[test]",)
    assert asked == [("org/name", "en", None, False), ("org/name", None, None, False)]


def test_a_streamed_hub_dataset(load, monkeypatch):
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    asked = fake_hub(monkeypatch, stream)
    made = load("dpo", Source("org/name", split="train"), streaming=True)
    assert [row["prompt"] for row in made.dataset] == [row["prompt"] for row in ROWS]
    assert asked == [("org/name", None, "train", True)]


def test_a_hub_dataset_without_the_part(load, monkeypatch):
    fake_hub(monkeypatch, datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))
    assert load.error("dpo", "org/name", part="eval") == (
        "org/name has no split for eval: it has train; say which with split:"
    )


def test_a_hub_dataset_that_does_not_exist(load, monkeypatch):
    missing = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'org/name' doesn't exist on the Hub.\nMore text."
    )
    fake_hub(monkeypatch, missing)
    assert load.error("dpo", "org/name") == (
        "'org/name' is no file or folder here, and as a hub dataset it cannot be loaded: "
        "Dataset 'org/name' doesn't exist on the Hub."
    )


def test_a_fault_in_a_hub_dataset_names_the_row(load, monkeypatch):
    rows = [pair(), {**pair(), "chosen": ["a", "b"]}]
    fake_hub(monkeypatch, rows)
    assert load.error("dpo", Source("org/name", split="train")) == (
        "org/name[train], row 2: column 'chosen' holds a list of texts; text is needed"
    )


def test_a_dataset_saved_to_disk(load, tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, validation=one.select([0])).save_to_disk(tmp_path / "many")
    assert load("dpo", "one").report.rows == 6
    assert load("dpo", "many").report.rows == 6
    assert load("dpo", "many", part="eval").report.rows == 1
    assert (
        load.error("dpo", Source("many", split="tset"))
        == "many has no split 'tset'; it has train, validation"
    )
    assert load.error("dpo", Source("one", split="train")).startswith(
        "one is one saved dataset, which has no splits"
    )
