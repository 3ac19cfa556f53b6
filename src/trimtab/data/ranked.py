"""Ranked responses on their way to the trainer: whole responses only, told apart by their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trimtab.data.collect import canonical
from trimtab.data.measure import Ruler
from trimtab.data.outcome import Dropped
from trimtab.data.pipeline import Form, Inspected, Kept, Pipeline, Row, at_place, check_prompt, is_empty
from trimtab.data.readers import Record
from trimtab.data.report import Responses, SourceReport
from trimtab.errors import UserError

COLUMNS = ("prompt", "prompt_ids", "response_ids", "scores")
"""The columns of ranked responses: the prompt as it was, its tokens, those of each response, the scores."""

Encode = Callable[[Any, Any, Sequence[Any]], dict[str, Any]]
"""From a tokenizer, a prompt and responses to ``{"prompt_ids", "response_ids"}``."""


class RankedPipeline(Pipeline):
    """Yields the prompts of a source, each with the responses that fit, as tokens.

    A response that is empty, the same as one before it, or does not fit behind its prompt is left out and
    counted, and a prompt that is left with fewer than two is dropped. Prompts whose scores are all equal are
    kept and counted.

    Args:
        source: an inspected source.
        form: of the rows to give.
        ruler: has the tokenizer and the limit.
        encode: makes the tokens that the trainer is given.
    """

    def __init__(self, source: Inspected, form: Form, ruler: Ruler, encode: Encode) -> None:
        super().__init__(source, form, ruler, "drop")
        self._encode = encode

    def rows(self, report: SourceReport) -> Iterator[Kept]:
        """Yield the rows that can be trained on; every row and response that is read is counted.

        Raises:
            UserError: at the first row that is not what its format says, and if no prompt at all has two
                responses.
        """
        counts = report.responses = Responses()
        for record in self._source.origin.records():
            report.read += 1
            try:
                row = self._fitting(record, report, counts)
                content = canonical(row)
            except Dropped as dropped:
                report.dropped[dropped.reason] += 1
                continue
            report.kept += 1
            counts.kept += len(row["scores"])
            counts.tied += len(set(row["scores"])) == 1
            yield Kept(row, content)
        if report.dropped["single_response"] == report.read:
            raise UserError(
                f"no prompt of {report.path} has two responses ({report.read:,} read), and method rrhf "
                "learns from their order; give several responses to each prompt, or train with method sft"
            )

    def _fitting(self, record: Record, report: SourceReport, counts: Responses) -> Row:
        row = at_place(record, self._source.layout.read, record.row)
        self._require_form(record, row)
        check_prompt(row["prompt"])
        canonical(row)  # before it is tokenized: a lone surrogate is no text
        said = [place for place, response in enumerate(row["responses"]) if not is_empty(response)]
        counts.dropped += {"empty_response": len(row["responses"]) - len(said)}
        repeated = {place for place in said if row["responses"].index(row["responses"][place]) < place}
        counts.dropped += {"repeated": len(repeated)}
        said = [place for place in said if place not in repeated]
        if not said:
            raise Dropped("few_left")
        encoded = self._encoded(record, row["prompt"], [row["responses"][place] for place in said])
        prompt_ids, ids = encoded["prompt_ids"], encoded["response_ids"]
        lengths = [len(prompt_ids) + len(one) for one in ids]
        report.lengths.add(max(lengths))
        limit = self._ruler.max_length
        fits = [place for place, length in enumerate(lengths) if limit is None or length <= limit]
        counts.dropped += {"overlong": len(ids) - len(fits)}
        if len(fits) < 2:
            raise Dropped("few_left")
        return {
            "prompt": row["prompt"],
            "prompt_ids": prompt_ids,
            "response_ids": [ids[place] for place in fits],
            "scores": [row["scores"][said[place]] for place in fits],
        }

    def _encoded(self, record: Record, prompt: Any, responses: list[Any]) -> dict[str, Any]:
        try:
            encoded = self._encode(self._ruler.tokenizer, prompt, responses)
        except UserError as error:
            raise UserError(f"{record.place}: {error}") from error
        if not encoded["prompt_ids"]:
            raise Dropped("empty_prompt")
        return encoded
