"""``trimtab data score``: how well a reward tells the better of two responses that people ranked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from trimtab.data.formats import detect
from trimtab.data.messages import user
from trimtab.data.origin import open_source
from trimtab.data.outcome import REASONS, BadRow, Dropped
from trimtab.data.pipeline import at_place, check_prompt, is_empty
from trimtab.data.readers import Record
from trimtab.errors import UserError
from trimtab.files import write_json
from trimtab.ranking.scoring import Group, checked_target, score_groups
from trimtab.recipe import Source
from trimtab.rewards import load_reward, pairwise_accuracy, unequal_pairs
from trimtab.rewards.loading import Sources, find_rewards
from trimtab.rewards.reward import prompt_key
from trimtab.terminal import plain_libraries

LeftOut = Counter[tuple[str, str]]
"""What was left out: of ``rows`` or ``responses`` how many, by reason."""


@dataclass(frozen=True)
class _Ranked:
    prompt: Any
    responses: list[str]
    scores: list[float]
    row: dict[str, Any]


def score(
    path: str,
    scorer: Sources,
    *,
    key: str = "scorer",
    out: str | None = None,
    chat: bool = False,
    batch_size: int = 8,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a reward on pairs, or on ranked responses: all pairs of unequal scores within a prompt.

    Args:
        path: pairs or ranked responses, in any format that ``method: rrhf`` reads.
        scorer: a reward as :func:`~trimtab.rewards.load_reward` takes it.
        key: where the user named it, for errors.
        out: a JSON file for the result, with every score.
        chat: read prompts that are text as a user's message.
        batch_size: rows scored at once.
        overwrite: replace ``out``.
        console: where the summary is printed; default stdout.

    Returns:
        What :func:`~trimtab.rewards.pairwise_accuracy` gives, and of each prompt the scores of the file and
        the reward's.

    Raises:
        UserError: for a missing or malformed file, one without a pair, or an output that exists.
    """
    target = None if out is None else checked_target(out, ".json", [path], overwrite)
    find_rewards(scorer, key=key)
    with plain_libraries():
        rows, left_out = _read(path, chat)
        reward = load_reward(scorer, key=key, batch_size=batch_size)
        groups = [Group(row.prompt, row.responses, [row.row] * len(row.responses)) for row in rows]
        values = score_groups(reward, groups)
    result = _measured(rows, values)
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{escape(reward.name)}: {escape(result['summary'])}", soft_wrap=True)
    for (what, reason), count in (+left_out).items():
        console.print(f"  {count:,} {what} left out: {REASONS[reason]}", soft_wrap=True)
    truncated = getattr(reward, "truncated", 0)
    if truncated:
        console.print(f"  {truncated:,} responses were scored without the start of their prompt: too long")
    if target is not None:
        write_json(target, {"reward": reward.name, "data": path, **result})
    return result


def _read(path: str, chat: bool) -> tuple[list[_Ranked], LeftOut]:
    rows, left_out = [], LeftOut()
    for record in open_source(Source(path=path), "eval").records():
        try:
            rows.append(_ranked(record, chat, left_out))
        except Dropped as dropped:
            left_out["rows", dropped.reason] += 1
    if not rows:
        reasons = ", ".join(f"{count:,} {what}: {REASONS[why]}" for (what, why), count in (+left_out).items())
        raise UserError(f"{path} has no pair to measure on; left out: {reasons}")
    return rows, left_out


def _ranked(record: Record, chat: bool, left_out: LeftOut) -> _Ranked:
    """A row with the responses that are not empty and differ.

    Raises:
        Dropped: if fewer than two are left, or their scores are all equal.
    """
    layout = at_place(record, detect, record.row, "rrhf")
    made = at_place(record, layout.read, record.row)
    texts = [at_place(record, _text, response) for response in made["responses"]]
    prompt = made["prompt"]
    check_prompt(prompt)
    said = [place for place, text in enumerate(texts) if not is_empty(text)]
    first = [place for place in said if texts.index(texts[place]) == place]
    left_out["responses", "empty_response"] += len(texts) - len(said)
    left_out["responses", "repeated"] += len(said) - len(first)
    scores = [made["scores"][place] for place in first]
    if len(first) < 2:
        raise Dropped("few_left")
    if len(set(scores)) == 1:
        raise Dropped("tie")
    prompt = [user(prompt)] if chat and isinstance(prompt, str) else prompt
    return _Ranked(prompt, [texts[place] for place in first], scores, record.row)


def _text(response: Any) -> str:
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0]["role"] != "assistant" or response[0].get("tool_calls"):
        raise BadRow("a response is more than one message of the assistant's; only single texts are scored")
    text: str = response[0]["content"]
    return text


def _measured(rows: Sequence[_Ranked], values: Sequence[list[float]]) -> dict[str, Any]:
    by_prompt = [unequal_pairs(row.scores, given) for row, given in zip(rows, values, strict=True)]
    found = pairwise_accuracy(
        [pair for pairs in by_prompt for pair in pairs],
        prompts=len({prompt_key(row.prompt) for row in rows}),
        statement="the better response scores higher",
        kind="ranked",
    )
    scores = [{"scores": row.scores, "values": given} for row, given in zip(rows, values, strict=True)]
    return {**found, "scores": scores}
