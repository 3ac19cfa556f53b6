"""Training runs in worker processes of one thread each, with one progress bar over all of them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trimtab.lab.methods import Plan, RunResult, train_run
from trimtab.lab.world import Task

_POLL = 0.2
_POSIX = hasattr(signal, "pthread_sigmask")
_steps: Any = None


@dataclass(frozen=True)
class Job:
    """One training run to be done."""

    method: str
    seed: int
    plan: Plan
    examples: tuple[Task, ...] = ()


def run_jobs(jobs: Sequence[Job], console: Console, workers: int = 2) -> list[RunResult]:
    """Do the jobs, ``workers`` at a time, and return their results in the order of the jobs.

    Args:
        jobs: What to do; put long ones first.
        console: Where the progress bar goes (nothing is drawn where it is no terminal).
        workers: Processes; 1 works in this process.
    """
    total = sum(job.plan.steps for job in jobs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("· about"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{len(jobs)} runs", total=total)
        if workers == 1:
            return _here(jobs, progress, bar)
        return _in_processes(jobs, progress, bar, workers)


def _here(jobs: Sequence[Job], progress: Progress, bar: Any) -> list[RunResult]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            train_run(
                job.method,
                job.seed,
                job.plan,
                examples=job.examples,
                report=lambda step: progress.advance(bar),
            )
            for job in jobs
        ]
    finally:
        torch.set_num_threads(threads)


def _in_processes(jobs: Sequence[Job], progress: Progress, bar: Any, workers: int) -> list[RunResult]:
    # Spawned, not forked: a forked child inherits torch's thread pools in whatever state they are.
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (steps,))
    try:
        with _what_children_inherit():
            futures = [pool.submit(_do, job) for job in jobs]
        _follow(futures, steps, progress, bar)
        return [future.result() for future in futures]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _what_children_inherit() -> Iterator[None]:
    """Let processes started inside have one OpenMP thread and never see Ctrl-C, from their first moment on.

    A signal handler or a thread count set by the worker itself would come after its imports: seconds in which
    Ctrl-C prints a traceback of each, and too late for OpenMP.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    # Blocked, not ignored: here a Ctrl-C of this moment waits until the end, the children keep it blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if _POSIX else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _follow(futures: Sequence[Future[RunResult]], steps: Any, progress: Progress, bar: Any) -> None:
    """Advance the bar until all jobs are done or one has failed."""
    while True:
        if any(future.done() and future.exception() is not None for future in futures):
            return
        finished = all(future.done() for future in futures)
        try:
            while True:
                progress.advance(bar, steps.get(timeout=0 if finished else _POLL))
        except queue.Empty:
            if finished:
                return


def _start_worker(steps: Any) -> None:
    global _steps
    _steps = steps
    torch.set_num_threads(1)


def _do(job: Job) -> RunResult:
    return train_run(job.method, job.seed, job.plan, examples=job.examples, report=lambda step: _steps.put(1))
