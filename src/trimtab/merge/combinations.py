"""What cannot be meant in a merge's configuration whose values are right one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.merge.methods import NEEDS_BASE, TAKES_TWO, required_by, taken_by
from trimtab.merge.model_ref import ModelRef
from trimtab.yaml_file import Key, Problem, dotted

if TYPE_CHECKING:
    from trimtab.merge.config import MergeConfig, Slice


@dataclass(frozen=True)
class Draft:
    """A slice, with where it was written.

    Args:
        slice: the slice.
        key: where its own keys are.
        sources_key: where its sources are.
        listed: how many of its sources were written; the base_model may have been added after them.
    """

    slice: Slice
    key: Key
    sources_key: Key
    listed: int

    @property
    def others(self) -> int:
        """How many of the sources are not the base."""
        return sum(source.model != self.slice.base for source in self.slice.sources)

    @property
    def holds_base(self) -> bool:
        """Whether the base is one of the sources."""
        return any(source.model == self.slice.base for source in self.slice.sources)


def combination_problems(config: MergeConfig, drafts: Sequence[Draft]) -> Iterator[Problem]:
    """Yield what does not fit together."""
    for draft in drafts:
        yield from _same_model_twice(draft)
        yield from _unequal_layers(draft)
        if config.method in NEEDS_BASE:
            yield from _inputs(config, draft)
        yield from _missing_parameters(config, draft)


def _same_model_twice(draft: Draft) -> Iterator[Problem]:
    first: dict[ModelRef, int] = {}
    for index, source in enumerate(draft.slice.sources):
        if source.model in first:
            earlier = dotted((*draft.sources_key, first[source.model], "model"))
            yield Problem(
                (*draft.sources_key, index, "model"),
                f"{str(source.model)!r} is {earlier} again; each input of a merge is another model",
            )
        first.setdefault(source.model, index)


def _unequal_layers(draft: Draft) -> Iterator[Problem]:
    layers = [source.layers for source in draft.slice.sources if source.layers is not None]
    for index, (low, high) in enumerate(layers):
        wanted = layers[0][1] - layers[0][0]
        if high - low != wanted:
            yield Problem(
                (*draft.sources_key, index, "layer_range"),
                f"[{low}, {high}] holds {_counted(high - low, 'layer')}, and the slice's first source has "
                f"{wanted}; all sources of a slice have equally many",
            )


def _inputs(config: MergeConfig, draft: Draft) -> Iterator[Problem]:
    """The base is there, and so are as many other models as the method takes."""
    method, base = config.method, draft.slice.base
    if base is None:
        yield Problem(("base_model",), f"is missing: method {method} {NEEDS_BASE[method]}")
        return
    if not draft.holds_base:
        yield Problem(
            draft.sources_key,
            f"do not hold the base_model {str(base)!r}: method {method} {NEEDS_BASE[method]}; add it as a "
            "source with its layer_range",
        )
    elif method in TAKES_TWO and draft.others != 1:
        yield Problem(
            draft.sources_key,
            f"hold {_counted(draft.others, 'model')} beside the base_model {str(base)!r}; method {method} "
            "takes exactly one",
        )
    elif draft.others == 0:
        yield Problem(
            draft.sources_key,
            f"hold no model beside the base_model {str(base)!r}; method {method} takes at least one",
        )


def _missing_parameters(config: MergeConfig, draft: Draft) -> Iterator[Problem]:
    """What has no default is written somewhere; whether its filters let every tensor through shows later."""
    taken = taken_by(config.method)
    for name in required_by(config.method):
        if name in config.parameters or name in draft.slice.parameters:
            continue
        if taken[name].scope == "shared":
            if any(name in source.parameters for source in draft.slice.sources):
                continue  # it was refused there
            key = (*draft.key, "parameters", name)
            yield Problem(key, f"is missing: method {config.method} needs it; give it here{_or_above(draft)}")
            continue
        for index, source in enumerate(draft.slice.sources):
            if name in source.parameters or (
                taken[name].scope == "non_base" and source.model == draft.slice.base
            ):
                continue
            yield _missing_in(config, draft, index, name)


def _missing_in(config: MergeConfig, draft: Draft, index: int, name: str) -> Problem:
    if index >= draft.listed:
        return Problem(
            ("base_model",),
            f"{str(draft.slice.base)!r} is an input of method {config.method} as well, and has no {name}; "
            f"list it under models with its {name}, or leave it out",
        )
    return Problem(
        (*draft.sources_key, index, "parameters", name),
        f"is missing: method {config.method} needs it for each model; give it here or under parameters",
    )


def _or_above(draft: Draft) -> str:
    return " or under parameters" if draft.key else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
