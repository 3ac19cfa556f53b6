"""Training the base model and the SFT model: two plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trimtab.lab.documents import base_batch, sft_batch
from trimtab.lab.model import new_model
from trimtab.lab.randomness import Stream

Batch = tuple[torch.Tensor, torch.Tensor]
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Stage:
    """How one stage is trained: AdamW without decay, linear warm-up, cosine to a tenth, clipped at 1."""

    steps: int
    rows: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.05
    floor: float = 0.1

    def lr_factor(self, step: int) -> float:
        """Return the share of ``lr`` at a step counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


BASE = Stage(steps=1500, rows=96, lr=4e-3)
BASE_LENGTH = 48
SFT = Stage(steps=300, rows=96, lr=4e-4, betas=(0.9, 0.999))


def base_batches(seed: int, stage: Stage = BASE) -> Iterator[Batch]:
    """Yield (ids, labels) of plain documents for ever."""
    stream = Stream("base", seed)
    while True:
        ids = base_batch(stream, stage.rows, BASE_LENGTH)
        yield ids, ids


def sft_batches(seed: int, stage: Stage = SFT) -> Iterator[Batch]:
    """Yield (ids, labels) of conversations for ever."""
    stream = Stream("sft", seed)
    while True:
        yield sft_batch(stream, stage.rows)


def fit(model: PreTrainedModel, batches: Iterator[Batch], stage: Stage, report: Report | None = None) -> None:
    """Train ``model`` in place on the next-token loss.

    Args:
        model: A causal language model.
        batches: Where (ids, labels) come from; labels are aligned with ids, -100 carries no loss.
        stage: Steps, learning rate and the rest.
        report: Called with the step (from 1) and the loss after each step.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=stage.betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.lr_factor)
    for step in range(stage.steps):
        ids, labels = next(batches)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, loss.item())
    model.eval()


def train_base(seed: int, report: Report | None = None, stage: Stage = BASE) -> PreTrainedModel:
    """Train and return the base model of a seed."""
    model = new_model(seed)
    fit(model, base_batches(seed, stage), stage, report)
    return model


def train_sft(model: PreTrainedModel, seed: int, report: Report | None = None, stage: Stage = SFT) -> None:
    """Turn the base model into the SFT model of a seed, in place."""
    fit(model, sft_batches(seed, stage), stage, report)
