"""What ``trimtab data rank`` says when it is done."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.data.outcome import REASONS
from trimtab.ranking.candidates import Candidates, Question
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
    """Print the tables and what to know besides; warnings go to the error stream."""
    console.print(_outputs(ranked))
    console.print(_standings(ranked))
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


def _outputs(ranked: Ranked) -> Table:
    tallies = ranked.candidates.tallies
    generated = any(tally.cut or tally.without_room for tally in tallies)
    columns = ["rows", "prompts", "missing", "responses", "empty", "repeated"]
    table = _made("outputs, joined by prompt", *columns, *(["no room", "cut"] if generated else []))
    for tally in tallies:
        counts = [tally.rows, len(tally.prompts), ranked.candidates.missing(tally), tally.responses]
        counts += [tally.empty, tally.repeated, *([tally.without_room, tally.cut] if generated else [])]
        table.add_row(escape(tally.name), *(f"{count:,}" for count in counts))
    return table


def _standings(ranked: Ranked) -> Table:
    """Of each source how many responses are ranked, their mean score, and how often one of them is the best.

    Where several responses to a prompt are the best, each counts for its part; prompts whose scores are all
    equal have no best one.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    best: dict[str, float] = defaultdict(float)
    for question in ranked.questions:
        highest = max(candidate.score for candidate in question.candidates)
        first = [candidate.source for candidate in question.candidates if candidate.score == highest]
        for candidate in question.candidates:
            scores[candidate.source].append(candidate.score)
        for source in [] if question.is_tied else first:
            best[source] += 1 / len(first)
    telling = len(ranked.questions) - ranked.tied
    table = _made("ranked", "responses", "mean score", "best")
    for source, given in scores.items():
        share = f"{best[source] / telling:.0%}" if telling else "–"
        table.add_row(escape(source), f"{len(given):,}", f"{sum(given) / len(given):.4g}", share)
    return table


def _made(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("source", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


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
