"""``--dry-run``: what a recipe comes to, without loading weights or writing anything."""

from __future__ import annotations

import math

import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from trimtab.recipe import Recipe, SampledLoss
from trimtab.terminal import is_first_process, plain_libraries
from trimtab.train.drift import Drift
from trimtab.train.estimate import Size, measure
from trimtab.train.parts import gather_parts


def describe(recipe: Recipe, console: Console | None = None) -> Size:
    """Print the resolved recipe, the size of the training and the data's counts.

    Args:
        recipe: a checked recipe.
        console: where to print; the standard output when not given.

    Returns:
        What was printed, as numbers.
    """
    with plain_libraries():
        parts = gather_parts(recipe, resumes=False)
        size = measure(parts)
    if is_first_process():
        console = console or Console()
        text = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=math.inf)
        if console.is_terminal:
            console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
        else:  # as it is: a wrapped line would not be YAML any more
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        for data in (parts.data, parts.held_out_data):
            if data is not None:
                console.print(data.report.table())
        console.print(size_table(size, recipe))
    return size


def size_table(size: Size, recipe: Recipe) -> Table:
    """Return the size of a training as a table."""
    table = Table(title="size of the training", show_header=False)
    table.add_row("parameters", f"{size.parameters:,} ({size.trainable:,} trained)")
    table.add_row("rows", "streamed" if size.rows is None else f"{size.rows:,}")
    packed = "at most " if getattr(recipe.loss, "packing", False) else ""
    unit = "responses" if isinstance(recipe.loss, SampledLoss) else "rows"
    table.add_row("steps", f"{packed}{size.steps:,} of {size.batch:,} {unit}")
    if recipe.optimizer.merges:
        table.add_row("drift", f"{Drift(recipe).after(size.steps, of=size.steps):.3g} τ expected at the end")
    for name, count in size.memory.items():
        table.add_row(f"memory: {name}", gigabytes(count))
    table.add_row("memory in all", f"{gigabytes(size.total_memory)} per process, and activations")
    return table


def gigabytes(count: int) -> str:
    """Spell a number of bytes.

    Examples:
        >>> gigabytes(538_000_000), gigabytes(83_000)
        ('0.54 GB', '0.08 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
