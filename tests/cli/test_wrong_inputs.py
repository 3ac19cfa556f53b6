"""Wrong inputs through the real command: the exit code, one clear sentence, and nothing half-written.

Each case says what a user did and which words the sentence must have, in order: what is wrong, where, what
would be right.
"""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cli.conftest import Place, refused, run_process, start

pytestmark = pytest.mark.xdist_group("cli")  # one worker: what costs is importing TRL

Prepare = Callable[[Place], Any]


def nothing(place: Place) -> None:
    """No preparation."""


def copy_model(place: Place, name: str, target: str) -> Path:
    shutil.copytree(place.folder / name, place.folder / target)
    return place.folder / target


def truncate(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def truncated_model(place: Place) -> None:
    truncate(copy_model(place, "reference", "broken") / "model.safetensors", 100)


def pickled_model(place: Place) -> None:
    folder = copy_model(place, "reference", "broken")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def other_model(place: Place, **config: Any) -> None:
    tiny.model(3, **config).save_pretrained(place.folder / "broken")
    tiny.tokenizer().save_pretrained(place.folder / "broken")


def wider_model(place: Place) -> None:
    other_model(place, hidden_size=48)


def deeper_model(place: Place) -> None:
    other_model(place, num_hidden_layers=3)


def nan_model(place: Place) -> None:
    model = tiny.model(0)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(place.folder / "broken")
    tiny.tokenizer().save_pretrained(place.folder / "broken")


def model_without(what: str) -> Prepare:
    def prepare(place: Place) -> None:
        folder = copy_model(place, "reference", "broken")
        if what == "chat template":
            shutil.rmtree(folder)
            tiny.model(0).save_pretrained(folder)
            tiny.tokenizer(chat_template=None).save_pretrained(folder)
        if what == "tokenizer":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        if what == "config":
            (folder / "config.json").unlink()

    return prepare


def rows(change: Callable[[list[str]], Any]) -> Prepare:
    """Rewrite ``pairs.jsonl``'s lines as ``rows.jsonl``."""

    def prepare(place: Place) -> None:
        lines = (place.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        result = change(lines)
        text = result if isinstance(result, bytes) else "".join(f"{line}\n" for line in result).encode()
        (place.folder / "rows.jsonl").write_bytes(text)

    return prepare


def line_17(text: str) -> Prepare:
    return rows(lambda lines: [*lines[:16], text, *lines[17:]])


def cut_gzip(place: Place) -> None:
    packed = gzip.compress((place.folder / "pairs.jsonl").read_bytes())
    (place.folder / "rows.jsonl.gz").write_bytes(packed[:-20])


def a_file(name: str, content: bytes = b"not what you think\n") -> Prepare:
    def prepare(place: Place) -> None:
        (place.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / name).write_bytes(content)

    return prepare


def a_delta(spoil: Callable[[Path], Any] = lambda folder: None) -> Prepare:
    def prepare(place: Place) -> None:
        from trimtab.delta import ReferenceDelta

        ReferenceDelta.between(reference="reference", base="base").save("tau")
        spoil(place.folder / "tau")

    return prepare


DELTA = {"base": ..., "delta": "tau"}

RECIPES: dict[str, tuple[Prepare, dict[str, Any], list[str]]] = {
    # What the recipe says
    "unknown key": (
        nothing,
        {"optimizer.merge_wieght": 1},
        ["line", "merge_wieght", "optimizer.merge_weight?"],
    ),
    "wrong type": (nothing, {"loss.beta": "strong"}, ["line", "loss.beta must be a number, not 'strong'"]),
    "unknown training field": (
        nothing,
        {"training.per_device_train_batchsize": 8},
        [
            "training.per_device_train_batchsize is not a field of DPOConfig",
            "training.per_device_train_batch_size?",
        ],
    ),
    "training field of another type": (
        nothing,
        {"training.max_steps": "many"},
        ["training.max_steps", "'many'"],
    ),
    "training field that the recipe owns": (
        nothing,
        {"training.learning_rate": 1e-5},
        ["training.learning_rate", "optimizer.lr"],
    ),
    "contradicting training fields": (
        nothing,
        {"training.bf16": True, "training.fp16": True},
        ["training", "fp16", "bf16"],
    ),
    "unknown tracker": (
        nothing,
        {"training.report_to": "tensorbord"},
        ["training.report_to", "'tensorboard'?"],
    ),
    "tracker that is not installed": (
        nothing,
        {"training.report_to": ["codecarbon"]},
        ["training.report_to names codecarbon, which is not installed"],
    ),
    "no rows at a time": (
        nothing,
        {"training.per_device_train_batch_size": 0},
        ["training.per_device_train_batch_size must be at least 1, not 0"],
    ),
    "unknown method": (nothing, {"method": "raft"}, ["method 'raft' is not known; known: sft, dpo"]),
    "share above 1": (
        nothing,
        {"optimizer.merge_weight": 2},
        ["optimizer.merge_weight must be at most 1, not 2"],
    ),
    "two sources of the delta": (a_delta(), {"delta": "tau"}, ["delta and base are both given"]),
    "no source of the delta": (nothing, {"base": ...}, ["base is missing", "trimtab delta"]),
    "group that finds nothing": (
        nothing,
        {"optimizer.groups": [{"pattern": "layers.9", "lr": 0}]},
        ["optimizer.groups.0.pattern 'layers.9' finds none", "model."],
    ),
    # Models
    "missing model": (nothing, {"reference": "./nowhere"}, ["reference './nowhere' does not exist"]),
    "hub id that cannot be had": (nothing, {"reference": "org/none"}, ["'org/none'", "hub"]),
    "truncated safetensors": (
        truncated_model,
        {"reference": "./broken"},
        ["reference", "model.safetensors", "bytes"],
    ),
    "pickled checkpoint": (
        pickled_model,
        {"reference": "./broken"},
        ["reference 'broken'", "pytorch_model.bin", "safetensors"],
    ),
    "no config": (model_without("config"), {"base": "./broken"}, ["base 'broken' has no config.json"]),
    "no tokenizer": (model_without("tokenizer"), {"reference": "./broken"}, ["broken", "tokenizer", "save"]),
    "no chat template": (
        model_without("chat template"),
        {"reference": "./broken"},
        ["pairs.jsonl", "broken", "chat template"],
    ),
    "mismatched base": (wider_model, {"base": "./broken"}, ["base './broken'", "reference", "mismatched"]),
    "base with fewer layers": (
        deeper_model,
        {"reference": "./broken"},
        ["base './base'", "missing", "layers.2"],
    ),
    "NaN in the base": (nan_model, {"base": "./broken"}, ["model.norm.weight", "base './broken'", "nan"]),
    "policy that is not the reference": (
        nothing,
        {"model": "./base"},
        ["policy differs", "reference './reference'", "policy_differs"],
    ),
    # Deltas
    "truncated delta": (
        a_delta(lambda folder: truncate(folder / "delta.safetensors", 10)),
        DELTA,
        ["tau/delta.safetensors", "whole"],
    ),
    "delta with a broken record": (
        a_delta(lambda folder: (folder / "delta.json").write_text("{")),
        DELTA,
        ["tau/delta.json", "JSON"],
    ),
    "delta of another reference": (a_delta(), {**DELTA, "reference": "./base"}, ["differs", "reference"]),
    "folder that is no delta": (
        nothing,
        {"base": ..., "delta": "reference"},
        ["delta 'reference'", "trimtab delta"],
    ),
    # Data
    "missing data": (
        nothing,
        {"data.train": "nowhere.jsonl"},
        ["data.train 'nowhere.jsonl' does not exist"],
    ),
    "empty data": (a_file("rows.jsonl", b""), {"data.train": "rows.jsonl"}, ["rows.jsonl is empty"]),
    "wrong JSON on line 17": (
        line_17('{"prompt": "a", "chosen": }'),
        {"data.train": "rows.jsonl"},
        ["rows.jsonl:17 is not JSON"],
    ),
    "a list on line 17": (line_17("[1, 2]"), {"data.train": "rows.jsonl"}, ["rows.jsonl:17"]),
    "a number for an answer on line 17": (
        line_17('{"prompt": "a", "chosen": 5, "rejected": "b"}'),
        {"data.train": "rows.jsonl"},
        ["rows.jsonl:17", "chosen"],
    ),
    "missing column": (
        rows(lambda lines: [line.replace('"rejected"', '"refused"') for line in lines]),
        {"data.train": "rows.jsonl"},
        ["rows.jsonl:1", "'prompt', 'chosen', 'refused'", "rejected"],
    ),
    "text that is not UTF-8": (
        rows(lambda lines: "\n".join(lines).encode("utf-16")),
        {"data.train": "rows.jsonl"},
        ["rows.jsonl", "UTF-8"],
    ),
    "cut gzip": (cut_gzip, {"data.train": "rows.jsonl.gz"}, ["rows.jsonl.gz", "gzip"]),
    "no Parquet": (a_file("rows.parquet"), {"data.train": "rows.parquet"}, ["rows.parquet", "Parquet"]),
    "nothing fits": (nothing, {"data.max_length": 4}, ["data.train", "24", "max_length = 4"]),
    # The output
    "a file where the folder should be": (a_file("run"), {}, ["output 'run' is a file; name a folder"]),
    "a folder that is no run": (
        a_file("run/notes.txt"),
        {},
        ["output 'run'", "recipe.yaml", "name another output"],
    ),
    "an output that is read": (nothing, {"output": "reference/run"}, ["output 'reference/run' lies inside"]),
    "an output with too long a name": (nothing, {"output": "x" * 300}, ["the name", "is too long"]),
}


LATE = (
    "group that finds nothing",
    "NaN in the base",
    "policy that is not the reference",
    "delta of another reference",
)
"""Found at the first step, when the weights are there, after the data was read and counted."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe(name, place, trimtab):
    prepare, changes, words = RECIPES[name]
    prepare(place)
    recipe = place.recipe(changes)
    before = place.files()
    refused(trimtab("train", recipe), words, started=name in LATE)
    assert place.files() == before, "something was left behind"


FILES: dict[str, tuple[bytes | None, list[str], list[str]]] = {
    "missing": (None, [], ["there is no recipe 'recipe.yaml'"]),
    "empty": (b"", [], ["recipe.yaml is empty"]),
    "tab": (b"method: dpo\ndata:\n\ttrain: a\n", [], ["recipe.yaml is not YAML: line 3", "tab", "spaces"]),
    "no mapping": (b"- a\n", [], ["recipe.yaml holds a list"]),
    "latin-1": ("output: caf\xe9".encode("latin-1"), [], ["recipe.yaml is not UTF-8"]),
    "a binary file": (bytes(range(256)), [], ["recipe.yaml is not"]),
    "override without a value": (
        b"method: dpo\n",
        ["optimizer.lr"],
        ["'optimizer.lr' is not an override", "key=value"],
    ),
    "unknown override": (b"seed: 1\n", ["optimizer.rate=1"], ["override 'optimizer.rate=1'"]),
}


@pytest.mark.parametrize(("content", "overrides", "words"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_recipe(content, overrides, words, place, trimtab):
    if content is not None:
        (place.folder / "recipe.yaml").write_bytes(content)
    before = place.files()
    result = trimtab("train", "recipe.yaml", *overrides)
    if len(result.err.splitlines()) > 1:  # all that is missing is said too, a line each
        assert result.code == 2
        assert any(line.startswith(f"  {words[0]}") for line in result.err.splitlines())
    else:
        refused(result, words)
    assert place.files() == before


DELTAS: dict[str, tuple[Prepare, list[str], list[str]]] = {
    "missing base": (nothing, ["reference", "nowhere", "tau"], ["no folder 'nowhere'"]),
    "file for a base": (nothing, ["reference", "pairs.jsonl", "tau"], ["pairs.jsonl is a file"]),
    "the same twice": (nothing, ["base", "base", "tau"], ["both 'base'"]),
    "mismatched base": (wider_model, ["reference", "broken", "tau"], ["base 'broken'", "mismatched"]),
    "truncated safetensors": (truncated_model, ["broken", "base", "tau"], ["model.safetensors", "whole"]),
    "pickled checkpoint": (pickled_model, ["broken", "base", "tau"], ["pytorch_model.bin", "safetensors"]),
    "existing delta": (a_delta(), ["reference", "base", "tau"], ["tau already holds a delta", "--overwrite"]),
    "file in the way": (nothing, ["reference", "base", "pairs.jsonl"], ["pairs.jsonl is a file"]),
    "file above": (
        nothing,
        ["reference", "base", "pairs.jsonl/tau"],
        ["pairs.jsonl is a file; give a folder"],
    ),
    "model in the way": (nothing, ["reference", "base", "base", "--overwrite"], ["base holds other files"]),
}


@pytest.mark.parametrize(("prepare", "arguments", "words"), DELTAS.values(), ids=DELTAS)
def test_a_wrong_delta(prepare, arguments, words, place, trimtab):
    prepare(place)
    reference, base, *rest = arguments
    before = place.files()
    refused(trimtab("delta", "--reference", reference, "--base", base, *rest), words)
    assert place.files() == before


QUICKSTARTS: dict[str, tuple[Prepare, list[str], list[str]]] = {
    "unknown seed": (nothing, ["--seeds", "0", "99"], ["no shipped model for seed 99", "0"]),
    "file in the way": (nothing, ["--out", "pairs.jsonl"], ["pairs.jsonl is a file", "--out"]),
    "file in the way above": (nothing, ["--out", "pairs.jsonl/report"], ["pairs.jsonl/report", "--out"]),
    "a folder with other files": (nothing, ["--out", "."], ["pairs.jsonl", "--overwrite"]),
    "no workers": (nothing, ["--workers", "0"], ["--workers", "'0' is not a whole number above 0"]),
}


@pytest.mark.parametrize(("prepare", "arguments", "words"), QUICKSTARTS.values(), ids=QUICKSTARTS)
def test_a_wrong_quickstart(prepare, arguments, words, place, trimtab):
    prepare(place)
    before = place.files()
    refused(trimtab("quickstart", *arguments), words)
    assert place.files() == before


def assert_nothing_half_written(run: Path) -> None:
    """Every checkpoint is marked, nothing has a temporary name, and no unfinished model is there."""
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
    assert not (run / "model").exists()
    for checkpoint in run.glob("checkpoint-*"):
        assert (checkpoint / "trimtab.json").is_file()


def test_a_loss_that_is_not_a_number(place, trimtab):
    nan_model(place)
    result = trimtab("train", place.recipe({"reference": "./broken", "base": ..., "optimizer.name": "adamw"}))
    assert result.code == 2
    assert "the loss is nan at step 1" in result.last_sentence
    assert "optimizer.lr" in result.last_sentence
    assert_nothing_half_written(place.folder / "run")


def test_a_training_that_diverges(place, trimtab):
    result = trimtab("train", place.recipe({"optimizer.lr": 1e30, "training.max_steps": 4}))
    assert result.code == 2
    assert "at step 2" in result.last_sentence
    assert "checkpoint-1" in result.last_sentence, "the last good checkpoint is named"
    assert_nothing_half_written(place.folder / "run")


def test_an_earlier_run_is_neither_overwritten_nor_resumed_otherwise(place, trimtab):
    recipe = place.recipe()
    assert trimtab("train", recipe).code == 0
    before = place.files()
    refused(trimtab("train", recipe), ["output 'run' already holds a run", "--resume", "--overwrite"])
    for override, key in (
        ("optimizer.lr=1e-3", "optimizer.lr"),
        ("seed=5", "seed"),
        ("training.max_steps=9", "max_steps"),
    ):
        refused(trimtab("train", recipe, "--resume", override), ["cannot be resumed", key])
    assert place.files() == before
    assert trimtab("train", recipe, "--resume", "training.logging_steps=7").code == 0
    assert place.files() == before, "a finished run has nothing to resume"


@pytest.fixture
def small_disk(place: Place) -> Iterator[Callable[[int], Path]]:
    """Mount a disk of a few kilobytes at ``disk``."""
    disk = place.folder / "disk"
    disk.mkdir()

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("this system has no mount")
        if done.returncode:
            pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True)


@pytest.mark.parametrize("kilobytes", [4, 64, 160, 400, 640])
def test_a_full_disk_while_training(kilobytes, place, trimtab, small_disk):
    """At the recipe, at either checkpoint's weights or optimizer state, or at the final model."""
    disk = small_disk(kilobytes)
    result = trimtab("train", place.recipe({"output": "disk/run"}))
    assert result.code == 2, result.err
    assert "no space" in result.last_sentence
    assert "disk" in result.last_sentence
    assert_nothing_half_written(disk / "run")


def test_a_full_disk_while_writing_a_delta(place, trimtab, small_disk):
    disk = small_disk(40)
    result = trimtab("delta", "--reference", "reference", "--base", "base", "disk/tau")
    refused(result, ["free where disk/tau would lie", "make room"])
    assert list(disk.iterdir()) == []


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="this system has no /sys")
def test_a_place_where_nobody_may_write(place, trimtab):
    refused(
        trimtab("train", place.recipe({"output": "/sys/run"})), ["no permission", "'/sys/run'"], started=True
    )


def interrupt_after_a_checkpoint(process: subprocess.Popen[str], run: Path, number: int) -> str:
    """Send a signal as soon as a line is said and a checkpoint counts; return all that was said."""
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if any(run.glob("checkpoint-*/trimtab.json")):
            process.send_signal(number)
            break
    said.append(process.communicate(timeout=120)[1])
    return "".join(said)


STEPS = 120  # enough that the training is not over before the signal comes


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_training_that_is_stopped_can_be_resumed(number, code, name, place, trimtab):
    recipe = place.recipe(
        {"training.max_steps": STEPS, "training.logging_steps": 1, "training.save_total_limit": 2}
    )
    said = interrupt_after_a_checkpoint(start("train", recipe), place.folder / "run", number)
    run = place.folder / "run"
    assert said.splitlines()[-1].startswith(f"trimtab: stopped by {name}"), said
    assert "--resume" in said
    assert "Traceback" not in said
    assert_nothing_half_written(run)
    steps = [int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")]
    assert 1 <= max(steps) < STEPS
    # The rest in this process; the uninterrupted run it must equal is the business of the equivalence tests.
    assert trimtab("train", recipe, "--resume").code == 0
    assert (run / "model" / "model.safetensors").is_file()


def test_a_mistake_in_the_data_as_a_process(place):
    """The same sentence, alone on the error stream, when the libraries start up for real."""
    line_17('{"prompt": "a", "chosen": }')(place)
    recipe = place.recipe({"data.train": "rows.jsonl"})
    before = place.files()
    refused(run_process("train", recipe), ["rows.jsonl:17 is not JSON"])
    assert place.files() == before


def test_a_mismatched_base_as_a_process(place):
    wider_model(place)
    before = place.files()
    refused(
        run_process("delta", "--reference", "reference", "--base", "broken", "tau"),
        ["base 'broken'", "mismatched"],
    )
    assert place.files() == before


def test_the_count_of_wrong_inputs():
    """The promise is at least 25; a table that was emptied by accident would keep it in name only."""
    assert len(RECIPES) + len(FILES) + len(DELTAS) >= 25 + 30
    assert os.environ.get("TRIMTAB_TRACEBACK") is None, "these tests look at what is said without it"
