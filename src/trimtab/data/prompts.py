"""Prompts for methods that let the model answer: rows of any kind that have one, as tokens that fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trimtab.data.collect import canonical
from trimtab.data.measure import Ruler
from trimtab.data.pipeline import Form, Inspected, Item, Kept, Pipeline, at_place, check_prompt
from trimtab.data.readers import Record
from trimtab.data.report import SourceReport

COLUMNS = ("prompt", "prompt_ids", "row")
"""The columns of a prompt: as it was, its tokens, and as JSON the rest of its row (:func:`other_columns`)."""


def other_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row of the dataset was read with beside its prompt and answers: a known result, tests.

    Args:
        row: with the column ``row`` of :data:`COLUMNS`.

    Examples:
        >>> other_columns({"prompt": "1 + 1 =", "prompt_ids": [5], "row": '{"result": 2}'})
        {'result': 2}
    """
    columns: dict[str, Any] = json.loads(row["row"])
    return columns


class PromptPipeline(Pipeline):
    """Yields the prompts of a source, each with the tokens that an answer follows.

    A prompt that leaves no room for the answer is dropped, or loses its first tokens where that is asked;
    either way it is counted, as are prompts that were there before.

    Args:
        source: an inspected source.
        form: of the rows to give.
        ruler: has the tokenizer and the longest prompt.
        overlong: ``drop`` or ``truncate``.
        seen: prompts that other sources gave; shared by all of a dataset's.
    """

    def __init__(self, source: Inspected, form: Form, ruler: Ruler, overlong: str, seen: set[bytes]) -> None:
        super().__init__(source, form, ruler, overlong)
        self._seen = seen
        self._reads = source.layout.reads()

    def rows(self, report: SourceReport) -> Iterator[Kept]:
        """Yield the rows that can be trained on; every row that is read is counted in ``report``.

        Raises:
            UserError: at the first row that is not what its format says.
        """
        report.repeated = 0
        yield from super().rows(report)

    def _prepared(self, record: Record, report: SourceReport) -> Item:
        row = at_place(record, self._source.layout.read, record.row)
        self._require_form(record, row)
        check_prompt(row["prompt"])
        others = {name: value for name, value in record.row.items() if name not in self._reads}
        row["row"] = json.dumps(others, ensure_ascii=False, default=str)
        content = canonical(row)
        return Item(record, row, content, [at_place(record, self._ruler.render_prompt, row["prompt"])])

    def _measured(self, batch: list[Item], report: SourceReport) -> Iterator[Kept]:
        limit = self._ruler.max_length
        texts = [item.rendered[0] for item in batch]
        for item, ids in zip(batch, self._ruler.ids(texts, self._form.conversational), strict=True):
            report.lengths.add(len(ids))
            too_long = limit is not None and len(ids) > limit
            if not ids or (too_long and self._overlong == "drop"):
                report.dropped["no_room" if ids else "empty_prompt"] += 1
                continue
            report.truncated += too_long
            report.kept += 1
            self._count_repeated(item, report)
            row = {**item.row, "prompt_ids": ids[-limit:] if limit is not None and too_long else ids}
            yield Kept(row, item.content)

    def _count_repeated(self, item: Item, report: SourceReport) -> None:
        prompt = canonical({"prompt": item.row["prompt"]})
        report.repeated = (report.repeated or 0) + (prompt in self._seen)
        self._seen.add(prompt)
