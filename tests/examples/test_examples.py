"""Every file in examples/ runs, and merges: a model's drift along τ is what α, p and the steps come to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("examples")  # one worker: the scripts run in one go

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "tiny_setup.py")
ALONE = "raw_loop.py"
WITH = {  # inductor would compile C++ for half a minute
    "compiled_step.py": "examples/compiled_step.py aot_eager",
    "fsdp2.py": "ranks=2 examples/fsdp2.py",
}
CONTROL = "without-merging examples/grad_scaler.py"
NEEDS = {"lightning_module.py": "lightning"}
LINES = {"groups.py": 3} | dict.fromkeys(
    ["hf_trainer_factory.py", "lightning_module.py", "grad_scaler.py", "compiled_step.py"], 2
)
"""How many drifts a script prints, where it is more than one."""

DRIFT = re.compile(r"moved (-?\d\.\d{4}) τ along τ, (expected|at most) (\d\.\d{4})")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=cwd)


def available(script: str) -> bool:
    return find_spec(NEEDS.get(script, "torch")) is not None


def merged(printed: str) -> list[bool]:
    """For each drift that was printed, whether it is the one that was to be expected.

    Gradients add a hundredth of a random τ at most; the drifts expected are 0 or 0.045 and more. OnTIES drops
    the smaller half of τ and what the vote takes, so it stays below its "at most".
    """
    found = []
    for moved, kind, expected in DRIFT.findall(printed):
        lowest = 0.6 * float(expected) if kind == "at most" else float(expected) - 0.01
        found.append(lowest <= float(moved) <= float(expected) + 0.01)
    return found


@pytest.fixture(scope="module")
def forked() -> dict[str, Any]:
    """What the scripts printed that share their imports."""
    together = [script for script in SCRIPTS if script != ALONE and available(script)]
    commands = {WITH.get(script, f"examples/{script}"): script for script in together} | {CONTROL: CONTROL}
    done = python("-m", "tests.examples.forked", *commands)
    assert done.returncode == 0, done.stderr
    return {commands[command]: result for command, result in json.loads(done.stdout.splitlines()[-1]).items()}


def test_every_host_has_a_file() -> None:
    assert set(SCRIPTS) >= {
        "accelerate_loop.py",
        "compiled_step.py",
        "fsdp2.py",
        "grad_scaler.py",
        "groups.py",
        "hf_trainer_factory.py",
        "hf_trainer_optimizers.py",
        "lightning_module.py",
        "raw_loop.py",
        "trl_dpo_mixin.py",
    }
    table = (ROOT / "docs/hosts.md").read_text(encoding="utf-8")
    assert [script for script in SCRIPTS if f"examples/{script}" not in table] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs_and_merges(script: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not available(script):
        pytest.skip(f"{script} needs pip install {NEEDS[script]}")
    if script == ALONE:  # started as a user would, from another folder
        done = python(str(ROOT / "examples" / script), cwd=tmp_path)
        result = {"code": done.returncode, "printed": done.stdout + done.stderr}
    else:
        result = request.getfixturevalue("forked")[script]
    printed = result["printed"]
    assert result["code"] == 0, printed
    assert merged(printed) == [True] * LINES.get(script, 1), printed
    assert "OTHER WEIGHTS" not in printed


def test_the_check_would_see_an_optimizer_that_does_not_merge(forked: dict[str, Any]) -> None:
    result = forked[CONTROL]
    assert result["code"] == 0, result["printed"]
    assert merged(result["printed"]) == [False, False], result["printed"]
