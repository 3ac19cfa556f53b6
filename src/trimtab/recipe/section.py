"""What every section of a recipe is, and the sources of rows that several of them name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trimtab.recipe.values import Positive, PositiveCount, Text


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Source(Section):
    """One place that rows come from."""

    path: Text
    """A file (JSONL, JSON, Parquet, CSV; also .gz), a folder of them, or a hub id."""
    weight: Positive = 1.0
    """Passes over this source in one epoch: 0.5 takes a random half of its rows, 2 takes every row twice."""
    split: Text | None = None
    """Split of a hub dataset, or a word in a folder's file names.

    null: train; for eval: validation, else test.
    """
    subset: Text | None = None
    """Configuration of a hub dataset."""
    limit: PositiveCount | None = None
    """Use only the first rows, this many."""


def _as_sources(value: Any) -> Any:
    """One path, one mapping, or a list of either, as a list of mappings."""
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]
