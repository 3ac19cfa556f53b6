"""How a training shows how far it is: a bar with a few lines above it, or in a log file the lines alone."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

_SHOWN = (
    "loss",
    "loss/rank",
    "loss/ft",
    "rewards/accuracies",
    "rewards/margins",
    "accuracy",
    "mean_token_accuracy",
    "reward",
    "kl",
    "response_length",
    "completions/mean_length",
    "clip_ratio/region_mean",
    "learning_rate",
    "grad_norm",
)


def log_line(state: TrainerState, logs: dict[str, Any], elapsed: float) -> str | None:
    """Return a training log or an evaluation as a line; None for other logs.

    Args:
        state: where the training is.
        logs: what was logged.
        elapsed: seconds since the training began.
    """
    evaluated = not {"eval_loss", "eval_reward"}.isdisjoint(logs)
    prefix = "eval_" if evaluated else ""
    if not evaluated and "loss" not in logs:
        return None
    values = [f"{name} {float(logs[prefix + name]):.4g}" for name in _SHOWN if prefix + name in logs]
    kind = "evaluation" if prefix else f"{elapsed:.0f} s"
    return f"step {state.global_step}/{state.max_steps} ({kind}): {', '.join(values)}"


class Lines(TrainerCallback):
    """Every evaluation and about ``count`` of the training's logs, a line each.

    Args:
        count: how many lines a whole training may take.
        stream: where to print; the standard error stream when not given.
    """

    def __init__(self, count: int = 20, stream: TextIO | None = None) -> None:
        self.count = count
        self.stream = stream
        self._next = 0
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start, self._next = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a training log when its turn has come, and every evaluation."""
        line = log_line(state, logs or {}, time.monotonic() - self._start)
        if line is None or not state.is_world_process_zero:
            return
        if "loss" in (logs or {}):
            if self._next > state.global_step < state.max_steps:
                return
            self._next = state.global_step + max(1, state.max_steps // self.count)
        self.write(line)

    def write(self, line: str) -> None:
        """Print one line."""
        print(line, file=self.stream or sys.stderr, flush=True)


class Bar(ProgressCallback):
    """transformers' progress bar, silent about logs: :class:`LinesAboveBar` prints those worth a line."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


class LinesAboveBar(Lines):
    """Lines that scroll past above a bar instead of tearing it."""

    def write(self, line: str) -> None:
        """Print one line above the bar."""
        from tqdm.auto import tqdm

        tqdm.write(line, file=self.stream or sys.stderr)


def show_progress(trainer: Any) -> None:
    """Replace the trainer's own display: on a terminal by a bar and lines, else by lines."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.args.disable_tqdm:
        trainer.add_callback(Lines())
    else:
        trainer.add_callback(Bar())
        trainer.add_callback(LinesAboveBar())
