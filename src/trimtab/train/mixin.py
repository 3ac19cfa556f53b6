"""The seam between trimtab's optimizers and any transformers or TRL trainer."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.optim import averaged_weights
from trimtab.train.diagnostics_callback import DiagnosticsCallback
from trimtab.train.optimizers import OptimizerPlan, unwrapped


class OnlineMergingMixin:
    """Gives any transformers or TRL trainer an optimizer that is built from named parameters.

    Mix it in front of a trainer and say what to build. It overrides ``create_optimizer`` because the other
    ways in are shut somewhere: ``optimizers=`` is refused under FSDP, and TRL's DPO trainer takes no
    ``optimizer_cls_and_kwargs``.

    Works in one process and with DDP, with gradient accumulation, mixed precision and activation
    checkpointing. What the optimizer measures about its merges comes into the logs
    (:class:`~trimtab.train.diagnostics_callback.DiagnosticsCallback`).

    Args:
        *args: the trainer's own arguments.
        optimizer_plan: what to build.
        **kwargs: the trainer's own keyword arguments.

    Raises:
        UserError: if the trainer runs under DeepSpeed or FSDP1, which hand flat slices of parameters to the
            optimizer, so that no tensor can be told from another.

    Examples:
        >>> from trl import DPOTrainer                                                   # doctest: +SKIP
        >>> class Trainer(OnlineMergingMixin, DPOTrainer): ...                           # doctest: +SKIP
        >>> plan = OptimizerPlan(lambda groups: OnDARE(groups, delta, reserve_rate=0.01, merge_weight=1e-7))
        ...                                                                              # doctest: +SKIP
        >>> Trainer(model, reference, optimizer_plan=plan, train_dataset=pairs).train()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, optimizer_plan: OptimizerPlan, **kwargs: Any) -> None:
        self.optimizer_plan = optimizer_plan
        self._scheduled: torch.optim.Optimizer | None = None
        super().__init__(*args, **kwargs)
        self._refuse_flat_parameters()
        drift = optimizer_plan.drift
        DiagnosticsCallback(expected=None if drift is None else drift.after).attach(self)

    def _refuse_flat_parameters(self) -> None:
        if self.is_deepspeed_enabled:
            raise UserError(
                "DeepSpeed hands the optimizer one flat slice per group, so the reference delta cannot be "
                "told apart by parameter; use DDP (torchrun without a DeepSpeed config)"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1:
            raise UserError(
                "FSDP version 1 flattens parameters, so the reference delta cannot be told apart by "
                "parameter; use DDP (torchrun without an FSDP config)"
            )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the planned optimizer over the trainable parameters, by name.

        Args:
            model: the model to take parameters from; the trainer's own when None.

        Returns:
            The optimizer, also kept as ``self.optimizer``.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            self.optimizer = self.optimizer_plan.build(model, decayed, trainer=self)
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the model, with the averaged weights where the optimizer has an EMA."""
        with averaged_weights(self.optimizer):
            return super().evaluate(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the learning rate's scheduler, and schedule α and p where the plan says so."""
        if self.lr_scheduler is None:
            target = unwrapped(optimizer or self.optimizer)
            if self._scheduled is not target:  # a second train() keeps its optimizer
                self.optimizer_plan.schedule(target, num_training_steps)
                self._scheduled = target
            custom = self.optimizer_plan.learning_rate
            if custom is not None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer or self.optimizer, lambda step: custom(step, num_training_steps)
                )
                self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)
