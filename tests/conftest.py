"""What all tests share: no network, and the tiny model's folders."""

from __future__ import annotations

import os
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


def pytest_configure(config: pytest.Config) -> None:
    """Measure what each suite costs; a run of everything has to stay within the budgets."""
    config.pluginmanager.register(Budgets(), "budgets")
