"""A merge that was interrupted: what is kept, and which merge goes on from there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.merge import made
from tests.unit.merge.place import SHAPES, Place
from trimtab.errors import UserError
from trimtab.merge import merge, run
from trimtab.merge.config import read_config


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Stopped:
    """Ctrl-C while the second file is computed; later merges count what they compute."""

    def __init__(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.work = place, place.folder / ".out.merging"
        self.prepared: list[str] = []
        prepare = run.Runner._prepared

        def counted(runner: run.Runner, number: int) -> Any:
            self.prepared.append(runner._plans[0].outputs[number].entry.key)
            return prepare(runner, number)

        def interrupted(runner: run.Runner, number: int) -> Any:
            if len(self.prepared) == 2:  # two tensors of 64 bytes, then one of the second file
                raise KeyboardInterrupt
            return counted(runner, number)

        monkeypatch.setattr(run.Runner, "_prepared", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            place.merged(place.values(), shard_size=200)
        self.notes = caught.value.__notes__
        monkeypatch.setattr(run.Runner, "_prepared", counted)

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.work.iterdir())


@pytest.fixture
def stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    return Stopped(place, monkeypatch)


FIRST = "model-00001-of-00002.safetensors"


def test_after_ctrl_c_complete_files_are_kept_beside_out(place: Place, stopped: Stopped) -> None:
    assert not (place.folder / "out").exists()
    assert stopped.kept() == ["merging.json", "merging.lock", FIRST]
    assert stopped.notes == ["1 of 2 files are kept, and the same command goes on from there"]


def test_the_same_merge_goes_on_from_there(place: Place, stopped: Stopped, tmp_path: Path) -> None:
    before = (stopped.work / FIRST).stat().st_mtime_ns
    (stopped.work / "torn.tmp").write_text("half")
    (stopped.work / "additional_chat_templates").mkdir()  # transformers makes it, after the weights
    stopped.prepared.clear()
    resumed = place.merged(place.values(), shard_size=200)
    out = place.folder / "out"
    assert stopped.prepared == ["model.layers.1.w", "model.norm.weight"]
    assert (out / FIRST).stat().st_mtime_ns == before
    assert not stopped.work.exists()
    assert not {"torn.tmp", "merging.json", "additional_chat_templates"} & {
        path.name for path in out.iterdir()
    }
    whole = merge(read_config(place.values()), tmp_path / "whole" / "out", shard_size=200)
    assert made.files_in(whole) == made.files_in(out)
    for file in made.files_in(whole):
        assert (whole / file).read_bytes() == (out / file).read_bytes(), file
    assert sorted(resumed) == sorted(SHAPES)


def changed_density(place: Place) -> dict[str, Any]:
    values = place.values()
    values["models"][0]["parameters"]["density"] = 0.4
    return values


def changed_model(place: Place) -> dict[str, Any]:
    place.tensors["one"] = made.moved(place.tensors["base"], 9)
    place.write("one")
    return place.values()


@pytest.mark.parametrize("change", [changed_density, changed_model])
def test_another_merge_does_not_go_on_from_there(
    place: Place, stopped: Stopped, change: Callable[[Place], dict[str, Any]]
) -> None:
    stopped.prepared.clear()
    place.merged(change(place), shard_size=200)
    assert len(stopped.prepared) == 4
    assert not stopped.work.exists()


def test_another_version_does_not_go_on_from_there(
    place: Place, stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers may be others."""
    monkeypatch.setattr(run, "__version__", "0.0.0")
    stopped.prepared.clear()
    place.merged(place.values(), shard_size=200)
    assert len(stopped.prepared) == 4


def test_after_ctrl_c_at_the_very_end_nothing_is_computed_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run.write_surroundings

    def interrupted(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_surroundings", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        place.merged(place.values(), shard_size=200)
    assert caught.value.__notes__ == ["2 of 2 files are kept, and the same command goes on from there"]
    monkeypatch.undo()
    monkeypatch.setattr(run.Runner, "write", None)
    assert sorted(place.merged(place.values(), shard_size=200)) == sorted(SHAPES)


def test_other_files_are_other_remains(place: Place, stopped: Stopped) -> None:
    stopped.prepared.clear()
    place.merged(place.values(), shard_size=130)
    assert len(stopped.prepared) == 4


def test_an_error_in_the_second_run_removes_the_remains(
    place: Place, stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(runner: run.Runner, number: int) -> Any:
        raise UserError("no")

    monkeypatch.setattr(run.Runner, "_prepared", failing)
    assert stopped.work.is_dir()
    with pytest.raises(UserError, match="no"):
        place.merged(place.values(), shard_size=200)
    assert not stopped.work.exists()


def test_ctrl_c_in_the_first_file_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(runner: run.Runner, number: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Runner, "_prepared", interrupted)
    before = made.files_in(place.folder)
    with pytest.raises(KeyboardInterrupt) as caught:
        place.merged(place.values(), shard_size=200)
    assert not hasattr(caught.value, "__notes__")
    assert made.files_in(place.folder) == before


def test_two_merges_do_not_write_one_folder(place: Place) -> None:
    fcntl = pytest.importorskip("fcntl")
    work = place.folder / ".out.merging"
    work.mkdir()
    with (work / "merging.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another merge is writing .*out; wait for it"):
            place.merged(place.values())
        assert work.is_dir(), "it is the other's"
    place.merged(place.values())
    assert not work.exists()


def test_a_damaged_file_is_not_kept(place: Place, stopped: Stopped, tmp_path: Path) -> None:
    (stopped.work / FIRST).write_bytes((stopped.work / FIRST).read_bytes()[:100])
    again = place.merged(place.values(), shard_size=200)
    whole = made.merged(tmp_path / "whole", place.values(), shard_size=200)
    assert again.keys() == whole.keys()
    assert all(again[name].equal(whole[name]) for name in whole)


def test_a_model_that_was_written_anew_is_read_anew(place: Place, stopped: Stopped) -> None:
    weights = place.folder / "base" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    place.merged(place.values(), shard_size=200)
    assert len(set(stopped.prepared)) == len(stopped.prepared) - 2, "the first file's tensors, twice"


def test_what_appears_during_a_merge_is_left_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write = run.Runner.write

    def late(runner: run.Runner, *given: Any) -> None:
        write(runner, *given)
        (place.folder / "out").mkdir()
        (place.folder / "out" / "notes.txt").write_text("mine")

    monkeypatch.setattr(run.Runner, "write", late)
    with pytest.raises(UserError, match="out is there already") as caught:
        place.merged(place.values())
    assert caught.value.__notes__ == ["1 of 1 files are kept, and the same command goes on from there"]
    assert (place.folder / "out" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_named(place: Place) -> None:
    (place.folder / ".out.merging").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.merging is in the way"):
        place.merged(place.values())
    assert (place.folder / ".out.merging").read_text() == "mine"
