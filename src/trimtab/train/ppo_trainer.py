"""PPO on transformers' Trainer: which rollout, which minibatch of it, its loss, and how it is resumed.

What a step does follows from the seed, the step's number, the weights and the rollout. So beside what every
checkpoint has, a resumed run needs the value head, the rollout in use and the penalty's weight.

Shapes: R responses of this process's rollout, N response tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from trimtab.errors import UserError
from trimtab.losses import adapted_kl_coefficient, clipped_surrogate, clipped_value_loss
from trimtab.recipe import PPOLoss
from trimtab.rewards import WeightedSum
from trimtab.sampling import generator
from trimtab.train.guard import GuardedTrainer
from trimtab.train.ppo_model import (
    Batch,
    add_value_head,
    read_tokens,
    sequences,
    switch_dropout_off,
    without_value_head,
)
from trimtab.train.ppo_rollout import Rollout, RolloutMaker

STEP_METRICS = ("loss/policy", "loss/value", "clip_fraction", "value_clip_fraction", "approx_kl", "ratio")
"""Means over the tokens of a minibatch."""

HEAD_FILE = "value_head.safetensors"


class PPOTrainer(Trainer):
    """Trains on rows ``{prompt, prompt_ids, row}`` (:mod:`trimtab.data.prompts`).

    One optimizer step is a minibatch of ``per_device_train_batch_size`` × ``gradient_accumulation_steps``
    responses of each process. Prompts come in random orders, one pass over the rows after the other. Losses,
    whitening and the penalty's controller are over all processes. Dropout is off.

    Logged with ``loss`` = ``loss/policy`` + c · ``loss/value``, as means over the steps since the last log:
    :data:`STEP_METRICS`, and of the rollouts that these steps learned from ``reward`` (before any penalty),
    ``rewards/<name>/mean`` (of its parts), ``objective`` (after the penalties), ``kl`` (to the reference, in
    nats a response), ``kl_coefficient``, ``entropy`` (in nats a token), ``explained_variance``,
    ``response_length`` (in tokens) and ``ended_by_eos`` (a share). Evaluation answers the held-out prompts,
    with the same random numbers every time.

    Args:
        model: a causal language model, or PEFT's wrapper of one; it gets a ``value_head``.
        args: transformers' arguments.
        settings: the loss section of the recipe.
        reference: frozen; None where it is the model with its adapter off.
        reward: scores responses.
        processing_class: the tokenizer.
        **kwargs: transformers' own.

    Raises:
        UserError: if the model has no output embedding, or several devices are driven by one process.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        settings: PPOLoss,
        reference: Any,
        reward: WeightedSum,
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise UserError(
                f"one process drives {args.n_gpu} GPUs, and PPO's rollouts cannot be split among them; "
                "start one process a GPU with torchrun"
            )
        add_value_head(model)
        switch_dropout_off(model)
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.settings, self.kl_coefficient = settings, settings.beta
        self.maker = RolloutMaker(
            model,
            reference=None if reference is None else reference.to(self.args.device),
            reward=reward,
            tokenizer=processing_class,
            settings=settings,
            seed=self.args.seed,
            batch_size=self.args.per_device_train_batch_size,
            reading=self.accelerator.autocast,  # of the reference too, which accelerate does not prepare
            total=self._total,
        )
        self.rollout: Rollout | None = None
        self._window: list[dict[str, float]] = []
        self._step_sums = torch.zeros(len(STEP_METRICS), device=self.args.device)

    # Which rollout, which minibatch of it, which prompts.

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that learn from one rollout."""
        return self.settings.minibatches * self.settings.epochs

    @property
    def rows_per_step(self) -> int:
        """Responses of this process in a minibatch."""
        return int(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps)

    @property
    def rows_per_rollout(self) -> int:
        """R, the responses of this process in a rollout."""
        return self.settings.minibatches * self.rows_per_step

    def get_train_dataloader(self) -> DataLoader:
        """A place for each micro-batch of a pass over the rows; what is in it comes with the rollout."""
        rollouts = -(-len(self.train_dataset) // (self.rows_per_rollout * self.args.world_size))
        places = rollouts * self.steps_per_rollout * self.args.gradient_accumulation_steps
        return DataLoader(range(places), batch_size=1)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The micro-batches of a step, after a new rollout where it is time, and all processes' tokens."""
        for _ in range(num_batches):
            next(epoch_iterator)
        number, place = divmod(self.state.global_step, self.steps_per_rollout)
        if place == 0:
            self.rollout = self.maker.make(*self._prompts(number), self.kl_coefficient)
            self._adapt(self.rollout.metrics["kl"])
        assert self.rollout is not None, "a checkpoint holds the rollout in use"
        self._window.append(self.rollout.metrics)
        rows, size = self._minibatch(number, place), self.args.per_device_train_batch_size
        batches = [self._collate(rows[first : first + size]) for first in range(0, len(rows), size)]
        tokens = torch.stack([batch["response_mask"].sum() for batch in batches]).sum()
        return batches, self._total(tokens.to(device))

    def _adapt(self, kl: float) -> None:
        """Set the penalty's weight for the next rollout."""
        target = self.settings.kl_target
        if target is not None:
            gain = self.settings.kl_gain
            self.kl_coefficient = adapted_kl_coefficient(self.kl_coefficient, kl, target, gain)

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        found: torch.Tensor = self.accelerator.reduce(values, "sum")
        return found

    def _minibatch(self, number: int, place: int) -> list[int]:
        epoch, minibatch = divmod(place, self.settings.minibatches)
        key = (self.args.seed, "minibatches", number, epoch, self.args.process_index)
        order: list[int] = torch.randperm(self.rows_per_rollout, generator=generator(*key)).tolist()
        return order[minibatch * self.rows_per_step : (minibatch + 1) * self.rows_per_step]

    def _collate(self, rows: list[int]) -> Batch:
        assert self.rollout is not None
        pairs = [(self.rollout.prompt_ids[row], self.rollout.response_ids[row]) for row in rows]
        batch = sequences(pairs, self.maker.padding)
        longest = batch["response_mask"].shape[1]
        tables = ("logps", "values", "advantages", "returns")
        return batch | {name: getattr(self.rollout, name)[rows, :longest] for name in tables}

    def _prompts(self, number: int) -> tuple[list[dict[str, Any]], list[int]]:
        """Rows of a rollout for this process, and where they stand in the endless sequence of prompts."""
        first = (number * self.args.world_size + self.args.process_index) * self.rows_per_rollout
        places, count = range(first, first + self.rows_per_rollout), len(self.train_dataset)
        orders = {
            turn: torch.randperm(count, generator=generator(self.args.seed, "prompts", turn)).tolist()
            for turn in {place // count for place in places}
        }
        return [self.train_dataset[orders[at // count][at % count]] for at in places], list(places)

    # A step.

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The share of a micro-batch in the loss of the global minibatch.

        Args:
            model: the model or its wrapper.
            inputs: a micro-batch.
            return_outputs: not supported: there is nothing else to return.
            num_items_in_batch: response tokens of the global minibatch.

        Returns:
            The share, times the number of processes, because DDP averages gradients over them.
        """
        assert not return_outputs
        settings, mask = self.settings, inputs["response_mask"]
        old = {name: inputs[name][mask] for name in ("logps", "values", "advantages", "returns")}
        how = {"head": self.model.value_head, "temperature": settings.temperature}
        logps_N, values_N, _ = read_tokens(self.model, inputs, through=model, **how)
        policy = clipped_surrogate(logps_N, old["logps"], old["advantages"], settings.clip)
        value = clipped_value_loss(values_N, old["values"], old["returns"], settings.value_clip)
        seen = (policy.loss, value.loss, policy.clipped, value.clipped, policy.approximate_kl, policy.ratio)
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        self._step_sums += torch.stack([one.detach().sum() / tokens for one in seen])
        loss = (policy.loss + settings.value_coefficient * value.loss).sum() / tokens
        return loss if num_items_in_batch is None else loss * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the steps since the last log.

        Args:
            logs: what the Trainer logs.
            start_time: of the training.
        """
        if "loss" in logs and self._window:
            steps, sums = len(self._window), self._total(self._step_sums).tolist()
            logs.update({name: value / steps for name, value in zip(STEP_METRICS, sums, strict=True)})
            logs.update({name: _mean([one[name] for one in self._window]) for name in self._window[0]})
            self._window, self._step_sums = [], torch.zeros_like(self._step_sums)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer held-out prompts and log what the answers are worth.

        Args:
            eval_dataset: other rows than the trainer's.
            ignore_keys: without effect.
            metric_key_prefix: what the names of the metrics begin with.

        Raises:
            UserError: if there are fewer rows than processes.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if len(rows) < self.args.world_size:
            raise UserError(
                f"{len(rows)} held-out prompts cannot be split among {self.args.world_size} processes"
            )
        places = range(self.args.process_index, len(rows), self.args.world_size)
        judged = self.maker.judge([rows[place] for place in places], [-1 - place for place in places])
        means = self.maker.means(judged.sums())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints: the model is saved as it came, the rest beside it.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_value_head(self.model) as head:
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_file(head.state_dict(), Path(output_dir or self.args.output_dir) / HEAD_FILE)

    def _save_rng_state(self, output_dir: str) -> None:
        """What each process has of its own: random states, and the rollout where it is not used up."""
        super()._save_rng_state(output_dir)
        in_use = self.rollout is not None and self.state.global_step % self.steps_per_rollout != 0
        state = {"kl_coefficient": self.kl_coefficient, "rollout": asdict(self.rollout) if in_use else None}
        torch.save(state, self._rollout_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with without_value_head(self.model) as head:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        head.load_state_dict(load_file(Path(resume_from_checkpoint) / HEAD_FILE))
        state = torch.load(self._rollout_file(resume_from_checkpoint), weights_only=True)
        self.kl_coefficient = state["kl_coefficient"]
        self.rollout = None if state["rollout"] is None else Rollout(**state["rollout"])

    def _load_best_model(self) -> None:
        with without_value_head(self.model):
            super()._load_best_model()

    def _rollout_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_{self.args.process_index}.pt"


def _mean(values: list[float]) -> float:
    """The mean of what is a number: where all returns are equal, no variance is explained."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


class MergingPPOTrainer(GuardedTrainer, PPOTrainer):
    """PPO with an optimizer built from named parameters and what a run adds; arguments of both."""

    def trained_model(self) -> Any:
        """The policy alone, without its value head."""
        model = super().trained_model()
        del model.value_head
        return model
