"""What the optimizer measured about its merges, in the log of any transformers Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.optim.diagnostics import DRIFT_WARNS, DriftWarning, far_sentence, log_values, unwrapped


class DiagnosticsCallback(TrainerCallback):
    """Adds ``merge/…`` values to the Trainer's training logs, and warns once when the drift goes too far.

    The names are those of :func:`trimtab.optim.diagnostics.log_values`; what was measured is logged once, in
    the first log after it. With an optimizer that does not merge nothing is added.

    :class:`~trimtab.train.mixin.OnlineMergingMixin` brings it along. In a Trainer of your own prefer
    :meth:`attach`: ``callbacks=[…]`` would put it behind the reporters (W&B, TensorBoard), which then log
    without it.

    Args:
        warn_above: drift, in units of τ, above which there is a warning.
        expected: what the merges are expected to have added up to, as a function of the step and the number
            of steps; logged as ``merge/expected_drift``.

    Examples:
        >>> from transformers import Trainer                                             # doctest: +SKIP
        >>> trainer = Trainer(model, args, optimizers=(opt, None), train_dataset=rows)   # doctest: +SKIP
        >>> DiagnosticsCallback().attach(trainer)                                        # doctest: +SKIP
    """

    def __init__(
        self, warn_above: float = DRIFT_WARNS, expected: Callable[[int, int], float] | None = None
    ) -> None:
        self.warn_above, self.expected = warn_above, expected
        self._logged, self._warned = 0, False

    def attach(self, trainer: Any) -> None:
        """Stand before all other callbacks of ``trainer``, so that they see what this one adds."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to a training log and to its entry in the log history."""
        if optimizer is None or logs is None or "loss" not in logs:
            return
        values = log_values(optimizer, since=self._logged)
        if values and self.expected is not None:
            values["merge/expected_drift"] = self.expected(state.global_step, state.max_steps)
        found = getattr(unwrapped(optimizer), "diagnostics", None)
        self._logged = self._logged if found is None else found.step
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        self._warn(state, values.get("merge/drift", 0.0))

    def _warn(self, state: TrainerState, far: float) -> None:
        if far > self.warn_above and not self._warned and state.is_world_process_zero:
            self._warned = True
            warnings.warn(far_sentence(state.global_step, far), DriftWarning, stacklevel=2)
