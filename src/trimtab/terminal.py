"""What a command lets its libraries say, and how it speaks itself."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def is_first_process() -> bool:
    """Whether this process speaks for the run; torchrun numbers the processes in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line on the error stream, once per run."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on the error stream if that is a terminal; yield what is called with each number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, advance=done)


@contextmanager
def plain_libraries() -> Iterator[None]:
    """Keep the libraries' progress bars to terminals, and drop warnings that a user can do nothing about."""
    import datasets
    from transformers.utils import logging

    hide = not sys.stderr.isatty()
    bars, loading = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    if hide:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # TRL 1.16 still uses names that transformers 5.23 has replaced.
            warnings.filterwarnings(
                "ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning
            )
            warnings.showwarning = _show(warnings.showwarning)
            yield
    finally:
        if hide and not bars:
            datasets.enable_progress_bars()
        if hide and loading:
            logging.enable_progress_bar()


def _show(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Our own warnings are sentences for users, so they are said without the place in the source."""

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category.__module__.startswith("trimtab."):
            say(f"warning: {message}")
        else:
            otherwise(message, category, *args, **kwargs)

    return show
