"""``kill -9`` at random moments of a real ``trimtab train``, then ``--resume`` until it is done."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from tests.equivalence.runs import assert_same_run
from trimtab.train.checkpoints import checkpoint_folders, last_complete, read_marker

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

STEPS = 24
Moment = Callable[[], bool]


def write_recipe(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(recipe: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the real command with as many threads as this process has: sums depend on them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trimtab", "train", str(recipe), *flags]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_at(process: subprocess.Popen[str], moment: Moment, delay: float) -> bool:
    """Kill the process ``delay`` seconds after ``moment`` has come; False if it was done before, and well."""
    try:
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        if process.poll() is None:
            time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


def after_lines(run: Path, more: int) -> Moment:
    """When the metrics have ``more`` lines more than now."""
    path = run / "metrics.jsonl"

    def lines() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    wanted = lines() + more
    return lambda: lines() >= wanted


def while_writing(run: Path, file: str) -> Moment:
    """When ``file`` appears in a checkpoint that is not complete yet."""
    known = found(run, f"checkpoint-*/{file}")
    return lambda: bool(found(run, f"checkpoint-[0-9]*/{file}") - known)


def while_saving_the_model(run: Path) -> Moment:
    """When the folder that becomes ``model/`` has its weights, or a part of them."""
    return lambda: bool(found(run, ".model.*/*.safetensors"))


def found(run: Path, pattern: str) -> set[Path]:
    """What matches; nothing where a folder is removed or renamed while it is looked into."""
    try:
        return set(run.glob(pattern))
    except FileNotFoundError:
        return set()


@pytest.fixture
def whole(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run, and its recipe."""
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "whole",
        optimizer={"merge_every": 3, "weight_decay": 0.1},
        training={"max_steps": STEPS, "save_steps": 2, "save_total_limit": 3},
        evaluation={"every": 8},
    )
    return tiny.train(values), values


def resume_until_done(recipe: Path) -> None:
    process = start(recipe, "--resume")
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said


def test_a_run_killed_twice_is_the_run_that_was_not(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    expected, values = whole
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    run = tmp_path / "killed"
    recipe = write_recipe({**values, "output": str(run)}, tmp_path / "recipe.yaml")
    moments = [after_lines(run, chance.randint(2, STEPS // 2))]
    assert kill_at(start(recipe), moments[0], chance.random() * 0.05), f"seed {seed}: not killed"
    file = chance.choice(["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
    second = kill_at(start(recipe, "--resume"), while_writing(run, file), chance.random() * 0.002)
    assert second, f"seed {seed}: not killed"
    assert not (run / "model").exists()
    resume_until_done(recipe)
    print(f"seed {seed}, killed while writing {file}")
    assert_same_run(run, expected)


@pytest.mark.slow
def test_a_run_killed_at_every_kind_of_moment_is_the_run_that_was_not(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    expected, values = whole
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    run = tmp_path / "killed"
    recipe = write_recipe({**values, "output": str(run)}, tmp_path / "recipe.yaml")
    kinds: list[Callable[[], Moment]] = [
        lambda: after_lines(run, chance.randint(1, 5)),
        *(lambda name=name: while_writing(run, name) for name in ("config.json", "model.safetensors")),
        lambda: after_lines(run, chance.randint(1, 5)),
        *(
            lambda name=name: while_writing(run, name)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        ),
        *(lambda name=name: while_writing(run, name) for name in ("trainer_state.json", ".trimtab.json.*")),
        lambda: while_saving_the_model(run),
    ]
    killed, kept = 0, []
    for number, kind in enumerate(kinds):
        flags = ("--resume",) if number else ()
        killed += kill_at(start(recipe, *flags), kind(), chance.random() * 0.004)
        assert all(
            read_marker(path) or path != last_complete(run) for path in checkpoint_folders(run).values()
        )
        last = last_complete(run)
        kept.append(int(last.name.split("-")[1]) if last else 0)
    assert killed >= 5, f"seed {seed}: only {killed} kills"
    assert kept == sorted(kept), f"seed {seed}: a complete checkpoint was lost: {kept}"
    resume_until_done(recipe)
    print(f"seed {seed}, {killed} kills, last complete checkpoints {kept}")
    assert_same_run(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ipo", "kto", "reward", "rrhf", "ppo", "grpo", "rloo"])
def test_a_killed_run_of_another_method_is_the_run_that_was_not(
    method: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    training = {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 3}
    sampled = {"rewards": "tests.tiny:share_of_small", "max_new_tokens": 6}
    groups = {**sampled, "num_generations": 2, "num_iterations": 3}  # saved inside a generation
    losses = {"ppo": {**sampled, "epochs": 3, "kl_target": 0.1}, "grpo": groups, "rloo": groups}
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "whole",
        method=method,
        training=training,
        evaluation={"every": 8},
        loss=losses.get(method),
    )
    expected = tiny.train(values)
    run = tmp_path / "killed"
    recipe = write_recipe({**values, "output": str(run)}, tmp_path / "recipe.yaml")
    assert kill_at(start(recipe), after_lines(run, STEPS // 2), 0.01), "not killed"
    assert last_complete(run) is not None
    resume_until_done(recipe)
    assert_same_run(run, expected)


def test_a_killed_run_with_an_average_and_a_fisher_mask_is_the_run_that_was_not(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    """The mask is not estimated again, at weights that have moved; the average goes on from where it was."""
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "whole",
        optimizer={"child_tuning": {"variant": "D", "rows": 4}, "ema": {"coefficient": 0.1}},
        training={"max_steps": STEPS, "save_steps": 2, "save_total_limit": 3},
        evaluation={"every": 8},
    )
    expected = tiny.train(values)
    run = tmp_path / "killed"
    recipe = write_recipe({**values, "output": str(run)}, tmp_path / "recipe.yaml")
    assert kill_at(start(recipe), after_lines(run, STEPS // 2), 0.01), "not killed"
    assert last_complete(run) is not None
    resume_until_done(recipe)
    assert_same_run(run, expected)
