"""What all tests share: no network, and the tiny model's folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budgets import Budgets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the tiny model's base and reference, with tokenizers; do not write there."""
    from tests import tiny

    return tiny.write_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Preference pairs as JSON lines: 24 to train on, 8 held out; do not write there."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("pairs")
    train = tiny.write_rows(folder / "train.jsonl", tiny.preference_rows(24))
    return train, tiny.write_rows(folder / "eval.jsonl", tiny.preference_rows(8, seed=1))


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    """Workers with more threads than cores wait for each other: all later tests take many times as long."""
    before = _threads()
    yield
    after = _threads()
    assert before in (None, after), f"the test left torch with {after} threads and found it with {before}"


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def pytest_configure(config: pytest.Config) -> None:
    """Measure what each suite costs; a run of everything has to stay within the budgets."""
    config.pluginmanager.register(Budgets(), "budgets")
