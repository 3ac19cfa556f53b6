"""The shipped models, loaded once per session and never changed, and one thread as in the quickstart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.lab import checkpoints

SEED = 1


@pytest.fixture(scope="session")
def shipped_sft() -> PreTrainedModel:
    """The SFT model of one seed."""
    return checkpoints.load(SEED, "sft")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
