"""``trimtab merge`` as a user runs it: what it says, what it refuses, and how it goes on after Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Place, Result, refused, run_process
from tests.cli.test_cli_commands import HEAVY
from trimtab.merge import writer

pytestmark = pytest.mark.xdist_group("cli")

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "reference", "parameters": {"weight": 1, "density": 0.3}}],
}
Run = Callable[..., Result]


def config(place: Place, name: str = "merge.yaml", **changes: Any) -> str:
    """Write a configuration and return its file's name; ``...`` removes a key."""
    values = {key: value for key, value in {**TIES, **changes}.items() if value is not ...}
    (place.folder / name).write_text(yaml.safe_dump(values, sort_keys=False))
    return name


def changed_model(place: Place, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """A copy of the reference with changed tensors."""
    shutil.copytree(place.folder / "reference", place.folder / name)
    file = place.folder / name / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# what it does


def test_it_merges_and_says_where_the_result_is(place: Place, trimtab: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = trimtab("merge", config(place), "merged")
    assert (result.code, result.err) == (0, "")
    assert result.out == "0.000 GB in 20 tensors: merged\n"
    model = AutoModelForCausalLM.from_pretrained("merged")
    reference = load_file("reference/model.safetensors")
    base = load_file("base/model.safetensors")
    total = changed = 0
    for name, value in model.named_parameters():
        same = value == base[name]
        total, changed = total + same.numel(), changed + int((~same).sum())
        torch.testing.assert_close(value[~same].detach(), reference[name][~same], rtol=1e-5, atol=1e-6)
    assert changed == pytest.approx(0.3 * total, abs=10)  # some are rounded away
    assert AutoTokenizer.from_pretrained("merged").chat_template
    assert sorted(path.name for path in place.folder.iterdir()) == sorted(
        ["base", "merge.yaml", "merged", "pairs.jsonl", "reference", "temporary"]
    )


def test_a_dry_run_shows_what_it_would_do_and_writes_nothing(place: Place, trimtab: Run) -> None:
    name = config(place, parameters={"int8_mask": True})
    before = place.files()
    result = trimtab("merge", name, "merged", "--dry-run")
    assert (result.code, result.err) == (0, "")
    for words in ("note:", "int8_mask", "ties, fidelity paper", "2306.01708", "reads", "writes", "takes"):
        assert words in result.out
    assert "20 tensors (float32)" in result.out
    assert place.files() == before


def test_files_have_the_size_that_was_asked_for(place: Place, trimtab: Run) -> None:
    assert trimtab("merge", config(place), "merged", "--shard-size", "30KB").code == 0
    files = list(Path("merged").glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 35_000 for file in files)
    assert json.loads(Path("merged/model.safetensors.index.json").read_text())["weight_map"]


def test_overwrite(place: Place, trimtab: Run) -> None:
    assert trimtab("merge", config(place), "merged").code == 0
    refused(trimtab("merge", config(place), "merged"), ["merged is there already", "--overwrite"])
    other = config(place, "other.yaml", merge_method="task_arithmetic")
    assert trimtab("merge", other, "merged", "--overwrite").code == 0
    assert "task_arithmetic" in Path("merged/merge.yaml").read_text()


def test_help_loads_nothing_heavy_and_a_configuration_is_checked_without_torch(place: Place) -> None:
    name = config(place, merge_method="tise")
    code = (
        "import sys\nfrom trimtab.cli import main\n"
        "assert main(['merge', '--help']) == 0\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
        "from trimtab.errors import UserError\nfrom trimtab.merge.config import load_config\n"
        f"try: load_config({name!r})\nexcept UserError as error: print(error)\n"
        "print('heavy:', [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, last = done.stdout.rstrip().splitlines()
    assert "heavy: []" in said
    assert "ties?" in said[-1]
    assert last == "heavy: []"


# what it refuses

Prepare = Callable[[Place], Any]


def without(names: int) -> Prepare:
    def prepare(place: Place) -> None:
        changed_model(place, "broken", lambda t: [t.pop(key) for key in sorted(t)[:names]])

    return prepare


def wider(place: Place) -> None:
    changed_model(place, "broken", lambda t: t.update({"model.norm.weight": torch.ones(33)}))


def not_finite(value: float) -> Prepare:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    return lambda place: changed_model(place, "broken", change)


def other_architecture(place: Place) -> None:
    shutil.copytree(place.folder / "reference", place.folder / "broken")
    file = place.folder / "broken" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"mistral"'))


def the_base_again(place: Place) -> None:
    shutil.copytree(place.folder / "base", place.folder / "broken")


def pickled(place: Place) -> None:
    shutil.copytree(place.folder / "reference", place.folder / "broken")
    (place.folder / "broken" / "model.safetensors").unlink()
    (place.folder / "broken" / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def counting(*last: int) -> Prepare:
    """Models with a buffer of whole numbers, the last of which is another one in each."""

    def prepare(place: Place) -> None:
        for name, value in zip(("broken", "other"), last, strict=True):
            ids = torch.tensor([0, 1, value])
            changed_model(place, name, lambda t, ids=ids: t.update({"position_ids": ids}))  # type: ignore[misc]

    return prepare


def copied(place: Place) -> None:
    changed_model(place, "broken", lambda tensors: None)


def in_fp16(place: Place) -> None:
    changed_model(place, "broken", lambda t: t.update({name: value.half() for name, value in t.items()}))


def nothing(place: Place) -> None:
    """No preparation."""


def a_file(name: str) -> Prepare:
    def prepare(place: Place) -> None:
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).write_text("notes")

    return prepare


BROKEN = [{"model": "broken", "parameters": {"weight": 1, "density": 0.5}}]
TWO = [{"model": name, "parameters": {"weight": 1}} for name in ("broken", "other")]
HEAVY_WEIGHT = [{"model": name, "parameters": {"weight": 1e9}} for name in ("broken",)]

MERGES: dict[str, tuple[Prepare, dict[str, Any], list[str], list[str]]] = {
    # what was prepared, the configuration's changes, the arguments after it, words of the sentence in order
    "missing tensors": (
        without(6),
        {"models": BROKEN},
        ["out"],
        ["do not have the same tensors as base", "allow_partial", "6 missing (", "in broken", "…)"],
    ),
    "mismatched tensors": (
        wider,
        {"models": BROKEN},
        ["out"],
        ["1 mismatched (model.norm.weight (33 in broken, 32 expected))"],
    ),
    "other architecture": (
        other_architecture,
        {"models": BROKEN},
        ["out"],
        ["base is of model_type 'llama'", "broken of 'mistral'"],
    ),
    "NaN": (
        not_finite(float("nan")),
        {"models": BROKEN},
        ["out"],
        ["'model.norm.weight' of broken", "nan"],
    ),
    "infinity in a sum": (
        not_finite(float("inf")),
        {"merge_method": "linear", "base_model": ..., "models": BROKEN[:0] + TWO[:1]},
        ["out"],
        ["'model.norm.weight' of broken", "inf"],
    ),
    "the base once more": (the_base_again, {"models": BROKEN}, ["out"], ["broken equals the base base"]),
    "too large for fp16": (
        in_fp16,
        {
            "models": HEAVY_WEIGHT,
            "merge_method": "linear",
            "base_model": ...,
            "parameters": {"normalize": False},
        },
        ["out"],
        ["merging '", "float16"],
    ),
    "pickles": (
        pickled,
        {"models": BROKEN},
        ["out"],
        ["broken holds pickled weights", "pytorch_model.bin", 'python -c "', "save_pretrained("],
    ),
    "other whole numbers": (
        counting(2, 3),
        {"merge_method": "linear", "base_model": ..., "models": TWO},
        ["out"],
        ["'position_ids' holds whole numbers", "differ between broken and other"],
    ),
    "no such model": (nothing, {"base_model": "nowhere"}, ["out"], ["'nowhere'"]),
    "an unknown key": (
        nothing,
        {"allow_partail": True},
        ["out"],
        ["merge.yaml", "allow_partail", "allow_partial?"],
    ),
    "mergekit's own method": (nothing, {"merge_method": "della"}, ["out"], ["merge.yaml", "della"]),
    "an output that is a model that is read": (
        copied,
        {"models": BROKEN},
        ["broken"],
        ["broken is there already"],
    ),
    "the same, to be replaced": (
        copied,
        {"models": BROKEN},
        ["broken", "--overwrite"],
        ["broken is, or holds, the model broken"],
    ),
    "an output that is a link": (nothing, {}, ["base", "--overwrite"], ["base is a link"]),
    "the current folder": (nothing, {}, [".", "--overwrite"], [". is, or holds, the current folder"]),
    "an output that is a file": (a_file("out"), {}, ["out"], ["out is a file; name a folder"]),
    "an output below a file": (nothing, {}, ["pairs.jsonl/out"], ["pairs.jsonl is a file; name a folder"]),
    "an output that is no model": (
        a_file("out/notes.txt"),
        {},
        ["out", "--overwrite"],
        ["out holds no model"],
    ),
    "an impossible size": (
        nothing,
        {},
        ["out", "--shard-size", "large"],
        ["--shard-size 'large' is no size"],
    ),
    "no size at all": (nothing, {}, ["out", "--shard-size", "0GB"], ["--shard-size '0GB' is no size"]),
    "an unknown option": (nothing, {}, ["out", "--overwite"], ["--overwite", "--overwrite?"]),
    "no output": (nothing, {}, [], ["OUT", "trimtab merge --help"]),
}


FOUND_LATE = (
    "NaN",
    "infinity in a sum",
    "the base once more",
    "too large for fp16",
    "other whole numbers",
)
"""Found where the weights are read, which a dry run does not do."""
RUNS = [(name, dry) for name in MERGES for dry in (False, True) if not (dry and name in FOUND_LATE)]


@pytest.mark.parametrize(("name", "dry"), RUNS)
def test_a_merge_that_cannot_be(name: str, dry: bool, place: Place, trimtab: Run) -> None:
    prepare, changes, arguments, words = MERGES[name]
    prepare(place)
    file = config(place, **changes)
    before = place.files()
    result = trimtab("merge", file, *arguments, *(["--dry-run"] if dry and arguments else []))
    refused(result, words)
    assert result.out == ""
    assert place.files() == before, "something was left behind"


FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["merge.yaml"]),
    "empty": (b"", ["merge.yaml is empty"]),
    "tab": (b"merge_method: ties\nmodels:\n\t- model: a\n", ["merge.yaml is not YAML: line 3", "tab"]),
    "unclosed": (b"models: [a, b\n", ["merge.yaml is not YAML"]),
    "no mapping": (b"- a\n", ["merge.yaml holds a list"]),
    "latin-1": ("base_model: caf\xe9".encode("latin-1"), ["merge.yaml is not UTF-8"]),
    "a binary file": (bytes(range(256)), ["merge.yaml is not"]),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_configuration(
    content: bytes | None, words: list[str], place: Place, trimtab: Run
) -> None:
    if content is not None:
        (place.folder / "merge.yaml").write_bytes(content)
    before = place.files()
    refused(trimtab("merge", "merge.yaml", "out"), words)
    assert place.files() == before


def test_all_that_is_wrong_in_a_configuration_is_told_at_once(place: Place, trimtab: Run) -> None:
    file = config(place, seed=1, models=[{"model": "reference", "parameters": {"wieght": 1}}])
    result = trimtab("merge", file, "out")
    assert result.code == 2
    assert "Traceback" not in result.err
    first, *rest = result.err.splitlines()
    assert first.startswith("trimtab: error: merge.yaml: ")
    assert len(rest) >= 2
    assert any("line 7: seed" in line for line in rest)
    assert any("models.0.parameters.wieght" in line for line in rest)


def test_a_disk_that_is_too_small(place: Place, trimtab: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    file = config(place)
    before = place.files()
    for arguments in ([], ["--dry-run"]):
        refused(trimtab("merge", file, "out", *arguments), ["the merge needs", "GB are free"])
    assert place.files() == before


def test_a_disk_that_fills_up(place: Place, trimtab: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write, files = writer.ShardWriter.write, set()

    def full(self: writer.ShardWriter, values: torch.Tensor) -> None:
        files.add(self._path)
        if len(files) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, values)

    monkeypatch.setattr(writer.ShardWriter, "write", full)
    file = config(place)
    before = place.files()
    refused(
        trimtab("merge", file, "out", "--shard-size", "30KB"),
        ["there is no space left on the disk", "free some"],
    )
    assert place.files() == before


# interrupted

WAITING = """
import signal, sys
from trimtab.cli import main
from trimtab.merge import run
prepare, shards = run.Runner.write, []
def write(self, folders, shard):
    shards.append(shard)
    if len(shards) == 2:
        inner = self._prepared
        def stop(number):
            print("in the second file", flush=True)
            signal.pause()
        self._prepared = stop
    prepare(self, folders, shard)
run.Runner.write = write
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command line, and waits in the second file until it is stopped."""


def stopped_by(which: signal.Signals, *arguments: str) -> Result:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the second file\n"
    process.send_signal(which)
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


@pytest.mark.skipif(not hasattr(signal, "pause"), reason="this system has no signals to wait for")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_it_was_stopped(
    which: signal.Signals, place: Place, trimtab: Run
) -> None:
    command = ("merge", config(place), "out", "--shard-size", "30KB")
    result = stopped_by(which, *command)
    kept = "of 3 files are kept, and the same command goes on from there"
    if which == signal.SIGINT:
        assert (result.code, result.err) == (130, f"trimtab: stopped by Ctrl-C; 1 {kept}\n")
    elif which == signal.SIGTERM:
        assert (result.code, result.err) == (143, f"trimtab: stopped by SIGTERM; 1 {kept}\n")
    else:
        assert result.code == -signal.SIGKILL
    assert not Path("out").exists()
    first = Path(".out.merging/model-00001-of-00003.safetensors")
    complete = [path.name for path in Path(".out.merging").glob("model-*")]
    assert complete == [first.name]
    before = first.stat().st_mtime_ns
    again = run_process(*command) if which == signal.SIGKILL else trimtab(*command)
    assert (again.code, again.err) == (0, "")
    assert Path("out", first.name).stat().st_mtime_ns == before
    assert not Path(".out.merging").exists()
    assert trimtab("merge", "merge.yaml", "whole/out", "--shard-size", "30KB").code == 0
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == sorted(path.name for path in Path("whole/out").iterdir())
    for name in names:
        assert Path("out", name).read_bytes() == Path("whole/out", name).read_bytes(), name
