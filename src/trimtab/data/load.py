"""``load_data``: what a recipe's data section names, read, checked, measured and mixed into one dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trimtab.data.collect import Collector, canonical
from trimtab.data.formats import NEEDS
from trimtab.data.labelled import COLUMNS, unpaired
from trimtab.data.locate import Source
from trimtab.data.measure import Ruler
from trimtab.data.mixture import mix, mix_streams, rows_of, shuffled
from trimtab.data.origin import open_source
from trimtab.data.pipeline import Form, Inspected, Pipeline, inspect
from trimtab.data.prompts import COLUMNS as PROMPT_COLUMNS
from trimtab.data.prompts import PromptPipeline
from trimtab.data.ranked import COLUMNS as RANKED_COLUMNS
from trimtab.data.ranked import Encode, RankedPipeline
from trimtab.data.report import DataReport, SourceReport
from trimtab.errors import UserError

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

_ANSWERS = frozenset({"chosen", "completion", "responses", "output", "messages", "conversations"})


class DataSpec(Protocol):
    """The data section of a recipe.

    Attributes:
        train: sources to train on.
        eval: held-out sources, or None.
        format: a name from ``FORMATS``; ``auto`` tells it from the columns, for every source by itself.
        max_length: longest row in tokens, chat template included; None for no limit.
        overlong: ``drop`` what is longer, or ``truncate`` it (the trainer cuts the end off).
        streaming: read rows as they are needed.
    """

    @property
    def train(self) -> Sequence[Source]: ...
    @property
    def eval(self) -> Sequence[Source] | None: ...
    @property
    def format(self) -> str: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def overlong(self) -> str: ...
    @property
    def streaming(self) -> bool: ...


@dataclass(frozen=True)
class PreparedData:
    """A dataset in TRL's columns, and what became of the rows it was made from.

    Attributes:
        dataset: a ``datasets.Dataset``, or an ``IterableDataset`` when streaming.
        report: counts per source; those of a stream grow while it is read.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    report: DataReport


def load_data(
    spec: DataSpec,
    *,
    method: str,
    part: str,
    tokenizer: Any,
    seed: int = 0,
    progress: bool = False,
    encode: Encode | None = None,
    response_budget: int = 0,
) -> PreparedData:
    """Read one part of a recipe's data for a training method.

    Rows that cannot be trained on are left out and counted by reason; rows that are not what their format
    says stop the run with a sentence that names file and line. A row's length is the number of tokens that
    TRL will make of it.

    Args:
        spec: the recipe's data section.
        method: ``dpo``, ``ipo`` or ``reward`` (columns prompt, chosen, rejected), ``kto`` (prompt,
            completion, label), ``rrhf`` (prompt, prompt_ids, response_ids, scores),
            ``ppo``, ``grpo`` or ``rloo`` (prompt, prompt_ids, row),
            or ``sft`` (messages, or prompt and completion, or text).
        part: ``train`` or ``eval``.
        tokenizer: the one the trainer gets, with its chat template.
        seed: which rows a fractional weight takes, and how sources are interleaved.
        progress: show a progress bar while reading.
        encode: for ``rrhf``, which needs it: what makes tokens of a prompt and responses to it.
        response_budget: tokens of ``max_length`` that are kept free behind a prompt that the model answers.

    Returns:
        The dataset and the report on it.

    Raises:
        UserError: if a source is missing, empty, malformed, in an unknown format or without the columns
            needed; if the tokenizer cannot take the rows; if sources cannot be mixed; if no row is left; or
            if answers that are to be told apart are all labelled alike.
    """
    labels = NEEDS.get(method) == "answers"
    if labels and spec.streaming:
        raise UserError(f"method {method} needs its rows in a random order, which a stream does not have")
    ranked = NEEDS.get(method) == "ranked"
    prompts = NEEDS.get(method) == "prompts"
    if (ranked or prompts) and spec.streaming:
        raise UserError(f"method {method} reads its rows at once; leave data.streaming out")
    sources = _sources(spec, part)
    inspected = [
        inspect(open_source(source, part, streaming=spec.streaming), method, spec.format)
        for source in sources
    ]
    form = common_form(inspected)
    form = Form(COLUMNS, form.conversational) if labels else form
    form = Form(RANKED_COLUMNS, form.conversational) if ranked else form
    form = Form(PROMPT_COLUMNS, form.conversational) if prompts else form
    limit = None if spec.max_length is None else spec.max_length - response_budget
    ruler = Ruler(tokenizer, limit)
    _require(ruler, inspected, form)
    report = DataReport(
        part=part,
        method=method,
        columns=form.columns,
        conversational=form.conversational,
        max_length=limit,
        overlong=spec.overlong,
        streaming=spec.streaming,
        sources=[_source_report(*pair, form, method) for pair in zip(sources, inspected, strict=True)],
    )
    pipelines: list[Pipeline]
    if ranked:
        assert encode is not None, "rrhf's rows are tokens"
        pipelines = [RankedPipeline(source, form, ruler, encode) for source in inspected]
    elif prompts:
        seen: set[bytes] = set()
        pipelines = [PromptPipeline(source, form, ruler, spec.overlong, seen) for source in inspected]
    else:
        pipelines = [
            Pipeline(source, (source.form or form) if labels else form, ruler, spec.overlong)
            for source in inspected
        ]
    weights = [float(source.weight) for source in sources]
    if spec.streaming:
        return PreparedData(_stream(pipelines, weights, report, seed), report)
    dataset = _collect(pipelines, weights, report, seed, progress, unpairs=labels)
    if labels and part == "train":
        _require_both_labels(dataset, method)
    return PreparedData(dataset, report)


def _require_both_labels(dataset: datasets.Dataset, method: str) -> None:
    labels = set(dataset["label"])
    if len(labels) == 1:
        only, other = ("true (desirable)", "false") if labels == {True} else ("false (undesirable)", "true")
        raise UserError(
            f"all {len(dataset):,} answers of data.train are labelled {only}, and method {method} learns "
            f"from the difference; add answers that are labelled {other}"
        )


def _sources(spec: DataSpec, part: str) -> Sequence[Source]:
    if part not in ("train", "eval"):
        raise ValueError(f"part must be 'train' or 'eval', not {part!r}")
    sources = spec.train if part == "train" else spec.eval
    if not sources:
        raise UserError(f"data.{part} names no source of rows; give a file, a folder or a hub id")
    return sources


def common_form(sources: Sequence[Inspected]) -> Form:
    """Return the form that the rows of all sources can take.

    Prompt-completion rows that are mixed with whole conversations (or whole texts) are joined into such.

    Raises:
        UserError: if one source holds messages and another plain text.
    """
    known = [source for source in sources if source.form is not None]
    forms = {source.form: source for source in known if source.form is not None}
    if not forms:
        return Form((), True)
    spoken = [source for form, source in forms.items() if form.conversational]
    written = [source for form, source in forms.items() if not form.conversational]
    if spoken and written:
        raise UserError(
            f"{spoken[0].place} holds messages and {written[0].place} plain text, which cannot be mixed; "
            "bring them into one form (format: chat reads prompts and answers that are text as messages)"
        )
    if len(forms) == 1:
        return next(iter(forms))
    return Form(("messages",) if spoken else ("text",), bool(spoken))


def _require(ruler: Ruler, sources: Iterable[Inspected], form: Form) -> None:
    for source in sources:
        if source.form is not None:
            ruler.require(form.conversational, source.place)


def _source_report(source: Source, inspected: Inspected, form: Form, method: str) -> SourceReport:
    report = SourceReport(
        path=source.path,
        files=inspected.origin.files,
        format=inspected.layout.format,
        weight=float(source.weight),
        ignored=inspected.ignored,
    )
    reads = inspected.layout.reads()
    if method == "sft" and "rejected" in reads:
        report.note("only the chosen answers are learned; the rejected ones are not used")
    if NEEDS[method] == "answers":
        if "rejected" in reads:
            report.note("each pair is learned as two answers, the chosen one desirable, the other not")
        return report
    if NEEDS[method] == "ranked":
        if "rejected" in reads:
            report.note("each pair is learned as two responses, with the scores 1 and 0")
        return report
    if NEEDS[method] == "prompts":
        report.ignored = ()
        if not _ANSWERS.isdisjoint(reads):
            report.note("only the prompts are used; the policy gives its own answers")
        return report
    if inspected.form not in (None, form):
        report.note(
            f"prompt and completion are joined into {form.columns[0]}, so that the prompt is learned too"
        )
    return report


def _collect(
    pipelines: Sequence[Pipeline],
    weights: Sequence[float],
    report: DataReport,
    seed: int,
    progress: bool,
    *,
    unpairs: bool,
) -> datasets.Dataset:
    """All rows in memory and mixed; where pairs are taken apart, in a random order."""
    collector = Collector(report.columns, report.conversational)
    given = []
    for pipeline, counts in zip(pipelines, report.sources, strict=True):
        with _tracked(pipeline.rows(counts), counts.path, progress) as rows:
            before = len(collector)
            for kept in rows:
                for row in unpaired(kept.row) if unpairs else [kept.row]:
                    collector.add(row, canonical(row) if unpairs else kept.content)
            given.append(len(collector) - before)
    report.complete = True
    report.fingerprint = collector.fingerprint()
    if not len(collector):
        raise _nothing_left(report)
    dataset = collector.finish()
    for source, count in zip(report.sources, given, strict=True):
        source.used = rows_of(count, source.weight)
    order = mix(given, weights, seed)
    order = shuffled(order, seed) if unpairs else order
    if order != list(range(len(dataset))):
        dataset = dataset.select(order)
    report.rows = len(dataset)
    return dataset


@contextmanager
def _tracked(rows: Iterator[T], name: str, progress: bool) -> Iterator[Iterable[T]]:
    """Rows, with a line on standard error that counts them when asked."""
    if not progress:
        yield rows
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("reading {task.description}: {task.completed} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        yield bar.track(rows, description=name)


def _stream(
    pipelines: Sequence[Pipeline], weights: Sequence[float], report: DataReport, seed: int
) -> datasets.IterableDataset:
    from datasets import IterableDataset

    # Not IterableDataset.from_generator: it makes folders in the user's cache and pickles the generator.
    from datasets.iterable_dataset import ExamplesIterable

    def examples() -> Iterator[tuple[int, dict[str, Any]]]:
        streams = [partial(_counted, *pair) for pair in zip(pipelines, report.sources, strict=True)]
        yield from enumerate(mix_streams(streams, weights, seed))
        report.complete = True
        if not report.kept:
            raise _nothing_left(report)

    return IterableDataset(ExamplesIterable(examples, {}))


def _counted(pipeline: Pipeline, shown: SourceReport) -> Iterator[dict[str, Any]]:
    """One pass over a stream; trainers start several, to see the first row, and the furthest is shown."""
    counts = shown.emptied()
    for kept in pipeline.rows(counts):
        if counts.done >= shown.done:
            shown.adopt(counts)
        yield kept.row
    if counts.done >= shown.done:
        shown.adopt(counts)


def _nothing_left(report: DataReport) -> UserError:
    reasons = ", ".join(f"{count} dropped ({report.say(reason)})" for reason, count in report.dropped.items())
    names = ", ".join(source.path for source in report.sources)
    middle = report.sources[0].lengths.percentile(50)
    too_long = not {"overlong", "no_room"}.isdisjoint(report.dropped) or any(
        source.responses is not None and source.responses.dropped["overlong"] for source in report.sources
    )
    hint = f"; half of the rows need {middle} tokens or more" if too_long else ""
    return UserError(
        f"no row of data.{report.part} is left to use: {report.read} read from {names}, {reasons}{hint}"
    )
