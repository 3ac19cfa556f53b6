"""Running what a test needs several processes for: a module of the tests, by itself or on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_module(module: str, folder: Path, *, timeout: float = 240) -> None:
    """Run ``python -m module folder`` on this source, with one thread; it has to end well."""
    _run([module, str(folder)], timeout)


def run_on_two(module: str, folder: Path) -> None:
    """Run a module as :func:`run_module`, by torchrun on two processes."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _run([*launch, "-m", module, str(folder)], 240)


def _run(arguments: list[str], timeout: float) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
