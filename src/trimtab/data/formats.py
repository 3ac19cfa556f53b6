"""Which format a source is in, told from its columns: one table of layouts, searched in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from trimtab.data import instructions, labelled, pairs
from trimtab.data.outcome import BadRow, Dropped, quoted
from trimtab.data.transcripts import is_transcript
from trimtab.errors import nearest, unknown

Row = dict[str, Any]

FORMATS = ("auto", "trl", "chat", "alpaca", "sharegpt", "hh", "ranked")
"""What ``data.format`` may be. ``chat`` is TRL's columns holding text, to be read as messages."""

NEEDS = {
    "dpo": "pairs",
    "ipo": "pairs",
    "kto": "answers",
    "reward": "pairs",
    "ppo": "prompts",
    "grpo": "prompts",
    "rloo": "prompts",
    "rrhf": "ranked",
    "sft": "instructions",
}
"""What each training method is trained on."""


@dataclass(frozen=True)
class Layout:
    """One way to write rows: how it is recognised, and how its rows are converted.

    Attributes:
        format: the name in :data:`FORMATS`.
        gives: ``pairs``, ``answers`` (labelled ones), ``ranked`` (responses), ``prompts`` or
            ``instructions``.
        needs: columns that must be there; several names, one of which must, are parted by ``|``.
        takes: columns that are read where they are there.
        convert: makes a row in TRL's columns, or raises ``Dropped`` or ``BadRow``.
        fits: a look at the values, where columns alone do not tell.
        guessed: whether ``auto`` may choose it.
    """

    format: str
    gives: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    convert: Callable[[Row], Row]
    fits: Callable[[Row], bool] = lambda row: True
    guessed: bool = True

    def missing(self, row: Row) -> list[str]:
        """Return what ``row`` lacks of ``needs``; a column that holds null counts as missing."""
        return [need for need in self.needs if not any(row.get(name) is not None for name in need.split("|"))]

    def read(self, row: Row) -> Row:
        """Convert a row that is expected to be in this layout.

        Raises:
            BadRow: if it lacks a column, or one holds something else than it should.
            Dropped: if it cannot be trained on; ``null`` if a column that is needed holds null.
        """
        for need in self.missing(row):
            if not any(name in row for name in need.split("|")):
                wanted = need.split("|")[0]
                close = nearest(wanted, [name for name in row if name not in self.reads()])
                hint = f" (is {close!r} meant?)" if close else ""
                raise BadRow(f"column {wanted!r} is missing{hint}; there are {quoted(row)}")
            raise Dropped("null")
        return self.convert(row)

    def reads(self) -> frozenset[str]:
        """Return every column this layout looks at."""
        return frozenset(name for need in (*self.needs, *self.takes) for name in need.split("|"))

    def say(self) -> str:
        """Return the columns needed, each by the first of its names."""
        return " + ".join(need.split("|")[0] for need in self.needs)


def _is_transcript_pair(row: Row) -> bool:
    return is_transcript(row.get("chosen")) or is_transcript(row.get("prompt"))


_ALPACA = ("input", "system", "history")
_PAIRS = (
    Layout(
        "sharegpt", "pairs", ("conversations", "chosen", "rejected"), ("system", "tools"), pairs.sharegpt_pair
    ),
    Layout("alpaca", "pairs", ("instruction", "chosen", "rejected"), _ALPACA, pairs.alpaca_pair),
    Layout("hh", "pairs", ("chosen", "rejected"), ("prompt",), pairs.transcript_pair, _is_transcript_pair),
    Layout("chat", "pairs", ("prompt", "chosen", "rejected"), ("system",), pairs.chat_pair, guessed=False),
    Layout(
        "trl",
        "pairs",
        ("chosen|chosen_messages", "rejected|rejected_messages"),
        ("prompt", "tools"),
        pairs.trl_pair,
    ),
    Layout(
        "ranked",
        "pairs",
        ("prompt|query|instruction", "responses"),
        ("scores", "input", "system"),
        pairs.ranked_pair,
    ),
)
_RANKED = Layout(
    "ranked",
    "ranked",
    ("prompt|query|instruction", "responses"),
    ("scores", "input", "system"),
    pairs.ranked_responses,
)
_TAG = "label|kto_tag"
_LABELLED = (
    Layout("trl", "answers", ("prompt", "completion", _TAG), ("tools",), labelled.trl_labelled),
    Layout("trl", "answers", ("messages", _TAG), ("tools",), labelled.messages_labelled),
    Layout(
        "chat", "answers", ("prompt", "completion", _TAG), ("system",), labelled.chat_labelled, guessed=False
    ),
    Layout("alpaca", "answers", ("instruction", "output", _TAG), _ALPACA, labelled.alpaca_labelled),
    Layout("sharegpt", "answers", ("conversations", _TAG), ("system", "tools"), labelled.sharegpt_labelled),
)
_INSTRUCTIONS = (
    Layout("alpaca", "instructions", ("instruction", "output"), _ALPACA, instructions.alpaca_completion),
    Layout("trl", "instructions", ("messages",), ("tools", "label"), instructions.trl_messages),
    Layout(
        "chat",
        "instructions",
        ("prompt", "completion"),
        ("system",),
        instructions.chat_completion,
        guessed=False,
    ),
    Layout("trl", "instructions", ("prompt", "completion"), ("tools", "label"), instructions.trl_completion),
)
# Tried after pairs, whose conversations go on with "chosen", and after all that says more than a text.
_LAST_INSTRUCTIONS = (
    Layout(
        "sharegpt",
        "instructions",
        ("conversations",),
        ("system", "tools"),
        instructions.sharegpt_conversation,
    ),
    Layout("trl", "instructions", ("text",), (), instructions.trl_text),
)

_PROMPTS = (
    Layout(
        "chat",
        "prompts",
        ("prompt",),
        ("system",),
        lambda row: {"prompt": pairs.chat_prompt(row)},
        guessed=False,
    ),
    Layout(
        "trl",
        "prompts",
        ("prompt|query|instruction",),
        (*_ALPACA, "tools"),
        lambda row: instructions.asked(pairs.with_tools({"prompt": pairs.prompt_of(row)}, row)),
    ),
)


def _chosen_only(layout: Layout) -> Layout:
    """The layout of a pair, read as an instruction and the answer that was chosen."""
    return Layout(
        layout.format,
        "instructions",
        layout.needs,
        layout.takes,
        lambda row: instructions.preferred(layout.convert(row)),
        layout.fits,
        layout.guessed,
    )


def _both_ranked(layout: Layout) -> Layout:
    """The layout of a pair, read as two ranked responses."""
    return replace(layout, gives="ranked", convert=lambda row: pairs.pair_as_ranked(layout.convert(row)))


def _prompt_only(layout: Layout) -> Layout:
    """The layout of rows that begin with a prompt, of which only that is read."""
    if layout.format == "ranked":  # whatever the responses are
        return replace(layout, gives="prompts", convert=lambda row: {"prompt": pairs.prompt_of(row)})
    return replace(layout, gives="prompts", convert=lambda row: instructions.asked(layout.convert(row)))


def layouts(method: str) -> tuple[Layout, ...]:
    """Return the layouts that a method can be trained on, in the order they are tried.

    Supervised fine-tuning takes pairs too, for the answers that were chosen, KTO and RRHF for both of them;
    methods that answer prompts take the prompts of all rows that have one.

    Raises:
        UserError: if there is no such method.
    """
    if method not in NEEDS:
        raise unknown("method", method, NEEDS)
    if NEEDS[method] == "pairs":
        return _PAIRS
    if NEEDS[method] == "answers":
        return (*_LABELLED, *_PAIRS)
    if NEEDS[method] == "ranked":
        return (_RANKED, *(_both_ranked(layout) for layout in _PAIRS if layout.format != "ranked"))
    if NEEDS[method] == "prompts":
        answered = (*_PAIRS, *_LABELLED, *_INSTRUCTIONS, _LAST_INSTRUCTIONS[0])
        return (*(_prompt_only(layout) for layout in answered), *_PROMPTS)
    chosen = tuple(_chosen_only(layout) for layout in _PAIRS if layout.format != "ranked")
    return (*_INSTRUCTIONS, *chosen, *_LAST_INSTRUCTIONS)


def detect(row: Row, method: str, format: str = "auto") -> Layout:
    """Return the layout of a source, judged by one row of it.

    Args:
        row: the first row.
        method: the training method, a key of :data:`NEEDS`.
        format: a name from :data:`FORMATS`; anything but ``auto`` leaves only that format's layouts.

    Raises:
        BadRow: if no layout fits: the columns there are, the columns needed, and the near miss.
        UserError: if the format or the method is unknown.

    Examples:
        >>> detect({"instruction": "Count.", "input": "", "output": "1 2 3"}, "sft").format
        'alpaca'
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS, "data.format")
    known = layouts(method)
    asked = [layout for layout in known if (layout.guessed if format == "auto" else layout.format == format)]
    for layout in asked:
        if not layout.missing(row) and (format != "auto" or layout.fits(row)):
            return layout
    raise BadRow(_nothing_fits(row, method, format, asked))


def _nothing_fits(row: Row, method: str, format: str, asked: list[Layout]) -> str:
    there = f"the columns are {quoted(row)}" if row else "there are no columns"
    if not asked:
        return f"format {format!r} is of no use to method {method}{_other_use(row, method)}"
    ways = list(dict.fromkeys(layout.say() for layout in asked))
    if NEEDS[method] == "prompts":
        ways = ["prompt, alone or with answers as other methods take them, which are not used"]
    kind = "" if format == "auto" else f" in format {format!r}"
    hint = _other_use(row, method) or _near_miss(row, asked)
    return f"{there}; method {method}{kind} needs {'; or '.join(ways)}{hint}"


def _near_miss(row: Row, asked: Iterable[Layout]) -> str:
    """A column that is nearly what is needed, or one that is there but null."""
    for needed in dict.fromkeys(_missing_names(row, asked)):
        if needed in row:
            return f" ({needed!r} is null here)"
        spare = [name for name in row if name not in {other for layout in asked for other in layout.reads()}]
        close = nearest(needed, spare)
        if close:
            return f" (is {close!r} meant to be {needed!r}?)"
    return ""


def _missing_names(row: Row, asked: Iterable[Layout]) -> Iterator[str]:
    for layout in sorted(asked, key=lambda layout: len(layout.missing(row))):
        yield from (need.split("|")[0] for need in layout.missing(row))


def _other_use(row: Row, method: str) -> str:
    """What the rows look like, when they look like data for something else."""
    if isinstance(row.get("label"), bool) and NEEDS[method] == "pairs":
        return " (these rows are labelled answers without a partner, which method kto reads)"
    if method == "sft" and not _PAIRS[-1].missing(row):
        return " (these are ranked responses, which method dpo reads)"
    if method != "sft" and any(not layout.missing(row) for layout in (*_INSTRUCTIONS, *_LAST_INSTRUCTIONS)):
        return " (this is instruction data, which method sft reads)"
    return ""
