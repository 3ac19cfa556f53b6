"""One source on its way from the file to the trainer: read, convert, check, measure, count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trimtab.data.collect import canonical
from trimtab.data.formats import Layout, detect
from trimtab.data.instructions import reshaped
from trimtab.data.measure import Ruler
from trimtab.data.messages import is_blank
from trimtab.data.origin import Origin
from trimtab.data.outcome import BadRow, Dropped, quoted
from trimtab.data.readers import Record
from trimtab.data.report import SourceReport
from trimtab.errors import UserError

Row = dict[str, Any]

BATCH = 128
"""Rows that are tokenized at once."""

_SEARCHED = 100


@dataclass(frozen=True)
class Form:
    """The shape of converted rows: their columns, and whether these hold messages."""

    columns: tuple[str, ...]
    conversational: bool

    @classmethod
    def of(cls, row: Row) -> Form:
        """Return the form of a converted row; tool definitions may be there or not."""
        columns = tuple(column for column in row if column != "tools")
        return cls(columns, isinstance(row[columns[0]], list))


@dataclass(frozen=True)
class Kept:
    """A row that can be trained on, and its content as bytes."""

    row: Row
    content: bytes


@dataclass(frozen=True)
class Item:
    """A converted row on its way: where it is from, its content as bytes, and the texts to be tokenized."""

    record: Record
    row: Row
    content: bytes
    rendered: list[str]


@dataclass(frozen=True)
class Inspected:
    """A source whose first rows have been looked at.

    Attributes:
        origin: where its rows come from.
        layout: how they are written.
        form: of the first row that could be converted; None if there is none.
        place: of the first row.
        ignored: columns of the first row that nothing is read from.
    """

    origin: Origin
    layout: Layout
    form: Form | None
    place: str
    ignored: tuple[str, ...]


def inspect(origin: Origin, method: str, format: str) -> Inspected:
    """Look at the start of a source: which layout it is in, and what its rows become.

    Raises:
        UserError: if the source is empty, malformed, or in no layout that the method can be trained on.
    """
    records = origin.records()
    layout, first = _first_fitting(records, method, format)
    ignored = tuple(name for name in first.row if name not in layout.reads())
    form = None
    for record in chain([first], records):
        try:
            form = Form.of(at_place(record, layout.read, record.row))
            break
        except Dropped:
            continue
    return Inspected(origin, layout, form, first.place, ignored)


def _first_fitting(records: Iterator[Record], method: str, format: str) -> tuple[Layout, Record]:
    """The layout of the first row; where that has nulls, of the first of some rows that tells."""
    refused: UserError | None = None
    for number, record in enumerate(records):
        try:
            return at_place(record, detect, record.row, method, format), record
        except UserError as error:
            refused = refused or error
            if number == _SEARCHED or None not in record.row.values():
                break
    assert refused is not None, "an origin yields at least one record"
    raise refused


def at_place(record: Record, function: Any, *arguments: Any) -> Any:
    """Call a function on a row; what it finds bad is said with the row's place."""
    try:
        return function(*arguments)
    except BadRow as error:
        raise UserError(f"{record.place}: {error}") from None


class Pipeline:
    """Yields a source's rows, ready for the trainer, as often as asked.

    Args:
        source: an inspected source.
        form: of the rows to give, which other sources may share.
        ruler: measures rows.
        overlong: ``drop`` rows that are too long, or leave them for the trainer to ``truncate``.
    """

    def __init__(self, source: Inspected, form: Form, ruler: Ruler, overlong: str) -> None:
        self._source = source
        self._form = form
        self._ruler = ruler
        self._overlong = overlong

    def rows(self, report: SourceReport) -> Iterator[Kept]:
        """Yield the rows that can be trained on; every row that is read is counted in ``report``.

        Raises:
            UserError: at the first row that is not what its format says.
        """
        batch: list[Item] = []
        for record in self._source.origin.records():
            report.read += 1
            try:
                batch.append(self._prepared(record, report))
            except Dropped as dropped:
                report.dropped[dropped.reason] += 1
            if len(batch) == BATCH:
                yield from self._measured(batch, report)
                batch = []
        yield from self._measured(batch, report)

    def _prepared(self, record: Record, report: SourceReport) -> Item:
        row = at_place(record, self._source.layout.read, record.row)
        self._require_form(record, row)
        row = reshaped(row, self._form.columns)
        check(row)
        content = canonical(row)
        rendered = at_place(record, self._ruler.render, row)
        if "tools" in row:
            self._note_tools(record, row, report)
        if self._form.conversational and not shows_reasoning(row, rendered):
            report.note("the tokenizer's chat template leaves out reasoning that the data has")
        return Item(record, row, content, rendered)

    def _require_form(self, record: Record, row: Row) -> None:
        if Form.of(row) != self._source.form:
            raise UserError(f"{record.place}: {self._mixed(Form.of(row))}")

    def _mixed(self, form: Form) -> str:
        expected = self._source.form
        assert expected is not None, "rows are read only from sources that gave one"
        if form.conversational != expected.conversational:
            kinds = ("plain text", "messages")
            return (
                f"{kinds[form.conversational]} where the rows before it hold {kinds[expected.conversational]}"
            )
        return f"{quoted(form.columns)} where the rows before it give {quoted(expected.columns)}"

    def _note_tools(self, record: Record, row: Row, report: SourceReport) -> None:
        """Say (once) when the model will not see which tools it has."""
        if not report.tools_checked:
            report.tools_checked = True
            if not at_place(record, self._ruler.shows_tools, row):
                report.note("the tokenizer's chat template does not show tool definitions to the model")

    def _measured(self, batch: list[Item], report: SourceReport) -> Iterator[Kept]:
        conversational = self._form.conversational
        measured = self._ruler.measure([item.rendered for item in batch], conversational)
        for item, (length, too_long) in zip(batch, measured, strict=True):
            report.lengths.add(length)
            try:
                if too_long and self._overlong == "drop":
                    raise Dropped("overlong")
                if too_long:
                    at_place(item.record, self._ruler.check_cut, item.row, item.rendered, conversational)
            except Dropped as dropped:
                report.dropped[dropped.reason] += 1
                continue
            report.truncated += too_long
            report.kept += 1
            yield Kept(item.row, item.content)


def shows_reasoning(row: Row, rendered: list[str]) -> bool:
    """Return whether the last message's reasoning, where it has any, is in the rendered text.

    Only the last counts: many templates leave the reasoning of earlier turns out on purpose.
    """
    answers = [row[column] for column in ("chosen", "rejected", "completion", "messages") if column in row]
    for answer, text in zip(answers, rendered, strict=True):
        reasons = [answer[-1].get(key, "").strip() for key in ("reasoning_content", "thinking")]
        if any(reason not in text for reason in reasons):
            return False
    return True


def check(row: Row) -> None:
    """Check that a converted row has something to learn from and something to learn.

    Raises:
        Dropped: with the reason.
    """
    if "prompt" in row:
        check_prompt(row["prompt"])
    answers = [
        row[column] for column in ("chosen", "rejected", "completion", "messages", "text") if column in row
    ]
    if any(is_empty(answer) for answer in answers):
        raise Dropped("empty_response")
    if "chosen" in row and row["chosen"] == row["rejected"]:
        raise Dropped("identical")


def check_prompt(prompt: Any) -> None:
    """Check that a prompt says something and ends where an answer is due.

    Raises:
        Dropped: with the reason.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Dropped("empty_prompt")
        return
    if all(is_blank(message) for message in prompt if message["role"] != "system"):
        raise Dropped("empty_prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("no_question")


def is_empty(answer: Any) -> bool:
    """Whether there is no answer in it: no text, or no last word by the assistant."""
    if isinstance(answer, str):
        return not answer.strip()
    spoken = [message for message in answer if message["role"] == "assistant"]
    return not spoken or is_blank(spoken[-1])
