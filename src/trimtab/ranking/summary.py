"""What ``trimtab data rank`` says when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.data.outcome import REASONS
from trimtab.ranking.candidates import Candidates, Question, Tally
from trimtab.terminal import say


@dataclass(frozen=True)
class Ranked:
    """What was ranked.

    Args:
        candidates: everything that was read and generated.
        questions: those that were ranked.
        left_out: rows of the file of prompts that have none.
        truncated: inputs that were too long for what scores.
        replaced: whether the files had scores, which were not used.
    """

    candidates: Candidates
    questions: Sequence[Question]
    left_out: int
    truncated: int
    replaced: bool

    @property
    def single(self) -> int:
        """Prompts with one response only."""
        return sum(len(question.candidates) == 1 for question in self.candidates.questions.values())

    @property
    def silent(self) -> int:
        """Prompts without a response."""
        return sum(not question.candidates for question in self.candidates.questions.values())

    @property
    def tied(self) -> int:
        """Ranked prompts whose scores are all equal."""
        return sum(question.is_tied for question in self.questions)


def show_ranked(ranked: Ranked, out: str, console: Console) -> None:
    """Print the table and what to know besides; warnings go to the error stream."""
    console.print(_table(ranked))
    for line in _lines(ranked):
        console.print(f"  {line}", soft_wrap=True, markup=False)
    count = sum(len(question.candidates) for question in ranked.questions)
    console.print(
        f"{len(ranked.questions):,} prompts with {count:,} ranked responses: {escape(out)}", soft_wrap=True
    )
    if ranked.single:
        say(f"warning: prompts with a single response, which were left out: {ranked.single:,}")
    if ranked.tied:
        say(
            f"warning: prompts whose scores are all equal: {ranked.tied:,} (kept; they rank nothing, and "
            "method rrhf learns the first response)"
        )


def _table(ranked: Ranked) -> Table:
    table = Table(title="outputs, joined by prompt", title_justify="left")
    table.add_column("source", overflow="fold")
    tallies = ranked.candidates.tallies
    generated = any(tally.cut or tally.without_room for tally in tallies)
    columns = ["rows", "prompts", "missing", "responses", "empty", "repeated"]
    columns += ["no room", "cut"] if generated else []
    for column in (*columns, "ranked", "mean score", "best"):
        table.add_column(column, justify="right")
    for tally in tallies:
        counts = [tally.rows, len(tally.prompts), ranked.candidates.missing(tally), tally.responses]
        counts += [tally.empty, tally.repeated, *([tally.without_room, tally.cut] if generated else [])]
        table.add_row(escape(tally.name), *(f"{count:,}" for count in counts), *_worth(tally, ranked))
    return table


def _worth(tally: Tally, ranked: Ranked) -> tuple[str, str, str]:
    """How many responses of a source were ranked, their mean score, and how often one of them is the best.

    A prompt with several best responses counts for the first of them, and one whose scores are all equal for
    none.
    """
    scores, best, telling = [], 0, 0
    for question in ranked.questions:
        scores += [candidate.score for candidate in question.candidates if candidate.origin is tally]
        if not question.is_tied:
            telling += 1
            best += max(question.candidates, key=lambda candidate: candidate.score).origin is tally
    mean = f"{sum(scores) / len(scores):.4g}" if scores else "–"
    return f"{len(scores):,}", mean, f"{best / telling:.0%}" if telling else "–"


def _lines(ranked: Ranked) -> Iterator[str]:
    dropped: Counter[str] = Counter()
    for tally in ranked.candidates.tallies:
        dropped += tally.dropped
    for reason, words in REASONS.items():
        if dropped[reason]:
            yield f"{dropped[reason]:,} rows left out: {words}"
    if ranked.left_out:
        yield f"{ranked.left_out:,} rows of the prompts left out: no prompt that can be answered"
    if ranked.silent:
        yield f"{ranked.silent:,} prompts left out: no response"
    if ranked.replaced:
        yield "the scores that the files have were not used"
    if ranked.truncated:
        yield f"{ranked.truncated:,} responses were scored without the start of their prompt: too long"
