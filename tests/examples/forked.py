"""Run scripts one after the other, each in a process of its own that was forked after the imports.

A process each is what a user has; importing torch, transformers and TRL once instead of ten times makes it
affordable. Prints what each script printed and its exit code, as JSON.

    python -m tests.examples.forked "examples/groups.py" "examples/compiled_step.py aot_eager"

``without-merging`` before a script puts AdamW in OnDARE's place.
"""

from __future__ import annotations

import json
import os
import runpy
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


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run one script in a fork; return its exit code and what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            run_here(command, output)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "printed": output.read()}


if __name__ == "__main__":
    preload()
    json.dump({command: run(command.split()) for command in sys.argv[1:]}, sys.stdout)
