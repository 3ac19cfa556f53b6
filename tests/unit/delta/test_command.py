"""``trimtab delta`` as a function: what it writes and what it shows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests import tiny
from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.delta.command import run
from trimtab.delta.progress import progress_bar
from trimtab.errors import UserError


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=140)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_writes_and_shows(tmp_path: Path, console: Console) -> None:
    base, reference = tiny.write_models(tmp_path)
    run(str(reference), str(base), str(tmp_path / "delta"), top=3, console=console)
    delta = ReferenceDelta.load(tmp_path / "delta")
    text = shown(console)
    largest = sorted(delta.statistics, key=lambda name: -delta.statistics[name].norm)
    assert [name in text for name in largest] == [True] * 3 + [False] * (len(largest) - 3)
    assert f"all ({len(largest) - 3} more not shown)" in text
    assert f"{sum(one.numel for one in delta.statistics.values()):,}" in text
    for identity in (delta.fingerprint, delta.reference.fingerprint, delta.base.fingerprint):
        assert identity in text
    assert str(tmp_path / "delta") in text


def test_added_rows_are_told(tmp_path: Path, console: Console) -> None:
    folders = (
        made.written(made.llama(1, vocab_size=43), tmp_path / "r"),
        made.written(made.llama(0), tmp_path / "b"),
    )
    run(*map(str, folders), str(tmp_path / "delta"), console=console)
    assert "3 rows of lm_head.weight are new in the reference's vocabulary: τ is 0 there" in shown(console)


def test_an_existing_delta_is_refused_before_anything_is_read(tmp_path: Path, console: Console) -> None:
    base, reference = tiny.write_models(tmp_path)
    run(str(reference), str(base), str(tmp_path / "delta"), console=console)
    with pytest.raises(UserError, match="--overwrite"):
        run("nowhere/at-all", str(base), str(tmp_path / "delta"), console=console)
    run(str(reference), str(base), str(tmp_path / "delta"), overwrite=True, console=console)


def test_nothing_is_left_of_a_refused_one(tmp_path: Path, console: Console) -> None:
    base, reference = tiny.write_models(tmp_path)
    made.edited(reference, lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"'model.norm.weight' of the reference .* holds nan"):
        run(str(reference), str(base), str(tmp_path / "delta"), console=console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "reference"]


def test_a_reference_of_zeros_has_no_proportion(tmp_path: Path, console: Console) -> None:
    folders = [made.written(made.llama(seed), tmp_path / str(seed), "1GB") for seed in (1, 0)]
    made.edited(folders[0], lambda t: t["model.norm.weight"].zero_())
    run(*map(str, folders), str(tmp_path / "delta"), top=100, console=console)
    row = next(line for line in shown(console).splitlines() if "model.norm.weight" in line)
    assert "–" in row


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_goes_to_stderr_and_only_to_a_terminal(
    terminal: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))  # rich's switch
    with progress_bar("measuring") as progress:
        progress("a", 1, 3)
        progress("b", 3, 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("measuring" in err, err == "") == (terminal, not terminal)
