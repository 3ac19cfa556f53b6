"""The command line as a user runs it, in a folder with two tiny models and preference pairs.

Most cases call :func:`trimtab.cli.main` in this process, which is all of the command but the interpreter's
start: importing TRL costs seconds, and the tests of this folder share one import. Some start real processes.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from trimtab.cli import main

RECIPE: dict[str, Any] = {
    "method": "dpo",
    "reference": "./reference",
    "base": "./base",
    "data": {"train": "pairs.jsonl", "max_length": 64},
    "optimizer": {"name": "ondare", "lr": 1e-4},
    "training": {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none"},
    "output": "run",
}


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence a mistake is said in; anything more on the error stream fails."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"not one line but {lines}"
        return self.last_sentence

    @property
    def last_sentence(self) -> str:
        """The sentence after what a training said while it went well."""
        assert "Traceback" not in self.err
        *before, last = self.err.splitlines()
        assert not any(line.startswith("trimtab:") for line in before)
        assert last.startswith("trimtab: error: ")
        return last.removeprefix("trimtab: error: ")


@dataclass
class Place:
    """The current folder of a test."""

    folder: Path

    def recipe(self, changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> str:
        """Write the recipe with dotted keys set (``...`` removes one) and return its file's name."""
        values = copy.deepcopy(RECIPE)
        for dotted, value in (changes or {}).items():
            *parents, last = dotted.split(".")
            here = values
            for parent in parents:
                here = here.setdefault(parent, {})
            if value is ...:
                del here[last]
            else:
                here[last] = value
        (self.folder / name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return name

    def files(self) -> dict[str, int]:
        """Every path below the folder, hidden ones too, and the sizes of the files."""
        return {
            str(path.relative_to(self.folder)): path.stat().st_size if path.is_file() else 0
            for path in self.folder.rglob("*")
        }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``reference``."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_models(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An own current folder with links to the models, pairs, and an own folder for temporary files."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "reference"):
        (tmp_path / name).symlink_to(models / name)
    tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(24))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return Place(tmp_path)


@pytest.fixture
def trimtab(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line in this process."""

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        code = main(arguments)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "trimtab", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


def run_process(*arguments: str, **environment: str) -> Result:
    """Run the command in a process of its own."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def refused(result: Result, expected: Sequence[str], *, started: bool = False) -> None:
    """The command refused in one sentence that has these words in it, in this order.

    Where training has ``started``, what it said until then (the data it read) stands before the sentence.
    """
    assert result.code == 2, result.err
    sentence = result.last_sentence if started else result.sentence
    position = 0
    for words in expected:
        found = sentence.find(words, position)
        assert found >= 0, f"{words!r} is not in {sentence!r} (after character {position})"
        position = found + len(words)
