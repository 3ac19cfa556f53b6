"""What a run adds to a TRL trainer: a stop at a loss that is not finite, no half-written checkpoint."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.train.arguments import NOT_YET
from trimtab.train.checkpoints import MARKER, last_complete
from trimtab.train.excerpts import KEPT, excerpts, named
from trimtab.train.mixin import OnlineMergingMixin


class GuardedTrainer(OnlineMergingMixin):
    """To be mixed in front of a TRL trainer, as :class:`OnlineMergingMixin` is.

    * A loss or a gradient norm that is not finite stops the training before the step that would spread it,
      and the rows it came from are named. (The Trainer's own filter only keeps it out of the log.)
    * Evaluating before training leaves the processes of DDP together.
    * A checkpoint that cannot be written whole is removed; a full disk is said in a sentence.
    * TRL's own model card and telemetry are off: the run folder has its own card, and nothing is reported to
      anyone who was not named in ``report_to``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step_batches: list[dict[str, torch.Tensor]] = []
        self._step_is_over = True
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:  # by accelerate's own configuration; a recipe's fsdp is refused before
            raise UserError(f"FSDP {NOT_YET['fsdp']}")

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, with a look at its loss.

        Raises:
            UserError: if the loss of any process is not finite.
        """
        if self._step_is_over:
            self._step_batches.clear()
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._step_is_over = self.accelerator.sync_gradients
        finite = torch.isfinite(loss).all()
        if not self._everywhere(finite):
            guilty = [] if finite else self._step_batches[-1:]
            raise UserError(self._not_finite("loss", float(loss), guilty))
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if self.model.training:
            self._step_batches.append({name: prepared[name] for name in KEPT if name in prepared})
        return prepared

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.args.fp16  # the gradient scaler skips such a step by itself and goes on
        if not scaled and not math.isfinite(float(norm)):
            raise UserError(self._not_finite("gradient norm", float(norm), self._step_batches))
        return norm

    def _everywhere(self, flag: torch.Tensor) -> bool:
        if self.args.world_size > 1:
            value = flag.to(self.args.device, torch.int32)
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN)
            return bool(value)
        return bool(flag)

    def _named_everywhere(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
        """Name the rows of these batches and of those of other processes, which must all take part."""
        tokenizer = self.processing_class
        mine = [text for batch in batches for text in excerpts(batch, tokenizer)] if tokenizer else []
        given = [mine]
        if self.args.world_size > 1:
            given *= self.args.world_size
            torch.distributed.all_gather_object(given, mine)
        return named(text for one in given for text in one)

    def _not_finite(self, what: str, value: float, batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
        rows = self._named_everywhere(batches)
        on_rows = f" on the rows {rows}" if rows else ""
        kept = last_complete(Path(self.args.output_dir))
        where = f"the last complete checkpoint is {kept}" if kept else "no checkpoint was written yet"
        seen = f"is {value}" if not math.isfinite(value) else "is not finite on another process"
        return (
            f"the {what} {seen} at step {self.state.global_step + 1} (learning rate "
            f"{self._get_learning_rate():.3g}){on_rows}, so training stopped before it; {where}; "
            "lower optimizer.lr or training.max_grad_norm, or look for broken rows in data.train"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / MARKER).unlink(missing_ok=True)  # it is about to be written anew
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            full = is_disk_full(error, folder)
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            if full:
                raise no_space(Path(self.args.output_dir)) from error
            raise

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that does not have the model's tensors, instead of going on with a warning."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        lacking = sorted(set(load_result.missing_keys) - tied)
        if lacking or load_result.unexpected_keys:
            raise UserError(
                f"the checkpoint does not fit the model: it lacks {lacking or 'nothing'} and has "
                f"{sorted(load_result.unexpected_keys) or 'nothing'} too many; start a new run"
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; before training, the model of several processes is prepared for training first.

        accelerate would otherwise prepare it for evaluation alone and take it for prepared from then on, and
        nothing would average the gradients of a later ``train()``.
        """
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            self.model_wrapped = self.accelerator.prepare_model(self.model)
        return super().evaluation_loop(*args, **kwargs)

    def final_results(self) -> dict[str, Any]:
        """What is measured once the model is trained, by the name of its file; every process takes part."""
        return {}

    def trained_model(self) -> Any:
        """The model as it is saved at the end; nothing is trained after it was asked for."""
        return self.accelerator.unwrap_model(self.model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run folder's ``README.md`` is ours."""

    def _send_telemetry(self) -> None:
        """Send nothing."""


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether writing to ``folder`` failed for want of space; libraries wrap the system's error."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left on device" in str(error):
        return True
    while not folder.exists():
        folder = folder.parent
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20


def no_space(run: Path) -> UserError:
    """The sentence for a full disk."""
    return UserError(
        f"no space is left on the disk of {str(run)!r}; free some (training.save_total_limit keeps fewer "
        "checkpoints) and continue with --resume"
    )
