"""What became of the rows that were read: counts, lengths and notes, for people and for files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.data.outcome import REASONS

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text


class Lengths:
    """The token lengths of the rows that were measured, kept as a histogram so that a stream fits in memory.

    Examples:
        >>> lengths = Lengths()
        >>> for length in (3, 1, 2, 2): lengths.add(length)
        >>> lengths.percentile(50), lengths.percentile(100)
        (2, 3)
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """Count one row."""
        self._counts[length] += 1

    def percentile(self, share: float) -> int | None:
        """Return the smallest length that ``share`` percent of the rows do not exceed (nearest rank)."""
        total = sum(self._counts.values())
        seen = 0
        for length in sorted(self._counts):
            seen += self._counts[length]
            if seen * 100 >= share * total:
                return length
        return None

    def to_dict(self) -> dict[str, int | None]:
        """Return the median, two high percentiles and the maximum; all None when nothing was measured."""
        return {name: self.percentile(share) for name, share in _PERCENTILES.items()}


_CELLS = ("format", "read", "dropped", "cut", "kept", "weight", "used", "median", "p90", "max")
_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


@dataclass
class Responses:
    """What became of single responses; those of prompts dropped for another reason are not counted.

    Attributes:
        kept: responses in rows that are kept.
        dropped: responses left out, by reason (keys of ``REASONS``).
        tied: prompts kept whose scores are all equal.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tied: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"kept": self.kept, "dropped": dict(sorted(self.dropped.items())), "tied_prompts": self.tied}


@dataclass
class SourceReport:
    """What became of one source's rows.

    Attributes:
        path: as the recipe names it.
        files: the files or the split that were read.
        format: how its rows are written.
        weight: passes over the source in one epoch.
        read: rows read.
        kept: rows that can be trained on.
        used: rows of this source in the dataset, repeats counted; None while streaming.
        dropped: rows left out, by reason (keys of ``REASONS``).
        truncated: rows kept although they are too long, for the trainer to cut.
        lengths: in tokens, of all rows that were measured; of a pair, the longer side.
        responses: what became of the responses of prompts that were kept; None where rows are no prompts
            with responses.
        repeated: prompts kept that were there before; None where rows are more than prompts.
        ignored: columns that nothing was read from.
        notes: what a user should know besides.
    """

    path: str
    files: tuple[str, ...] = ()
    format: str = ""
    weight: float = 1.0
    read: int = 0
    kept: int = 0
    used: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    responses: Responses | None = None
    repeated: int | None = None
    ignored: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    tools_checked: bool = field(default=False, repr=False)

    def emptied(self) -> SourceReport:
        """Return a report on the same source in which nothing has been counted."""
        return SourceReport(
            self.path, self.files, self.format, self.weight, ignored=self.ignored, notes=list(self.notes)
        )

    @property
    def done(self) -> int:
        """Rows of which it is known what became of them; a few more may have been read."""
        return self.kept + sum(self.dropped.values())

    def adopt(self, other: SourceReport) -> None:
        """Show what another report has counted."""
        vars(self).update(vars(other))

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def reasons(self) -> dict[str, int]:
        """Return the counts of dropped rows in the order of ``REASONS``."""
        return {reason: self.dropped[reason] for reason in REASONS if self.dropped[reason]}

    def cells(self) -> list[str]:
        """Return this source's line of the table."""
        from rich.markup import escape

        lengths = self.lengths.to_dict()
        counts = [self.read, sum(self.dropped.values()), self.truncated, self.kept, self.used]
        numbers = [*counts, lengths["p50"], lengths["p90"], lengths["max"]]
        said = ["–" if number is None else f"{number:,}" for number in numbers]
        return [escape(self.path), self.format, *said[:-4], f"{self.weight:g}", *said[-4:]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "path": self.path,
            "files": list(self.files),
            "format": self.format,
            "weight": self.weight,
            "read": self.read,
            "kept": self.kept,
            "used": self.used,
            "dropped": self.reasons(),
            "truncated": self.truncated,
            "lengths": self.lengths.to_dict(),
            "ignored_columns": list(self.ignored),
            "notes": list(self.notes),
            **({} if self.responses is None else {"responses": self.responses.to_dict()}),
            **({} if self.repeated is None else {"repeated_prompts": self.repeated}),
        }


@dataclass
class DataReport:
    """What became of the rows of one part (train or eval) of a recipe's data.

    Attributes:
        part: ``train`` or ``eval``.
        method: what it was prepared for.
        columns: of the dataset.
        conversational: whether they hold messages rather than text.
        max_length: in tokens; None for no limit.
        overlong: ``drop`` or ``truncate``.
        streaming: whether rows are read as they are needed.
        sources: one report each.
        rows: of the dataset; None while streaming.
        complete: whether the counts cover every row; a stream's do once it has been read to its end.
        fingerprint: hash of the dataset's rows in their order; None while streaming.
    """

    part: str
    method: str
    columns: tuple[str, ...]
    conversational: bool
    max_length: int | None
    overlong: str
    streaming: bool
    sources: list[SourceReport]
    rows: int | None = None
    complete: bool = False
    fingerprint: str | None = None

    @property
    def read(self) -> int:
        """Rows read from all sources."""
        return sum(source.read for source in self.sources)

    @property
    def kept(self) -> int:
        """Rows of all sources that can be trained on."""
        return sum(source.kept for source in self.sources)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out, by reason, over all sources."""
        total = sum((source.dropped for source in self.sources), Counter())
        return {reason: total[reason] for reason in REASONS if total[reason]}

    @property
    def truncated(self) -> int:
        """Rows kept although they are too long."""
        return sum(source.truncated for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "part": self.part,
            "method": self.method,
            "columns": list(self.columns),
            "conversational": self.conversational,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "streaming": self.streaming,
            "complete": self.complete,
            "rows": self.rows,
            "fingerprint": self.fingerprint,
            "sources": [source.to_dict() for source in self.sources],
        }

    def summary(self) -> str:
        """Return one line: rows read and kept, and why the others were not.

        Examples:
            >>> source = SourceReport("pairs.jsonl", read=5, kept=4, dropped=Counter(tie=1))
            >>> DataReport("train", "dpo", (), True, 128, "drop", False, [source]).summary()
            'train: 4 of 5 rows kept; dropped 1 (all scores are equal)'
        """
        parts = [f"{self.part}: {self.kept:,} of {self.read:,} rows kept"]
        parts += [f"dropped {count:,} ({self.say(reason)})" for reason, count in self.dropped.items()]
        if self.truncated:
            parts.append(f"{self.truncated:,} longer than {self.max_length} tokens, to be cut")
        if not self.complete and self.streaming:
            parts.append("still streaming")
        return "; ".join(parts)

    def say(self, reason: str) -> str:
        """Return a reason in words, with the limit where it is about one."""
        if reason in ("overlong", "no_room", "prompt_fills", "identical_cut"):
            return f"{REASONS[reason]} = {self.max_length}"
        return REASONS[reason]

    def table(self) -> Group:
        """Return what rich prints: a table with a line per source, why rows were dropped, and the notes."""
        from rich.console import Group
        from rich.table import Table

        limit = (
            "no limit"
            if self.max_length is None
            else f"limit {self.max_length}, longer rows: {self.overlong}"
        )
        table = Table(title=f"{self.part} data for {self.method} (tokens: {limit})", title_justify="left")
        table.add_column("source", overflow="fold")
        for name in _CELLS:
            table.add_column(name, justify="left" if name == "format" else "right")
        for source in self.sources:
            table.add_row(*source.cells())
        return Group(table, *self._lines())

    def _lines(self) -> Iterator[Text]:
        from rich.text import Text

        for source in self.sources:
            where = f"{source.path}: " if len(self.sources) > 1 else ""
            for reason, count in source.reasons().items():
                yield Text(f"  {where}{count:,} dropped: {self.say(reason)}")
            if source.responses is not None:
                yield from (Text(f"  {where}{line}") for line in self._about(source.responses))
            if source.repeated:
                yield Text(f"  {where}prompts that came before: {source.repeated:,} (kept)")
            for sentence in source.notes:
                yield Text(f"  {where}{sentence}")

    def _about(self, responses: Responses) -> Iterator[str]:
        for reason, count in sorted(responses.dropped.items()):
            yield f"{count:,} responses dropped: {self.say(reason)}"
        if responses.tied:
            yield (
                f"warning: prompts whose scores are all equal: {responses.tied:,} (kept; they rank nothing, "
                "and their first response is learned)"
            )
