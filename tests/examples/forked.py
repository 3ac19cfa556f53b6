"""Run scripts one after the other, each in a process of its own that was forked after the imports.

A process each is what a user has; importing torch, transformers and TRL once instead of ten times makes it
affordable. Prints what each script printed and its exit code, as JSON.

    python -m tests.examples.forked "examples/groups.py" "examples/compiled_step.py aot_eager"

``without-merging`` before a script puts AdamW in OnDARE's place; ``ranks=2`` starts two processes with the
environment variables that torchrun would give them.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn


def preload() -> None:
    """Import what most examples import."""
    for name in ("transformers.trainer", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"):
        import_module(name)
    for name in ("accelerate", "datasets", "trimtab.train.mixin"):
        import_module(name)


def stop_merging() -> None:
    """Let OnDARE be AdamW."""
    import torch

    import trimtab

    def adamw(named: Any, _: Any, *, lr: float, **__: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(named, lr=lr, weight_decay=0.0)

    vars(trimtab)["OnDARE"] = adamw


def run_here(command: Sequence[str], output: Any) -> NoReturn:
    """In the forked process: become the script, and end."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    if command[0] == "without-merging":
        stop_merging()
        command = command[1:]
    sys.argv, sys.path[0] = list(command), str(Path(command[0]).parent)
    code = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes it starts on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{k: str(v) for k, v in numbers.items()}}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run one script in a fork, or several; return the worst exit code and what they printed."""
    ranks, port = 1, free_port()
    if command[0].startswith("ranks="):
        ranks, command = int(command[0].removeprefix("ranks=")), command[1:]
    with tempfile.TemporaryFile("w+") as output:
        children = []
        for rank in range(ranks):
            children.append(os.fork())
            if children[-1] == 0:
                if ranks > 1:
                    os.environ.update(torchrun_environment(rank, ranks, port))
                run_here(command, output)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        return {"code": max(codes, key=abs), "printed": output.read()}


if __name__ == "__main__":
    preload()
    json.dump({command: run(command.split()) for command in sys.argv[1:]}, sys.stdout)
