"""Which checkpoints count, what happens to the others, and what a metrics file is cut back to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.train.checkpoints import (
    MARKER,
    checkpoint_folders,
    drop_old,
    last_complete,
    mark_complete,
    read_marker,
    set_aside_incomplete,
    truncate_metrics,
)


def write_checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "optimizer.pt").write_bytes(b"moments")
    if complete:
        mark_complete(folder, step=step, world_size=1)
    return folder


def test_the_last_complete_checkpoint_is_the_one_with_most_steps_not_the_last_name(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 100, complete=False)
    found = last_complete(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-10"
    assert list(checkpoint_folders(tmp_path)) == [2, 9, 10, 100]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None
    assert last_complete(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["truncate", "remove", "marker", "empty marker"])
def test_a_checkpoint_counts_only_as_long_as_all_of_it_is_there(tmp_path: Path, damage: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert read_marker(folder) is not None
    if damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"weights")
    elif damage == "remove":
        (folder / "optimizer.pt").unlink()
    elif damage == "marker":
        (folder / MARKER).unlink()
    else:
        (folder / MARKER).write_text("{}")
    assert read_marker(folder) is None
    assert last_complete(tmp_path) is None


def test_incomplete_checkpoints_are_set_aside_under_a_free_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4, complete=False)
    (first,) = set_aside_incomplete(tmp_path)
    write_checkpoint(tmp_path, 4, complete=False)
    (second,) = set_aside_incomplete(tmp_path)
    assert [first.name, second.name] == ["checkpoint-4.incomplete", "checkpoint-4.incomplete-2"]
    assert list(checkpoint_folders(tmp_path)) == [2]
    assert set_aside_incomplete(tmp_path) == []


def test_rotation_keeps_the_newest_complete_ones_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 5, complete=False)
    drop_old(tmp_path, 2, never=str(tmp_path / "checkpoint-1"))
    assert list(checkpoint_folders(tmp_path)) == [1, 3, 4, 5]
    drop_old(tmp_path, 9)
    assert list(checkpoint_folders(tmp_path)) == [1, 3, 4, 5]


def test_metrics_are_cut_back_to_a_step_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 7}) for step in (0, 1, 2, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    truncate_metrics(path, 2)
    assert path.read_text() == "".join(line + "\n" for line in lines[:4])
    truncate_metrics(path, -1)
    assert path.read_text() == ""
    truncate_metrics(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()
