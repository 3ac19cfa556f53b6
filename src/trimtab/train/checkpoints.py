"""Checkpoints that count: a marker written last, and what a run does with the others when it resumes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trimtab.files import write_json, write_text

MARKER = "trimtab.json"
"""The file that makes a checkpoint folder count. It is written last, by rename, and lists the other files."""

_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: Path, *, step: int, world_size: int) -> None:
    """Declare a checkpoint complete: sync its files to the disk, then write the marker by rename.

    Args:
        folder: the ``checkpoint-N`` folder, with everything in it.
        step: N, the number of optimizer steps done.
        world_size: number of processes that wrote it; each has its own random state in the folder.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MARKER, None)
    for path in files.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_json(folder / MARKER, {"step": step, "world_size": world_size, "files": sizes})


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Return the marker of a complete checkpoint, or None where it or a part of a listed file is missing."""
    try:
        marker: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return marker if whole else None


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """Return every ``checkpoint-N`` folder of a run by its step, complete or not, in order."""
    found = {int(name[1]): path for path in run.glob("checkpoint-*") if (name := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def last_complete(run: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None.

    Examples:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> for step in (2, 10, 30):
        ...     (run / f"checkpoint-{step}").mkdir()
        >>> for step in (2, 10):
        ...     mark_complete(run / f"checkpoint-{step}", step=step, world_size=1)
        >>> last_complete(run).name
        'checkpoint-10'
    """
    complete = [path for path in checkpoint_folders(run).values() if read_marker(path)]
    return complete[-1] if complete else None


def set_aside_incomplete(run: Path) -> list[Path]:
    """Rename checkpoints without a valid marker to ``checkpoint-N.incomplete``; return the new paths."""
    moved = []
    for path in checkpoint_folders(run).values():
        if read_marker(path) is None:
            aside = _free_name(path.with_name(f"{path.name}.incomplete"))
            path.rename(aside)
            moved.append(aside)
    return moved


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def drop_old(run: Path, keep: int, *, never: str | None = None) -> None:
    """Delete all but the last ``keep`` complete checkpoints; ``never`` is the path of one that must stay.

    The Trainer's own rotation deletes the old checkpoint before the new one is complete; a run killed in
    between would be left with none.
    """
    complete = [path for path in checkpoint_folders(run).values() if read_marker(path)]
    for path in complete[: max(0, len(complete) - keep)]:
        if never is None or path.resolve() != Path(never).resolve():
            (path / MARKER).unlink()  # first: half a deleted checkpoint must not count
            shutil.rmtree(path)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to ``step``; what was logged after it will be logged again.

    A last line that was cut off by the kill is dropped.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
