"""Losses of single rows beside the training: what regularisers take the gradients of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.data import load_data
from trimtab.errors import UserError
from trimtab.optim.loss_gradients import Losses
from trimtab.recipe import Data, Recipe, Source
from trimtab.rewards.ranked_batches import RRHFCollator, encode_ranked, response_log_probabilities
from trimtab.terminal import say

Rows = list[dict[str, Any]]
"""Answers to prompts as token ids: ``prompt_ids``, and ``response_ids`` with the one answer."""


def read_answers(recipe: Recipe, source: Source, count: int, tokenizer: Any, key: str) -> Rows:
    """Read the first rows of a source of instructions, as token ids.

    Of a conversation the last answer counts, the turns before it are its prompt.

    Args:
        recipe: gives ``data.max_length``; longer rows are left out.
        source: where the rows are.
        count: how many rows are read.
        tokenizer: the policy's.
        key: where the recipe names the source, for the sentence when something is wrong.

    Raises:
        UserError: the source is missing or malformed, or has no answers to prompts.
    """
    limit = min(count, source.limit or count)
    first = source.model_copy(update={"limit": limit, "weight": 1.0})
    data = Data(train=(first,), max_length=recipe.data.max_length)
    try:
        found = load_data(data, method="sft", part="train", tokenizer=tokenizer, seed=recipe.seed)
        encoded = [_encoded(row, tokenizer) for row in found.dataset]
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    (report,) = found.report.sources
    said = "".join(f", {number} left out ({reason})" for reason, number in report.reasons().items())
    say(f"{key}: {report.kept} of the first {report.read} rows of {first.path} are used{said}")
    return encoded


def _encoded(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    if "messages" in row:
        messages = row["messages"]
        last = max((i for i, one in enumerate(messages) if one["role"] == "assistant"), default=0)
        prompt, answer = messages[:last], messages[last : last + 1]
    elif "completion" in row:
        prompt, answer = row["prompt"], row["completion"]
    else:
        raise UserError("these rows are plain text; give prompts and their answers (messages, or completion)")
    if not prompt:
        raise UserError(f"a row has no prompt before its answer, {answer!r}; leave it out")
    return {**encode_ranked(tokenizer, prompt, [answer]), "scores": [0.0]}


def answer_losses(trainer: Any, rows: Rows) -> Losses:
    """What makes −log P per token of each answer under the policy; each process makes its share of the rows.

    Args:
        trainer: gives the model, its device and the processes.
        rows: of :func:`read_answers`.
    """
    collate = RRHFCollator(trainer.processing_class.pad_token_id, "repeated")

    def losses() -> Iterator[torch.Tensor]:
        model, arguments = trainer.accelerator.unwrap_model(trainer.model), trainer.args
        with _for_measuring(trainer):
            for row in rows[arguments.process_index :: arguments.world_size]:
                batch = {name: value.to(arguments.device) for name, value in collate([row]).items()}
                with trainer.compute_loss_context_manager():
                    logps = response_log_probabilities(model, batch)
                yield -logps.sum() / batch["lengths"].sum()

    return losses


def training_losses(trainer: Any, count: int) -> Losses:
    """What makes the method's own loss of single training rows, drawn by the seed.

    Every process makes all of them: trainers gather their metrics while they compute a loss.

    Args:
        trainer: the method's trainer.
        count: how many rows; all where there are fewer.
    """

    def losses() -> Iterator[torch.Tensor]:
        model, rows = trainer.accelerator.unwrap_model(trainer.model), trainer.train_dataset
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed))
        with _for_measuring(trainer):
            for index in drawn[:count].tolist():
                batch = trainer._prepare_inputs(trainer.data_collator([rows[index]]))
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, batch)
                yield loss

    return losses


@contextmanager
def _for_measuring(trainer: Any) -> Iterator[None]:
    """Turn dropout off, and leave the trainer's averages for the log as they are."""
    training, metrics = trainer.model.training, copy.deepcopy(getattr(trainer, "_metrics", None))
    trainer.model.eval()
    try:
        yield
    finally:
        trainer.model.train(training)
        if metrics is not None:
            trainer._metrics = metrics


def capability_sets(recipe: Recipe, tokenizer: Any) -> list[Rows]:
    """Read the rows that regularisers take gradients of: one set for each source; none without sources."""
    section = recipe.optimizer
    if section.projection is not None:
        key, count, sources = "optimizer.projection.data", section.projection.rows, section.projection.data
        return _sets(recipe, key, sources, count, tokenizer)
    return []


def fisher_rows(recipe: Recipe, tokenizer: Any) -> Rows | None:
    """Read the rows that ChildTuning-D estimates Fisher information on; None for the training rows."""
    section = recipe.optimizer.child_tuning
    if section is None or section.data is None:
        return None
    assert section.rows is not None
    sets = _sets(recipe, "optimizer.child_tuning.data", section.data, section.rows, tokenizer)
    return [row for rows in sets for row in rows]


def _sets(recipe: Recipe, key: str, sources: Sequence[Source], count: int, tokenizer: Any) -> list[Rows]:
    return [
        read_answers(recipe, source, count, tokenizer, f"{key}.{index}")
        for index, source in enumerate(sources)
    ]
