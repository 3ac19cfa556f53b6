"""What a merge will do, decided and checked in full before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trimtab.delta.locate import locate
from trimtab.delta.problems import Problems, shape_text
from trimtab.errors import UserError
from trimtab.merge.arithmetic import Read, Task, Term
from trimtab.merge.config import MergeConfig, ModelRef, Slice, Source
from trimtab.merge.inputs import FolderInput, Input
from trimtab.merge.layers import Layers, check_lists, is_head, is_tied, tied_key
from trimtab.merge.methods import Parameter, parameters_of
from trimtab.merge.settings import Position, layer_position, value_of
from trimtab.merge.writer import Entry
from trimtab.ops.combine import Operator
from trimtab.ops.presets import MERGES, MergePreset

if TYPE_CHECKING:
    from trimtab.merge.vocabulary import Vocabulary

_IGNORED = ("rotary_emb.inv_freq", ".attn.masked_bias")
"""Ends of keys that older checkpoints store and models compute: none is missing and none is left over."""


@dataclass(frozen=True)
class Origin:
    """A tensor of an input: which model's (its place in the plan's inputs), and its key there."""

    model: int
    key: str


@dataclass(frozen=True)
class Part:
    """A tensor of an input, and what its parameters are in one output tensor."""

    origin: Origin
    weight: float = 1.0
    rate: float = 1.0


@dataclass(frozen=True)
class Output:
    """One output tensor.

    Args:
        entry: its key, shape and dtype.
        parts: what is combined.
        base: what deltas are taken to; None combines the models themselves.
        operator: F and ⊕; None for ``slerp``.
        dtype: of the arithmetic.
        read: the dtype that the models' values are cast to first; None leaves them.
        scale: λ.
        position: t of ``slerp``.
    """

    entry: Entry
    parts: tuple[Part, ...]
    base: Origin | None
    operator: Operator | None
    dtype: torch.dtype
    read: torch.dtype | None = None
    scale: float = 1.0
    position: float = 0.0

    @property
    def copied(self) -> bool:
        """Whether it holds no weights (a buffer of whole numbers), and has to be equal in all models."""
        return not self.entry.dtype.is_floating_point

    def origins(self) -> tuple[Origin, ...]:
        """Every tensor that is read for it, the base first."""
        return (*((self.base,) if self.base else ()), *(part.origin for part in self.parts))


@dataclass(frozen=True)
class Plan:
    """A merge, ready to run.

    Args:
        config: what was asked for.
        preset: the method's row.
        inputs: the models, opened.
        outputs: the output's tensors, in order.
        donor: place of the model whose configuration and tokenizer the output takes.
        notes: what the user should know, in sentences.
        spans: the ranges of layers that the output has, where it is made of slices.
        vocabulary: the output's tokenizer, where that is not simply the donor's.
    """

    config: MergeConfig
    preset: MergePreset
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    donor: int
    notes: tuple[str, ...]
    spans: tuple[tuple[int, int], ...] = ()
    vocabulary: Vocabulary | None = None

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """What tells each input's content apart from another's."""
        return tuple(model.fingerprint() for model in self.inputs)

    @property
    def layers(self) -> int | None:
        """How many layers the output has, where it is made of slices."""
        return sum(high - low for low, high in self.spans) if self.spans else None

    @property
    def size(self) -> int:
        """Bytes of the output's tensors."""
        return sum(output.entry.size for output in self.outputs)

    @property
    def reading(self) -> int:
        """Bytes of the tensors that are read, each counted once."""
        origins = {origin for output in self.outputs for origin in output.origins()}
        stored = [frozenset(model.keys()) for model in self.inputs]  # a tied head is its embedding
        return sum(_size(self.inputs[one.model], one.key) for one in origins if one.key in stored[one.model])

    def task(self, output: Output) -> Task:
        """What :mod:`~trimtab.merge.arithmetic` computes for one output tensor."""

        def read(origin: Origin) -> Read:
            return _reader(self.inputs[origin.model], origin.key, output.read)

        terms = tuple(Term(read(p.origin), p.weight, p.rate, p.origin.model) for p in output.parts)
        return Task(
            output.entry.key,
            output.entry.count,
            terms,
            read(output.base) if output.base else None,
            output.operator,
            output.dtype,
            output.scale,
            output.position,
            self.config.seed,
            self.preset.stored,
        )


def _reader(model: Input, key: str, dtype: torch.dtype | None) -> Read:
    def read(low: int, high: int) -> Tensor:
        values = model.read(key, low, high)
        return values if dtype is None else values.to(dtype)

    return read


def _size(model: Input, key: str) -> int:
    return prod(model.shape(key)) * model.dtype(key).itemsize


def open_input(ref: ModelRef) -> Input:
    """Open the model that a configuration names, with its adapter on it.

    Raises:
        UserError: there is no such model, or its files are unusable.
    """
    model: Input = FolderInput(locate(ref.path, revision=ref.revision))
    if ref.lora is None:
        return model
    from trimtab.merge.adapters import Adapted

    return Adapted(model, locate(ref.lora, revision=ref.lora_revision).folder, str(ref))


def make_plan(config: MergeConfig) -> Plan:
    """Open the models and decide every output tensor.

    Raises:
        UserError: a model cannot be read, or the models do not fit together: everything that does not is
            counted in one sentence.
    """
    refs = _models(config)
    return _Planner(config, refs, tuple(open_input(ref) for ref in refs)).plan()


def _models(config: MergeConfig) -> tuple[ModelRef, ...]:
    """Every model once: the base first, then as they are named; one that only gives the tokenizer, last."""
    named = [source.model for one in config.slices for source in one.sources]
    bases = [ref for ref in (config.base_model, *(one.base for one in config.slices)) if ref is not None]
    giver = [config.tokenizer_source] if isinstance(config.tokenizer_source, ModelRef) else []
    return tuple(dict.fromkeys([*bases, *named, *giver]))


class _Found(NamedTuple):
    """What one source gives to an output tensor: the name that was asked for, and where it is read."""

    source: Source
    asked: str
    origin: Origin


class _Planner:
    """The decisions of one plan, in the order in which they are taken."""

    def __init__(self, config: MergeConfig, refs: Sequence[ModelRef], inputs: tuple[Input, ...]) -> None:
        self.config = config
        self.preset = MERGES[config.method, config.fidelity]
        self.parameters: Mapping[str, Parameter] = parameters_of(config.method, config.fidelity)
        self.place = {ref: place for place, ref in enumerate(refs)}
        self.inputs = inputs
        self.problems = Problems()
        self.notes = [*config.notes, *(note for model in inputs for note in getattr(model, "notes", ()))]
        self.donor = self.place[config.base_model] if config.base_model else 0
        if config.base_model is None:
            self.donor = self.place[config.slices[0].sources[0].model]

    def plan(self) -> Plan:
        """Check the models against each other and decide each tensor."""
        _check_families(self.inputs)
        vocabulary = self._align_vocabularies()
        self.layers = [Layers.of(model.keys(), model.config) for model in self.inputs]
        self.known = [frozenset(model.keys()) for model in self.inputs]
        self.aligned = vocabulary is not None
        self.used: set[Origin] = set()
        outputs = self._sliced() if self.config.sliced else self._whole(self.config.slices[0])
        if not self.config.sliced:
            check_lists(self.config, self.layers[self.donor], self.inputs[self.donor])
            self._find_extra(self.config.slices[0].sources)
        if self.problems and not self.config.allow_partial:
            self.problems.refuse(
                f"the models do not have the same tensors as {self.inputs[self.donor].label}; give models of "
                "one architecture and size, or allow_partial: true to merge what they share"
            )
        if self.problems:
            self.notes.append(f"merged in part, as allow_partial allows: {self.problems.summary()}")
        if not outputs:
            raise UserError("there is no tensor that could be merged")
        spans = tuple(_span(slice_) for slice_ in self.config.slices) if self.config.sliced else ()
        return Plan(
            self.config,
            self.preset,
            self.inputs,
            tuple(outputs),
            self.donor,
            tuple(self.notes),
            spans,
            vocabulary,
        )

    def _align_vocabularies(self) -> Vocabulary | None:
        """Bring the rows of the embeddings into one order; or see that they are."""
        from trimtab.merge.vocabulary import Aligned, build, check_vocabularies, vocabulary_keys

        source, inputs = self.config.tokenizer_source, self.inputs
        if source is None:
            check_vocabularies(inputs)
            return None
        base = inputs[self.donor] if self.config.base_model else None
        chosen = inputs[self.place[source]] if isinstance(source, ModelRef) else source
        vocabulary = build(inputs, base, chosen)
        merged = sorted({self.place[source.model] for one in self.config.slices for source in one.sources})
        self.inputs = tuple(
            Aligned(inputs, place, vocabulary, vocabulary_keys(model), merged)
            for place, model in enumerate(inputs)
        )
        return vocabulary

    # -- which tensors

    def _whole(self, slice_: Slice) -> list[Output]:
        """Every tensor of the donor, from the same tensor of each source."""
        layers = self.layers[self.donor]
        found = []
        for key in self.inputs[self.donor].keys():  # noqa: SIM118 (an input is no dict)
            if not key.endswith(_IGNORED):
                sources = [(source, key) for source in slice_.sources]
                found.append(self._output(key, sources, slice_, layers.position(key)))
        return [output for output in found if output is not None]

    def _sliced(self) -> list[Output]:
        """What is before the layers as in the first slice, the layers in turn, the rest as in the last."""
        donor = self.inputs[self.donor]
        prefix, _ = self.layers[self.donor].only(donor.label)
        first, last = self.config.slices[0], self.config.slices[-1]
        before: list[Output | None] = []
        after: list[Output | None] = []
        for key in donor.keys():  # noqa: SIM118 (an input is no dict)
            position = self.layers[self.donor].position(key)
            if position.where == "layer" or key.endswith(_IGNORED):
                continue
            slice_, list_ = (first, before) if position.where == "before" else (last, after)
            list_.append(self._output(key, [(source, key) for source in slice_.sources], slice_, position))
        self._find_extra(first.sources, "before")
        self._find_extra(last.sources, "after")
        found, at = before, 0
        for slice_ in self.config.slices:
            low, high = _span(slice_)
            for index in range(high - low):
                found += self._layer(prefix, slice_, at, index, layer_position(index, high - low))
                at += 1
        return [output for output in (*found, *after) if output is not None]

    def _layer(
        self, prefix: str, slice_: Slice, at: int, index: int, position: Position
    ) -> Iterable[Output | None]:
        """One layer of the output: number ``at``, from layer ``index`` of the slice."""
        starts = {}
        for source in slice_.sources:
            own, count = self.layers[self.place[source.model]].only(str(source.model))
            low, high = source.layers or (0, count)
            if high > count:
                raise UserError(f"layer_range {[low, high]} of {source.model}: it has {count} layers")
            starts[source.model] = f"{own}{low + index}."
        leader = slice_.sources[0]
        for key in self.inputs[self.place[leader.model]].keys():  # noqa: SIM118
            if key.startswith(starts[leader.model]) and not key.endswith(_IGNORED):
                rest = key.removeprefix(starts[leader.model])
                sources = [(source, starts[source.model] + rest) for source in slice_.sources]
                yield self._output(f"{prefix}{at}.{rest}", sources, slice_, position)
        for source in slice_.sources[1:]:
            self._find_extra([source], "layer", starts[source.model])

    def _find_extra(self, sources: Sequence[Source], where: str | None = None, start: str = "") -> None:
        """Note the tensors of models that go nowhere: all, or those of some place whose keys begin so."""
        for place in {self.place[source.model] for source in sources}:
            model, layers = self.inputs[place], self.layers[place]
            for key in model.keys():  # noqa: SIM118 (an input is no dict)
                if not key.startswith(start) or (where and layers.position(key).where != where):
                    continue
                if Origin(place, key) in self.used or key.endswith(_IGNORED):
                    continue
                if not (is_head(key) and is_tied(model.config)):
                    self.problems.extra.append(f"{key} in {model.label}")

    # -- one tensor

    def _output(
        self, key: str, sources: Sequence[tuple[Source, str]], slice_: Slice, position: Position
    ) -> Output | None:
        """Decide one output tensor; None where it cannot be made."""
        found = [(source, asked, self._origin(source, asked)) for source, asked in sources]
        present = [_Found(source, asked, origin) for source, asked, origin in found if origin is not None]
        base_ref = slice_.base or self.config.base_model
        base = next((one.origin for one in present if one.source.model == base_ref), None)
        shape = self._shape(base or (present[0].origin if present else None))
        if shape is None or (base is None and (self.preset.anchored or self.preset.operator is None)):
            return None
        present = [one for one in present if self._fits(one.origin, shape)]
        dtypes = [self.inputs[one.origin.model].dtype(one.origin.key) for one in present]
        promoted = reduce(torch.promote_types, dtypes)
        read, work, out = _dtypes(self.config, self.preset, promoted)
        output = Output(Entry(key, shape, out), (), base, self.preset.operator, work, read)
        return self._combined(output, present, slice_, position)

    def _origin(self, source: Source, key: str) -> Origin | None:
        place = self.place[source.model]
        model = self.inputs[place]
        own = key if key in self.known[place] else tied_key(key, model.keys(), model.config)
        if own is None:
            self.problems.missing.append(f"{key} in {model.label}")
            return None
        self.used.add(Origin(place, own))
        return Origin(place, key if self.aligned else own)  # rows are filled in by what they stand for

    def _shape(self, origin: Origin | None) -> tuple[int, ...] | None:
        return None if origin is None else self.inputs[origin.model].shape(origin.key)

    def _fits(self, origin: Origin, shape: tuple[int, ...]) -> bool:
        own = self.inputs[origin.model].shape(origin.key)
        if own != shape:
            label = self.inputs[origin.model].label
            self.problems.mismatched.append(
                f"{origin.key} ({shape_text(own)} in {label}, {shape_text(shape)} expected)"
            )
        return own == shape

    def _combined(
        self, output: Output, present: Sequence[_Found], slice_: Slice, position: Position
    ) -> Output:
        """Fill in what is combined, and how."""
        key = output.entry.key

        def shared(name: str) -> Any:
            return value_of(self.config, slice_, None, self.parameters[name], key, position)

        def own(name: str, one: _Found) -> float:
            if name not in self.parameters:
                return 1.0
            return float(
                value_of(self.config, slice_, one.source, self.parameters[name], one.asked, position)
            )

        others = [one for one in present if one.origin != output.base]
        if output.copied:
            return replace(output, parts=tuple(Part(one.origin) for one in others))
        if not others and (self.preset.anchored or "weight" not in self.parameters):
            assert output.base is not None  # no other model has it, as allow_partial allows: it stays
            return replace(output, parts=(Part(output.base),), base=None, operator=Operator())
        if self.preset.operator is None:  # slerp: from the base to the other
            assert output.base is not None
            parts = tuple(Part(origin) for origin in (output.base, *(one.origin for one in others)))
            return replace(output, parts=parts, base=None, position=float(shared("t")))
        if "ratio" in self.parameters:  # hma: 1 − r of the base, r of the other
            assert output.base is not None
            ratio = float(shared("ratio"))
            parts = (Part(output.base, 1 - ratio), *(Part(one.origin, ratio) for one in others))
            return replace(output, parts=parts, base=None)
        terms = others if self.preset.anchored else present
        parts = tuple(Part(one.origin, own("weight", one), own("density", one)) for one in terms)
        operator = replace(self.preset.operator, normalize=bool(shared("normalize")))
        if "rescale" in self.parameters:
            operator = replace(operator, rescale=self.preset.rescaled if shared("rescale") else "none")
        scale = float(shared("lambda")) if "lambda" in self.parameters else 1.0
        base = output.base if self.preset.anchored else None
        return replace(
            output, parts=parts, base=base, scale=scale, operator=self._dividing(operator, parts, key)
        )

    def _dividing(self, operator: Operator, parts: Sequence[Part], key: str) -> Operator:
        """The operator, with no division by weights whose sum is 0."""
        if not operator.normalize or operator.consensus != "linear":
            return operator
        total = sum(part.weight for part in parts)
        if abs(total) >= 1e-8:
            return operator
        if self.preset.stored:  # mergekit divides by 1 there
            return replace(operator, normalize=False)
        raise UserError(
            f"the weights for {key!r} sum to {total:g}, so nothing can be divided by their sum; give others, "
            "or normalize: false"
        )


def _span(slice_: Slice) -> tuple[int, int]:
    return slice_.sources[0].layers or (0, 0)


_NAMED = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def _dtypes(
    config: MergeConfig, preset: MergePreset, promoted: torch.dtype
) -> tuple[torch.dtype | None, torch.dtype, torch.dtype]:
    """What the inputs are cast to, what the arithmetic is in, and what is written."""
    if not promoted.is_floating_point:
        return None, promoted, promoted
    asked = _NAMED[config.dtype] if config.dtype else promoted
    out = _NAMED[config.out_dtype] if config.out_dtype else asked
    wide = torch.float64 if torch.float64 in (asked, promoted) else torch.float32
    if config.fidelity == "paper":
        return None, wide, out
    wide = torch.float64 if asked == torch.float64 else torch.float32
    return asked, asked if preset.stored else wide, out


def _check_families(inputs: Sequence[Input]) -> None:
    kinds = [str(model.config.get("model_type")) for model in inputs]
    for model, kind in zip(inputs, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{inputs[0].label} is of model_type {kinds[0]!r} and {model.label} of {kind!r}; weights can "
                "be merged within one architecture only"
            )
