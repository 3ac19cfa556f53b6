"""What happens at the Trainer's events: metrics to a file, the marker after a save."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.train.checkpoints import drop_old, mark_complete


class MetricsFile(TrainerCallback):
    """Append every log of the Trainer to ``metrics.jsonl``: one JSON object a line, written through at once.

    Each line has ``step``, ``epoch``, ``time`` (Unix seconds) and the logged values; what is not finite is
    null.

    Args:
        path: the file; it is made at the first log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line (first process only)."""
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, "time": round(time.time(), 3)}
        record.update({name: _plain(value) for name, value in logs.items()})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CompleteCheckpoints(TrainerCallback):
    """Save what a resume needs, and let a checkpoint count only when all of it is on the disk.

    * Every save is preceded by a log, so that the averages in the log start anew at each checkpoint and a
      resumed run logs what an uninterrupted one does.
    * After a save: wait for all processes, write the marker, then delete old checkpoints.
    * At the last step: ``on_last_step`` runs while that step's learning rate is still in force, before the
      log, the evaluation and the save, which therefore see the model that is kept.

    Args:
        run: the run folder.
        keep: number of complete checkpoints to keep; None keeps all.
        evaluate_last: whether to evaluate at the last step.
        on_last_step: called once, with the number of steps done.
    """

    def __init__(
        self, run: Path, keep: int | None, evaluate_last: bool, on_last_step: Callable[[int], None]
    ) -> None:
        self.run = run
        self.keep = keep
        self.evaluate_last = evaluate_last
        self.on_last_step = on_last_step
        self._finished_at = -1

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the last of the planned steps (the Trainer counts it only after this event)."""
        if state.global_step + 1 >= state.max_steps:
            self._finish(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure and log the last step; log before each save."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._finish(state.global_step)
            control.should_evaluate = control.should_evaluate or self.evaluate_last
            control.should_log = True
        control.should_log = control.should_log or control.should_save

    def _finish(self, step: int) -> None:
        if self._finished_at != step:
            self._finished_at = step
            self.on_last_step(step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log before a save at the end of an epoch."""
        control.should_log = control.should_log or control.should_save

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the marker when every process has written its files."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = self.run / f"checkpoint-{state.global_step}"
            mark_complete(folder, step=state.global_step, world_size=args.world_size)
            if self.keep is not None:
                drop_old(self.run, self.keep, never=state.best_model_checkpoint)
