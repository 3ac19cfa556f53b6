"""A progress bar for the one long pass over both models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.delta.record import Progress


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Show a bar on stderr if that is a terminal; yield the function to be called after each parameter.

    Args:
        description: what is being done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[name]}"),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None, name="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield advance
