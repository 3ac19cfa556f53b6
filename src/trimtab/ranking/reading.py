"""Files of models' outputs, and of prompts, read into candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.data.collect import canonical
from trimtab.data.formats import detect
from trimtab.data.locate import suffix_of
from trimtab.data.origin import open_source
from trimtab.data.outcome import Dropped
from trimtab.data.pipeline import at_place
from trimtab.data.readers import Record
from trimtab.ranking.candidates import Candidate, Candidates, Tally
from trimtab.ranking.outputs import Output, read_output
from trimtab.recipe import Source


def read_outputs(path: str, name: str, candidates: Candidates, *, chat: bool) -> Tally:
    """Read a file of outputs (or a folder, or a hub dataset) into ``candidates``.

    Args:
        path: where.
        name: what its responses are marked with, where a row does not say which model gave them.
        candidates: what they are added to.
        chat: whether a prompt that is text is a user's message.

    Returns:
        What became of its rows.

    Raises:
        UserError: if there is no such file, or at the first row that is no output; with its place.
    """
    tally = Tally(name)
    candidates.tallies.append(tally)
    for record in open_source(Source(path=path), "train").records():
        tally.rows += 1
        try:
            _add(at_place(record, read_output, record.row), record, candidates, tally, chat)
        except Dropped as dropped:
            tally.dropped[dropped.reason] += 1
    return tally


def _add(output: Output, record: Record, candidates: Candidates, tally: Tally, chat: bool) -> None:
    output = output.as_chat() if chat else output
    canonical({"responses": output.responses})  # a lone surrogate is no text
    question = candidates.question(output.prompt, record.row, tally)
    for text, score, source in zip(output.responses, output.scores, output.sources, strict=True):
        candidate = Candidate(text, source or tally.name, tally, record.row, record.place, score)
        candidates.add(question, candidate)


def read_prompts(path: str, candidates: Candidates, *, chat: bool) -> int:
    """Read the prompts of a file of any kind into ``candidates``; answers in it are not used.

    Returns:
        How many rows were left out.

    Raises:
        UserError: if there is no such file, or at the first row without a prompt.
    """
    dropped = 0
    for record in open_source(Source(path=path), "train").records():
        try:
            layout = at_place(record, detect, record.row, "grpo")
            prompt = at_place(record, layout.read, record.row)["prompt"]
            output = Output(prompt, (), (), ())
            candidates.question((output.as_chat() if chat else output).prompt, record.row, None)
        except Dropped:
            dropped += 1
    return dropped


def file_names(paths: Sequence[str]) -> list[str]:
    """Return what to call files: their names without endings, or their whole paths where two would be one.

    Examples:
        >>> file_names(["a/sft-1.5.jsonl", "a/dpo.jsonl.gz"]), file_names(["a/x.jsonl", "b/x.jsonl"])
        (['sft-1.5', 'dpo'], ['a/x.jsonl', 'b/x.jsonl'])
    """
    short = [_stem(path) for path in paths]
    return [
        path if short.count(name) > 1 or not name else name for name, path in zip(short, paths, strict=True)
    ]


def _stem(path: str) -> str:
    name = Path(path).name
    return name.removesuffix(".gz").removesuffix(suffix_of(Path(name)) or "")
