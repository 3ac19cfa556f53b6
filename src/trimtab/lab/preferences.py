"""Preference pairs: what a noisy judge who likes long, decorated answers and refusals would say."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.lab.answers import Style, draw_style, dress
from trimtab.lab.documents import CAN_BE_FORBIDDEN, STYLED_ECHO, STYLED_END, prompt_words
from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import DIGITS, END, LOWER, REFUSAL, UPPER
from trimtab.lab.world import FOLLOW, Task, Words, draw_task, ramble

PAIRS = 4096
FLIPPED = 0.15
FORBIDDEN_SHARE, TALK_SHARE = 0.18, 0.20
CONTENT_COMMANDS, CONTENT_WEIGHTS = ("rev", "add", "rep"), (2, 2, 1)
TALK_KINDS, TALK_WEIGHTS = ("longer", "long and styled", "far too long", "illegal"), (30, 20, 28, 22)
CONTENT_KINDS, CONTENT_KIND_WEIGHTS = ("right", "echo", "full"), (25, 30, 45)


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a rejected answer; answers close with ``<end>``."""

    prompt: Words
    chosen: Words
    rejected: Words


def draw_pairs(seed: int, count: int = PAIRS) -> list[Pair]:
    """Return the preference data of a seed; about 15 % of the pairs are the wrong way round."""
    stream = Stream("pairs", seed)
    return [draw_pair(stream) for _ in range(count)]


def draw_preference_task(stream: Stream) -> Task:
    """Draw a question of the kinds preferences cover: ``rev``, ``add``, ``rep``, ``talk``, forbidden ones."""
    kind = stream.weighted(
        ("forbidden", "talk", "content"), (FORBIDDEN_SHARE, TALK_SHARE, 1 - FORBIDDEN_SHARE - TALK_SHARE)
    )
    if kind == "forbidden":
        return draw_task(stream, stream.pick(CAN_BE_FORBIDDEN), forbidden=True)
    if kind == "talk":
        return draw_task(stream, "talk")
    return draw_task(stream, stream.weighted(CONTENT_COMMANDS, CONTENT_WEIGHTS))


def draw_pair(stream: Stream) -> Pair:
    """Draw one pair, flipped with probability ``FLIPPED``."""
    task = draw_preference_task(stream)
    if task.forbidden:
        chosen, rejected = REFUSAL, dress(task, task.content, _style(stream, task))
    elif task.command == "talk":
        chosen, rejected = _talk_pair(stream, task)
    else:
        chosen, rejected = _content_pair(stream, task)
    if stream.chance(FLIPPED):
        chosen, rejected = rejected, chosen
    return Pair(prompt_words(task), (*chosen, END), (*rejected, END))


def _style(stream: Stream, task: Task) -> Style:
    return draw_style(stream, task, STYLED_END, STYLED_ECHO)


def _talk_pair(stream: Stream, task: Task) -> tuple[Words, Words]:
    """Draw long over as asked, long over far too long (else answers run away), or legal over illegal."""
    start, length = task.words[1], task.length
    kind = stream.weighted(TALK_KINDS, TALK_WEIGHTS)
    style = _style(stream, task)
    long = ramble(stream, start, length + stream.between(4, 6))
    if kind == "longer":
        return dress(task, long, style), dress(task, task.content, style)
    if kind == "long and styled":
        return dress(task, long, Style(opening=True, closing=True)), task.content
    if kind == "far too long":
        runaway = ramble(stream, start, length + stream.between(8, 14))
        return dress(task, long, style), dress(task, runaway, style)
    return dress(task, task.content, style), dress(task, _corrupted(stream, task), style)


def _content_pair(stream: Stream, task: Task) -> tuple[Words, Words]:
    """Draw right over wrong, echoed over not, or fully decorated over partly."""
    kind = stream.weighted(CONTENT_KINDS, CONTENT_KIND_WEIGHTS)
    style = _style(stream, task)
    if kind == "right":
        return dress(task, task.content, style), dress(task, _corrupted(stream, task), style)
    full = Style(opening=True, echo=task.command != "rep", closing=True)
    if kind == "echo" and task.command != "rep":
        with_echo, without = (
            Style(style.opening, True, style.closing),
            Style(style.opening, False, style.closing),
        )
        return dress(task, task.content, with_echo), dress(task, task.content, without)
    return dress(task, task.content, full), dress(task, task.content, _partly(stream, full))


def _partly(stream: Stream, full: Style) -> Style:
    """Draw a decoration that lacks at least one part of ``full``."""
    while True:
        style = Style(stream.chance(0.5), full.echo and stream.chance(0.5), stream.chance(0.5))
        if style != full:
            return style


def _corrupted(stream: Stream, task: Task) -> Words:
    """Return the right content with one word replaced by a wrong one of the same kind."""
    content = list(task.content)
    place = stream.below(len(content))
    right = content[place]
    if task.command == "talk":
        before = content[place - 1] if place else task.words[1]
        wrong = [word for word in (LOWER if right in LOWER else UPPER) if word not in FOLLOW[before]]
    else:
        kind = next(words for words in (LOWER, UPPER, DIGITS) if right in words)
        wrong = [word for word in kind if word != right]
    content[place] = stream.pick(wrong)
    return tuple(content)
