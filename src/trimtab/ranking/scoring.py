"""What both commands share: scoring prompt by prompt with a progress bar, and where the result may go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.rewards import Reward
from trimtab.terminal import progress_bar

CHUNK = 32
"""Prompts that are scored at once."""


@dataclass(frozen=True)
class Group:
    """A prompt with responses, and the row of the data that each is from."""

    prompt: Any
    responses: Sequence[str]
    rows: Sequence[dict[str, Any]]


def score_groups(reward: Reward, groups: Sequence[Group]) -> list[list[float]]:
    """Return the scores of each group's responses."""
    found: list[list[float]] = []
    with progress_bar(f"scoring with {reward.name}", len(groups)) as advance:
        for first in range(0, len(groups), CHUNK):
            chunk = groups[first : first + CHUNK]
            found += _scored(reward, chunk)
            advance(len(chunk))
    return found


def _scored(reward: Reward, groups: Sequence[Group]) -> Iterator[list[float]]:
    scores = iter(
        reward(
            [group.prompt for group in groups for _ in group.responses],
            [text for group in groups for text in group.responses],
            [row for group in groups for row in group.rows],
        )
    )
    return ([next(scores) for _ in group.responses] for group in groups)


def checked_target(out: str, suffix: str, inputs: Sequence[str], overwrite: bool) -> Path:
    """Return the path of a file that may be written.

    Raises:
        UserError: if its name ends otherwise, it is there and is not to be replaced, or it is read.
    """
    target = Path(out).expanduser()
    if target.suffix != suffix:
        raise UserError(f"--out {out!r} must end in {suffix}, which says what is written there")
    if target.is_dir():
        raise UserError(f"--out {out!r} is a folder; name a file in it")
    if target.exists() and any(Path(path).exists() and target.samefile(path) for path in inputs):
        raise UserError(f"--out {out!r} is one of the files that are read; name another")
    if target.exists() and not overwrite:
        raise UserError(f"--out {out!r} is there already; name another file, or replace it with --overwrite")
    return target
