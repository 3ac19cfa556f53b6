"""The command ``trimtab``: which commands there are, what they take, and how their failures are said.

Nothing heavy is imported here: a command's work is imported when it runs, so ``--help`` costs little.

Exit codes: 0 success; 2 a user's mistake, said in one sentence; 1 a failure; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from trimtab import __version__, data_commands
from trimtab.data_commands import count
from trimtab.errors import UserError, nearest, unknown

SUCCESS, FAILURE, MISTAKE, INTERRUPTED, TERMINATED, BROKEN_PIPE = 0, 1, 2, 130, 143, 141

PATIENCE = 10.0
"""Seconds that a process other than the first waits with a mistake for the first to say it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program was, so that what is half done is cleaned up as after Ctrl-C."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors said as all others are."""

    def error(self, message: str) -> NoReturn:
        option = message.removeprefix("unrecognized arguments: ").split()[0]
        known = [name for action in self._actions for name in action.option_strings]
        close = nearest(option, known) if option != message.split()[0] else None
        hint = f"did you mean {close}?" if close else f"see {self.prog} --help"
        raise UserError(f"{message}; {hint}")


@dataclass(frozen=True)
class Command:
    """A command: one line about it, an example that works, its arguments, and what it does."""

    summary: str
    example: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]

    def parser(self, name: str) -> argparse.ArgumentParser:
        """Return the parser of the command ``name``."""
        parser = _Parser(
            prog=f"trimtab {name}",
            description=self.summary,
            epilog="example:\n" + textwrap.indent(self.example, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.declare(parser)
        return parser


def _declare_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="quickstart", metavar="FOLDER", help="where the report goes")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="which shipped models (all)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes at a time (2)")
    parser.add_argument("--overwrite", action="store_true", help="write into a FOLDER with other files in it")


def _quickstart(options: argparse.Namespace) -> None:
    from trimtab.lab import quickstart

    quickstart.run(options.out, options.seeds, overwrite=options.overwrite, workers=options.workers)


def _declare_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="recipe keys set otherwise, such as optimizer.lr=1e-6",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, the steps and the memory; train nothing",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    choice.add_argument("--overwrite", action="store_true", help="delete the run folder's earlier run")


def _train(options: argparse.Namespace) -> None:
    from trimtab.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, config_class=_config_class)
    from trimtab import train

    train.run(recipe, dry_run=options.dry_run, resume=options.resume, overwrite=options.overwrite)


def _config_class(method: str) -> type:
    """The trainer's config class; TRL is imported for it, and only where there is a training section."""
    from trimtab.train import config_class

    return config_class(method)


def _declare_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", required=True, metavar="R", help="the SFT model: a folder or a hub id")
    parser.add_argument(
        "--base", metavar="B", help="the pretrained model it was tuned from; an adapter R needs none"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a delta that OUT already is")
    parser.add_argument("--reference-revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--base-revision", metavar="REV", help="the same for the base")
    parser.add_argument(
        "--no-tokenizer-check", action="store_true", help="take tokenizers that disagree on token ids"
    )
    parser.add_argument("--top", type=count, default=10, metavar="N", help="parameters shown (10)")


def _delta(options: argparse.Namespace) -> None:
    from trimtab.delta import command

    command.run(
        options.reference,
        options.base,
        options.out,
        overwrite=options.overwrite,
        reference_revision=options.reference_revision,
        base_revision=options.base_revision,
        check_tokenizers=not options.no_tokenizer_check,
        top=options.top,
    )


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="what to merge and how; mergekit's files are read as they are"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT already is")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, the size and the time; write nothing"
    )
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="bytes of a file of weights, at most (5GB)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="merge at every point of a grid of densities and weights, in one pass over the models",
    )
    parser.add_argument("--densities", metavar="P,P", help="the grid's densities (0.2,0.5,0.8)")
    parser.add_argument("--weights", metavar="W,W", help="factors of every weight (0.2,0.4,0.6,0.8,1)")
    parser.add_argument(
        "--score",
        metavar="MODULE:FUNCTION",
        help="called with each model's folder; OUT becomes the model with the highest number",
    )


def _merge(options: argparse.Namespace) -> None:
    from trimtab.merge import command

    command.run(
        options.config,
        options.out,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
        shard_size=options.shard_size,
        sweep=options.sweep,
        densities=options.densities,
        weights=options.weights,
        score=options.score,
    )


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "The whole story on a tiny model: align it five ways, measure reward and tax, write a report.",
        "trimtab quickstart --out quickstart",
        _declare_quickstart,
        _quickstart,
    ),
    "train": Command(
        "Train a model as a recipe says (method: sft, dpo, ipo, kto, rrhf, ppo, grpo, rloo or reward).",
        "trimtab train recipes/smollm2-dpo.yaml optimizer.lr=1e-6 --dry-run",
        _declare_train,
        _train,
    ),
    "delta": Command(
        "Write the reference delta, reference minus base, once for many runs.",
        "trimtab delta --reference org/model-sft --base org/model deltas/model-sft",
        _declare_delta,
        _delta,
    ),
    "merge": Command(
        "Merge models: linear, task arithmetic, TIES, DARE, slerp or hma, in memory that does not grow.",
        "trimtab merge recipes/merge/ties.yaml merged --dry-run",
        _declare_merge,
        _merge,
    ),
    "data rank": Command(
        "Rank several models' outputs by a reward model, a likelihood, a rule, or the scores they have.",
        "trimtab data rank sft.jsonl dpo.jsonl --reward runs/reward/model --out ranked.jsonl",
        data_commands.declare_rank,
        data_commands.rank,
    ),
    "data score": Command(
        "How often a reward gives the better of two responses the higher score, with an interval.",
        "trimtab data score held-out.jsonl --reward runs/reward/model",
        data_commands.declare_score,
        data_commands.score,
    ),
}


PLANNED = ("data label", "raft", "select", "evaluate", "report", "sweep")
"""Commands that are planned and refused by name until they are there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments after the program's name; those of the process when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = _catch_sigterm()
    try:
        _run(arguments)
        if sys.stdout is not None:  # it is None where it was closed
            sys.stdout.flush()
        return SUCCESS
    except SystemExit as stop:  # argparse, after --help; a library that gives up with a sentence
        return stop.code if isinstance(stop.code, int) else SUCCESS if stop.code is None else _failed(stop)
    except BaseException as error:
        return _failed(error)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> None:
    if not arguments:
        raise UserError(f"name a command: {', '.join(COMMANDS)}; see trimtab --help")
    name, rest = _named(arguments)
    group = {known: command for known, command in COMMANDS.items() if known.startswith(f"{name} ")}
    if group and not rest:
        raise UserError(f"name a command: {', '.join(group)}; see trimtab {name} --help")
    if group:
        print(_overview(name, group))
    elif name in ("-h", "--help", "help"):
        print(_overview("", COMMANDS))
    elif name == "--version":
        print(f"trimtab {__version__}")
    elif name in COMMANDS:
        command = COMMANDS[name]
        command.run(command.parser(name).parse_intermixed_args(rest))
    elif name in PLANNED:
        raise UserError(f"trimtab {name} is not available yet; available: {', '.join(COMMANDS)}")
    else:
        raise unknown("command", name, COMMANDS)


def _named(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name and what follows it; the commands about one thing have names of two words."""
    first, *rest = arguments
    grouped = any(name.startswith(f"{first} ") for name in COMMANDS)
    if grouped and rest and rest[0] not in ("-h", "--help", "help"):
        return f"{first} {rest[0]}", rest[1:]
    return first, rest


def _overview(group: str, shown: dict[str, Command]) -> str:
    """All commands, or those whose names begin with ``group``."""
    width = max(len(name) for name in shown)
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in shown.items())
    usage = f"trimtab {group} COMMAND ... | --help" if group else "trimtab COMMAND ... | --help | --version"
    about = "" if group else "Align language models with human preferences without the alignment tax.\n\n"
    example = next(iter(shown.values())).example if group else "trimtab quickstart"
    return (
        f"usage: {usage}\n\n{about}"
        f"commands:\n{commands}\n\n"
        f"example:\n  {example}\n\n"
        "Each command has its own --help. TRIMTAB_TRACEBACK=1 shows where a failure came from."
    )


def _catch_sigterm() -> signal.Handlers | Callable[[int, FrameType | None], object] | int | None:
    """Raise :class:`Terminated` on the first SIGTERM; a second one kills as usual."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        return None


def _failed(error: BaseException) -> int:
    """Say what went wrong, once and in one sentence, and return the exit code."""
    if os.environ.get("TRIMTAB_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone. Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    code, sentence = _verdict(error)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"trimtab: {sentence}", file=sys.stderr, flush=True)
    elif code == FAILURE or (code == MISTAKE and not _first_process_speaks()):
        print(f"trimtab: process {rank} {sentence}", file=sys.stderr, flush=True)
    return code


def _first_process_speaks() -> bool:
    """Whether the launcher stops this process within a while, because the first one has failed as well.

    A mistake is mostly everyone's, and the first process says it. Were another one to end before that, the
    launcher would stop the first, and nobody would have spoken.
    """
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        return True
    return False


def _verdict(error: BaseException) -> tuple[int, str]:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, UserError):
        return MISTAKE, f"error: {error}"
    if isinstance(error, Terminated):
        return TERMINATED, f"stopped by SIGTERM{notes}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"stopped by Ctrl-C{notes}"
    mistake = _system_mistake(error)
    if mistake is not None:
        return MISTAKE, f"error: {mistake}"
    first = next(iter(str(error).strip().splitlines()), "")
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return FAILURE, f"failed with {said} (TRIMTAB_TRACEBACK=1 shows where)"


_SYSTEM_MISTAKES = {
    errno.ENOSPC: "there is no space left on the disk for {path}; free some or write elsewhere",
    errno.EDQUOT: "the disk quota is used up, so {path} cannot be written; free some or write elsewhere",
    errno.EACCES: "there is no permission to use {path}; change its permissions or name another path",
    errno.EPERM: "there is no permission to use {path}; change its permissions or name another path",
    errno.EROFS: "{path} is on a read-only disk; name another path",
    errno.ENOENT: "{path} does not exist",
    errno.ENOTDIR: "{path} needs a folder where a file is; name another path",
    errno.EISDIR: "{path} is a folder where a file is needed; name another path",
    errno.EEXIST: "{path} is there already; name another path",
    errno.ENAMETOOLONG: "the name {path} is too long; name another path",
}


def _system_mistake(error: BaseException) -> str | None:
    """Return the sentence for what the operating system refused, where that is the user's to change."""
    if isinstance(error, OSError) and error.errno in _SYSTEM_MISTAKES:
        path = error.filename2 or error.filename
        named = repr(os.fsdecode(path)) if isinstance(path, str | bytes) else "the output"
        return _SYSTEM_MISTAKES[error.errno].format(path=named)
    if "No space left on device" in str(error):  # safetensors and torch wrap the system's error in their own
        return _SYSTEM_MISTAKES[errno.ENOSPC].format(path="what was being written")
    return None
