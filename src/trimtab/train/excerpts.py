"""Which rows a batch holds, in words a user can search the data for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

KEPT = (
    "input_ids",
    "attention_mask",
    "completion_mask",
    "labels",
    "position_ids",
    "predictors",
    "starts",
    "prompt_ids",
    "prompt_mask",
)
"""The tensors of a batch that say what its rows are."""

LONGEST = 60
"""Characters of an excerpt."""

SHOWN = 4
"""Rows that a sentence names; the others are counted."""

Row = tuple[list[int], bool]
"""Tokens, and whether they are a prompt and not a whole row."""


def excerpts(batch: Mapping[str, torch.Tensor], tokenizer: Any) -> list[str]:
    """Return for each row of a batch how its prompt ends; where that is not known, how the row begins.

    Args:
        batch: of any method's trainer, with the tensors that :data:`KEPT` names.
        tokenizer: turns its tokens into text.

    Returns:
        Excerpts in the order of the rows, each once.
    """
    found = []
    for tokens, is_prompt in _rows(batch):
        text = tokenizer.decode(tokens, skip_special_tokens=True) or tokenizer.decode(tokens)
        text = " ".join(text.split())
        if len(text) > LONGEST:
            text = f"…{text[-LONGEST:]}" if is_prompt else f"{text[:LONGEST]}…"
        found.append(text)
    return list(dict.fromkeys(found))


def named(found: Iterable[str]) -> str:
    """Spell excerpts for a sentence.

    Examples:
        >>> named(["1 + 1 =", "2 + 2 ="]), named("abcdef")
        ("'1 + 1 =', '2 + 2 ='", "'a', 'b', 'c', 'd' and 2 more")
    """
    listed = list(dict.fromkeys(found))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(map(repr, listed[:SHOWN])) + more


def _rows(batch: Mapping[str, torch.Tensor]) -> Iterator[Row]:
    if "prompt_ids" in batch:  # GRPO and RLOO
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
            yield ids[mask.bool()].tolist(), True
        return
    ids = batch["input_ids"]
    if "predictors" in batch:  # RRHF: the first token of each response is predicted by the prompt's last
        rows, places = (batch["predictors"] // ids.shape[1], batch["predictors"] % ids.shape[1])
        for row in rows.unique().tolist():
            yield ids[row, : int(places[rows == row].min()) + 1].tolist(), True
    elif "starts" in batch:  # PPO
        for row, start in zip(ids, batch["starts"].tolist(), strict=True):
            yield row[:start].tolist(), True
    elif "completion_mask" in batch:  # DPO, IPO, KTO
        yield from (_until(row, mask == 1) for row, mask in zip(ids, batch["completion_mask"], strict=True))
    elif "labels" in batch:  # SFT
        for row, labels in _unpacked(batch):
            yield _until(row, labels != -100)
    else:  # reward models: the chosen answers of all pairs, then the rejected ones
        for chosen, rejected in zip(*ids.chunk(2), strict=True):
            yield _until(chosen, chosen != rejected)


def _until(row: torch.Tensor, answers: torch.Tensor) -> Row:
    """The tokens before the first that ``answers`` marks; all of them where it marks the first or none."""
    first = int(answers.int().argmax()) if answers.any() else 0
    return (row[:first].tolist(), True) if first else (row.tolist(), False)


def _unpacked(batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and their labels; several examples that are packed into one row, whose places start anew."""
    for index, (row, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "position_ids" not in batch:
            yield row, labels
            continue
        starts = (batch["position_ids"][index] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            yield row[start:end], labels[start:end]
