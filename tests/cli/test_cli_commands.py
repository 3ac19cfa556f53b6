"""Help, versions, exit codes: the command without any of its work."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run_process
from trimtab import __version__, cli
from trimtab.cli import COMMANDS, PLANNED
from trimtab.errors import UserError

HEAVY = ("torch", "transformers", "trl", "datasets", "pydantic", "yaml", "numpy", "rich")


@pytest.fixture
def command(monkeypatch):
    """Replace what a command does."""

    def replace(function, name="delta"):
        monkeypatch.setitem(
            COMMANDS,
            name,
            cli.Command("A test.", "trimtab delta", lambda parser: None, lambda options: function()),
        )

    return replace


def raising(error):
    def work():
        raise error

    return work


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from trimtab.cli import COMMANDS, main\n"
        "for arguments in ('', 'data', *COMMANDS): assert main([*arguments.split(), '--help']) == 0\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("heavy: []")
    assert done.stderr == ""


def test_the_installed_command_is_this_one():
    script = Path(sys.executable).with_name("trimtab")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"trimtab {__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name, trimtab):
    result = trimtab(*name.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert f"example:\n  trimtab {name}" in result.out
    assert f"usage: trimtab {name}" in result.out


def test_the_overview_names_every_command(trimtab):
    result = trimtab("--help")
    assert result.code == 0
    for name, command in COMMANDS.items():
        assert f"  {name}" in result.out
        assert command.summary in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["name a command", "train", "trimtab --help"]),
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["zzz"], ["unknown command 'zzz'", "Known: quickstart, train, delta"]),
        (["--verbose"], ["unknown command '--verbose'"]),
        (["train"], ["required: RECIPE", "trimtab train --help"]),
        (["train", "r.yaml", "--dryrun"], ["--dryrun", "did you mean --dry-run?"]),
        (["train", "r.yaml", "--frobnicate"], ["--frobnicate", "see trimtab train --help"]),
        (["train", "r.yaml", "--resume", "--overwrite"], ["--overwrite: not allowed with argument --resume"]),
        (["delta", "out", "--base", "b"], ["required: --reference"]),
        (
            ["delta", "out", "--base", "b", "--reference", "r", "--top", "-1"],
            ["--top", "is not a whole number above 0"],
        ),
        (["data"], ["name a command: data rank, data score", "trimtab data --help"]),
        (["data", "rnk"], ["unknown command 'data rnk'", "did you mean 'data rank'?"]),
        (["data", "rank", "a.jsonl"], ["required: --out", "trimtab data rank --help"]),
        (["data", "score"], ["required: PAIRS"]),
        (["data", "score", "a", "--reward", "b", "--likelihood", "c"], ["--likelihood: not allowed with"]),
        (["data", "rank", "a.jsonl", "--out", "b.jsonl", "--samples", "0"], ["--samples", "above 0"]),
        (["quickstart", "here"], ["unrecognized arguments: here"]),
        (["quickstart", "--seeds", "one"], ["--seeds", "one"]),
    ],
)
def test_wrong_arguments(arguments, words, trimtab):
    refused(trimtab(*arguments), words)


@pytest.mark.parametrize("name", PLANNED)
def test_planned_commands_are_refused_by_name(name, trimtab):
    refused(
        trimtab(*name.split()),
        [f"trimtab {name} is not available yet", "available: quickstart, train, delta"],
    )


def test_overrides_may_stand_on_either_side_of_options(monkeypatch):
    seen = []
    monkeypatch.setitem(
        COMMANDS, "train", cli.Command("", "", cli._declare_train, lambda options: seen.append(vars(options)))
    )
    assert cli.main(["train", "r.yaml", "a=1", "--dry-run", "b.c=-2"]) == 0
    assert seen == [
        {
            "recipe": "r.yaml",
            "overrides": ["a=1", "b.c=-2"],
            "dry_run": True,
            "resume": False,
            "overwrite": False,
        }
    ]


FAILURES = {
    "mistake": (
        UserError("the sky is green; paint it blue"),
        2,
        "trimtab: error: the sky is green; paint it blue",
    ),
    "Ctrl-C": (KeyboardInterrupt(), 130, "trimtab: stopped by Ctrl-C"),
    "SIGTERM": (cli.Terminated(), 143, "trimtab: stopped by SIGTERM"),
    "bug": (
        RuntimeError("the first line\nthe second"),
        1,
        "trimtab: failed with RuntimeError: the first line (TRIMTAB_TRACEBACK=1 shows where)",
    ),
    "library that gives up": (
        SystemExit("no GPU, no go"),
        1,
        "trimtab: failed with SystemExit: no GPU, no go (TRIMTAB_TRACEBACK=1 shows where)",
    ),
    "silent bug": (
        AssertionError(),
        1,
        "trimtab: failed with AssertionError (TRIMTAB_TRACEBACK=1 shows where)",
    ),
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device", "run/x"),
        2,
        "trimtab: error: there is no space left on the disk for 'run/x'; free some or write elsewhere",
    ),
    "full disk, wrapped": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        2,
        "trimtab: error: there is no space left on the disk for what was being written; free some or write "
        "elsewhere",
    ),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "run/x"),
        2,
        "trimtab: error: there is no permission to use 'run/x'; change its permissions or name another path",
    ),
    "a file in the way": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"),
        2,
        "trimtab: error: 'file/x' needs a folder where a file is; name another path",
    ),
    "connection lost": (
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        1,
        "trimtab: failed with ConnectionResetError: [Errno 104] Connection reset by peer "
        "(TRIMTAB_TRACEBACK=1 shows where)",
    ),
}


@pytest.mark.parametrize(("error", "code", "line"), FAILURES.values(), ids=FAILURES)
def test_how_failures_are_said(error, code, line, trimtab, command):
    command(raising(error))
    result = trimtab("delta")
    assert (result.code, result.out, result.err) == (code, "", line + "\n")


def test_notes_are_said_after_a_stop(trimtab, command):
    stop = KeyboardInterrupt()
    stop.add_note("go on with --resume")
    command(raising(stop))
    assert trimtab("delta").err == "trimtab: stopped by Ctrl-C; go on with --resume\n"


def test_the_traceback_is_there_for_whoever_asks(trimtab, command, monkeypatch):
    command(raising(RuntimeError("deep down")))
    monkeypatch.setenv("TRIMTAB_TRACEBACK", "1")
    result = trimtab("delta")
    assert result.code == 1
    assert result.err.startswith("Traceback (most recent call last)")
    assert result.err.splitlines()[-1].startswith("trimtab: failed with RuntimeError: deep down")


@pytest.mark.parametrize(
    ("error", "rank", "said"),
    [
        (UserError("a mistake"), "0", "trimtab: error: a mistake\n"),
        (KeyboardInterrupt(), "3", ""),
        (
            RuntimeError("alone"),
            "3",
            "trimtab: process 3 failed with RuntimeError: alone (TRIMTAB_TRACEBACK=1 shows where)\n",
        ),
    ],
)
def test_under_torchrun_one_process_speaks(error, rank, said, trimtab, command, monkeypatch):
    command(raising(error))
    monkeypatch.setenv("RANK", rank)
    assert trimtab("delta").err == said


@pytest.mark.parametrize(("stopped", "said"), [(True, ""), (False, "trimtab: process 1 error: a mistake\n")])
def test_another_process_speaks_of_a_mistake_only_if_the_first_does_not(
    stopped, said, trimtab, command, monkeypatch
):
    def sleep(seconds):
        assert seconds == cli.PATIENCE
        if stopped:  # by torchrun, since the first process has ended
            os.kill(os.getpid(), signal.SIGTERM)

    command(raising(UserError("a mistake")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", sleep)
    result = trimtab("delta")
    assert (result.code, result.err) == (2, said)


def test_a_reader_that_has_gone_is_no_failure_to_report():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "--help"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_that_finds_no_space():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert (
        done.stderr
        == "trimtab: error: there is no space left on the disk for the output; free some or write elsewhere\n"
    )


def test_a_recipe_is_refused_before_anything_heavy_is_imported(tmp_path):
    """The whole process, with everything that is wrong said at once."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: dpo\nrefrence: org/sft\ndata: {train: org/pairs}\nloss: {beta: true}\noutput: run\n"
    )
    result = run_process("train", str(recipe), PYTHONPROFILEIMPORTTIME="1")
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in result.err.splitlines() if line.startswith("import time")
    }
    said = [line for line in result.err.splitlines() if not line.startswith("import time")]
    assert result.code == 2
    assert said == [
        f"trimtab: error: {recipe}: 2 problems",
        "  line 2: refrence is not a key of a recipe; did you mean reference?",
        "  line 4: loss.beta must be a number, not true",
    ]
    assert "trimtab.recipe.loading" in imported
    assert not imported & {"torch", "transformers", "trl", "datasets"}
