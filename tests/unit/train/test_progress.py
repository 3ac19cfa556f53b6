"""What a training prints while it runs."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.train.progress import Lines, log_line

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL


def state(step: int, total: int = 1000, first: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=total, is_world_process_zero=first)


def test_a_log_as_a_line() -> None:
    logs = {
        "loss": 0.69314,
        "grad_norm": 1.0591,
        "learning_rate": 1e-6,
        "entropy": 4.6,
        "rewards/margins": -0.25,
    }
    expected = "step 7/1000 (3 s): loss 0.6931, rewards/margins -0.25, learning_rate 1e-06, grad_norm 1.059"
    assert log_line(state(7), logs, 3.4) == expected
    evaluated = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_runtime": 3.0}
    assert log_line(state(7), evaluated, 3.4) == "step 7/1000 (evaluation): loss 0.5, rewards/accuracies 0.75"
    assert log_line(state(7), {"train_runtime": 3.0}, 3.4) is None


def test_long_trainings_take_about_twenty_lines_and_end_with_the_last_step() -> None:
    stream = io.StringIO()
    lines = Lines(stream=stream)
    lines.on_train_begin(None, state(0), None)  # type: ignore[arg-type]
    for step in range(1, 1001):
        lines.on_log(None, state(step), None, {"loss": 0.1})  # type: ignore[arg-type]
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps[:3] == [1, 51, 101]
    assert steps[-1] == 1000
    assert len(steps) == 21


def test_other_processes_are_silent() -> None:
    stream = io.StringIO()
    lines = Lines(stream=stream)
    lines.on_log(None, state(1, first=False), None, {"loss": 0.1, "eval_loss": 0.2})  # type: ignore[arg-type]
    assert stream.getvalue() == ""
