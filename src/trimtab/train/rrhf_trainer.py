"""RRHF (arXiv 2304.05302) on transformers' Trainer, and the trained model's accuracy as the judge it becomes.

Shapes: B prompts of a micro-batch, R responses of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from trimtab.errors import UserError
from trimtab.losses import RRHFTerms, length_normalized, rrhf_loss, rrhf_terms
from trimtab.losses.rrhf import FtNormalization
from trimtab.rewards import pairwise_accuracy, unequal_pairs
from trimtab.rewards.ranked_batches import (
    Batch,
    Layout,
    RRHFCollator,
    check_shared_prefix,
    padding_token,
    plain_head,
    response_log_probabilities,
)
from trimtab.train.guard import GuardedTrainer

COUNTED = ("pairs", "ordered", "others", "lead", "responses", "length", "tied", "prompts")
"""What is summed over prompts beside the two parts of the loss."""


@dataclass(frozen=True)
class RRHFSettings:
    """The loss and how prompts are laid out.

    Args:
        length_exponent: γ of p = Σ log P / ‖y‖^γ; 1 in the paper.
        rank_weight: w of L = w · L_rank + L_ft; 1 in the paper's scripts.
        margin: by how much a better response should lead, in units of p; 0 in the paper.
        ft_normalization: L_ft averaged over prompts (``sum``: the paper's Eq. 4) or over tokens of the best
            responses (``token_mean``: what SFT does).
        layout: each prompt read once for all its responses, or once for each (:class:`RRHFCollator`).
    """

    length_exponent: float = 1.0
    rank_weight: float = 1.0
    margin: float = 0.0
    ft_normalization: FtNormalization = "sum"
    layout: Layout = "shared_prefix"


class RRHFTrainer(Trainer):
    """Trains on rows ``{prompt_ids, response_ids: [k lists], scores: [k]}``; k may differ between rows.

    The prompts of the global batch are averaged: loss and gradients are the same however it is split into
    micro-batches and processes. ``per_device_train_batch_size`` counts prompts.

    Logged beside ``loss`` = w · ``loss/rank`` + ``loss/ft``: ``rewards/accuracies`` (share of the pairs with
    different scores that the model orders as the scores do), ``rewards/margins`` (mean of p_best − p_other
    over all other responses), ``response_length`` (mean, in tokens) and ``tied_prompts`` (share of prompts
    whose scores are all equal, so that they add to L_ft only). Evaluation gives the same over the held-out
    rows, each counted once.

    Args:
        model: a causal language model.
        args: transformers' arguments.
        settings: the loss and the layout.
        processing_class: the tokenizer; it says what padding is made of.
        data_collator: an :class:`RRHFCollator`; made from the settings when None.
        **kwargs: transformers' own. ``compute_metrics`` is taken.

    Raises:
        UserError: if the model cannot read a shared prefix, or several devices are driven by one process.

    Examples:
        >>> rows = [{"prompt_ids": [5, 6], "response_ids": [[7], [8, 9]], "scores": [0.1, 0.7]}]
        >>> RRHFTrainer(model, arguments, train_dataset=Dataset.from_list(rows)).train()  # doctest: +SKIP
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        settings: RRHFSettings | None = None,
        processing_class: Any = None,
        data_collator: Callable[..., Batch] | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = settings or RRHFSettings()
        collator = data_collator or RRHFCollator(padding_token(processing_class), self.settings.layout)
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=collator,
            compute_metrics=self._held_out_metrics,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise UserError(
                f"one process drives {self.args.n_gpu} GPUs, and RRHF's batches cannot be split among them; "
                "start one process a GPU with torchrun"
            )
        if getattr(collator, "layout", None) == "shared_prefix":
            check_shared_prefix(self.model)
        self._head = None if self.args.torch_compile else plain_head(self.model)
        self._window: torch.Tensor | None = None
        self._window_start = 0

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The share of a micro-batch in the global batch's loss.

        Args:
            model: the model or its wrapper.
            inputs: of :class:`RRHFCollator`.
            return_outputs: whether to return the terms as well.
            num_items_in_batch: prompts and tokens of best responses of the global batch, shape (2,); those of
                ``inputs`` when None.

        Returns:
            The share, times the number of processes, because DDP averages gradients over them.
        """
        terms = self._terms(model, inputs)
        counts = _counts(inputs) if num_items_in_batch is None else num_items_in_batch
        prompts, ft_tokens = counts.to(terms.rank.device)
        normalization = self.settings.ft_normalization
        how = {"ft_normalization": normalization, "prompts": prompts, "ft_tokens": ft_tokens}
        loss = rrhf_loss(terms, rank_weight=self.settings.rank_weight, **how)
        if model.training:
            self._collect(terms, prompts, prompts if normalization == "sum" else ft_tokens)
        loss = loss * self.args.world_size if num_items_in_batch is not None else loss
        return (loss, terms) if return_outputs else loss

    def _terms(self, model: Any, inputs: Batch) -> RRHFTerms:
        logps_R = response_log_probabilities(self.model, inputs, head=self._head, through=model)
        return rrhf_terms(
            logps_R,
            inputs["lengths"],
            inputs["ranks"],
            inputs["groups"],
            prompts=inputs["group_sizes"].shape[0],
            length_exponent=self.settings.length_exponent,
            margin=self.settings.margin,
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> torch.Tensor | None:
        """What the global batch's loss is divided by, in the place where the Trainer counts labels."""
        if not batch_samples:
            return None
        local = torch.stack([_counts(batch) for batch in batch_samples]).sum(0).float().to(device)
        total: torch.Tensor = self.accelerator.reduce(local, "sum")
        return total

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "response_ids", "scores"]

    def _collect(self, terms: RRHFTerms, prompts: torch.Tensor, divisor: torch.Tensor) -> None:
        counted = _counted(terms).sum(0)
        sums = torch.cat([torch.stack([terms.rank.sum() / prompts, terms.ft.sum() / divisor]), counted])
        if self._window is None:
            self._window, self._window_start = torch.zeros_like(sums), self.state.global_step
        self._window = self._window + sums.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was collected since the last log, over all processes.

        Args:
            logs: what the Trainer logs.
            start_time: of the training.
        """
        if "loss" in logs and self._window is not None:
            sums = self.accelerator.reduce(self._window, "sum").tolist()
            steps = max(1, self.state.global_step - self._window_start)
            logs.update({"loss/rank": sums[0] / steps, "loss/ft": sums[1] / steps, **_metrics(sums[2:])})
            self._window = None
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: Any,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """The terms of every prompt, shape (B, …), in the places of predictions and labels.

        The Trainer gathers them, drops those it repeated to fill up a batch, and hands them to the metrics:
        so the loss is exact however the held-out rows are split.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            terms = self._terms(model, inputs)
        rows = torch.cat([torch.stack([terms.rank, terms.ft, terms.ft_tokens], 1), _counted(terms)], 1)
        return None, rows, rows

    def _held_out_metrics(self, found: EvalPrediction) -> dict[str, float]:
        rank, ft, ft_tokens, *counted = found.predictions.astype("float64").sum(0).tolist()
        prompts = counted[COUNTED.index("prompts")]
        rank, ft = rank / prompts, ft / (prompts if self.settings.ft_normalization == "sum" else ft_tokens)
        loss = self.settings.rank_weight * rank + ft
        return {"loss": loss, "loss/rank": rank, "loss/ft": ft, **_metrics(counted)}


class MergingRRHFTrainer(GuardedTrainer, RRHFTrainer):
    """RRHF with an optimizer built from named parameters and what a run adds; arguments of both."""

    def final_results(self) -> dict[str, Any]:
        """The pairwise accuracy on the held-out responses as ``rewards``; nothing where no scores differ."""
        measured = [] if self.eval_dataset is None else self.held_out_values()
        pairs = [pair for one in measured for pair in unequal_pairs(one["ranks"], one["values"])]
        if not pairs:
            return {}
        prompts = {tuple(row["prompt_ids"]) for row in self.eval_dataset if len(set(row["scores"])) > 1}
        statement = "the better response has the higher length-normalized log-probability"
        found = pairwise_accuracy(pairs, prompts=len(prompts), statement=statement)
        return {"rewards": {**found, "scores": measured}}

    @torch.no_grad()
    def held_out_values(self) -> list[dict[str, list[float]]]:
        """The length-normalized log-probability of every held-out response.

        Returns:
            Of each prompt, ``values`` p in nats, and ``ranks``: the place of a response's score among the
            distinct scores of its prompt, 0 the lowest.
        """
        training = self.model.training
        self.model.eval()
        most = max(map(len, self.eval_dataset["scores"]))
        found = []
        for batch in self.get_eval_dataloader():
            table_BK2 = self._ranks_and_values(self._prepare_inputs(batch), most)
            found += self.accelerator.gather_for_metrics(table_BK2).tolist()
        self.model.train(training)
        there = [[response for response in responses if response[0] >= 0] for responses in found]
        return [
            {"ranks": [int(rank) for rank, _ in responses], "values": [value for _, value in responses]}
            for responses in there
        ]

    def _ranks_and_values(self, batch: Batch, most: int) -> torch.Tensor:
        """Of each prompt's at most K responses the rank and p, shape (B, K, 2); −1 where there are fewer."""
        with self.compute_loss_context_manager():
            logps_R = response_log_probabilities(self.model, batch, head=self._head)
        values_R = length_normalized(logps_R.float(), batch["lengths"], self.settings.length_exponent)
        sizes_B = batch["group_sizes"]
        starts_R = (sizes_B.cumsum(0) - sizes_B)[batch["groups"]]
        places_R = torch.arange(values_R.shape[0], device=values_R.device) - starts_R
        table_BK2 = values_R.new_full((sizes_B.shape[0], most, 2), -1.0)
        table_BK2[batch["groups"], places_R] = torch.stack([batch["ranks"].float(), values_R], dim=1)
        return table_BK2


def _counts(batch: Batch) -> torch.Tensor:
    """Prompts and tokens of the best responses of a batch, shape (2,)."""
    nothing = torch.zeros(batch["lengths"].shape, device=batch["lengths"].device)
    prompts = batch["group_sizes"].shape[0]
    terms = rrhf_terms(nothing, batch["lengths"], batch["ranks"], batch["groups"], prompts=prompts)
    return torch.stack([torch.ones_like(terms.ft_tokens).sum(), terms.ft_tokens.sum()])


def _counted(terms: RRHFTerms) -> torch.Tensor:
    """What :data:`COUNTED` names, of every prompt, shape (B, 8)."""
    tied = ((terms.pairs == 0) & (terms.responses > 1)).to(terms.pairs.dtype)
    more = {"tied": tied, "prompts": torch.ones_like(tied)}
    return torch.stack([more[name] if name in more else getattr(terms, name) for name in COUNTED], 1)


def _metrics(sums: Sequence[float]) -> dict[str, float]:
    of = dict(zip(COUNTED, sums, strict=True))
    return {
        **({"rewards/accuracies": of["ordered"] / of["pairs"]} if of["pairs"] else {}),
        **({"rewards/margins": of["lead"] / of["others"]} if of["others"] else {}),
        "response_length": of["length"] / of["responses"],
        "tied_prompts": of["tied"] / of["prompts"],
    }
