"""The merge itself: tensor after tensor, range after range, from mapped files to growing ones."""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from trimtab import __version__
from trimtab.delta.progress import progress_bar
from trimtab.merge.arithmetic import Cuts, Task, compute_into, decided, ranked
from trimtab.merge.card import model_card
from trimtab.merge.checks import check_different, not_finite, same_whole_numbers
from trimtab.merge.config import MergeConfig, load_config
from trimtab.merge.folder import (
    check_inputs_apart,
    check_out,
    check_space,
    folder_named,
    growing,
    write_surroundings,
)
from trimtab.merge.inputs import stamps
from trimtab.merge.plan import Output, Plan, make_plan
from trimtab.merge.tokens import tokenizer_folder
from trimtab.merge.writer import Entry, Shard, ShardWriter, sharded, write_index
from trimtab.ops.fingerprint import combined_digest
from trimtab.ops.sparsify import Cut, top_count

CHUNK = 1 << 23
"""Entries of an output tensor in fp32 that are in memory at a time, twice: one chunk is written while another
is computed. In other dtypes as many as take as many bytes."""

PIECE = 1 << 18
"""Entries that a thread works on at a time."""

Work = Callable[[int, int, Tensor], None]
"""Writes entries ``low … high−1`` of an output tensor."""

SHARD_SIZE = 5 * 10**9
"""Bytes of a file of the output, as transformers has it."""

Progress = Callable[[str, int, int], None]
"""Told (name, done, total) in bytes of the output."""


def merge(
    config: MergeConfig | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
) -> Path:
    """Merge models into a new one, in memory that does not grow with them.

    ``anchor + λ·⊕_w(F(θ₁ − anchor), F(θ₂ − anchor), …)`` for each tensor, with F, ⊕ and the anchor of the
    method's row in :data:`trimtab.ops.presets.MERGES`; see docs/merging.md.

    Args:
        config: a configuration, or the path of its YAML file.
        out: the folder to write; it appears whole or not at all.
        overwrite: replace a model that is there.
        shard_size: bytes of a file of weights, at most (a larger tensor has a file of its own).
        progress: show a bar on stderr if that is a terminal.

    Returns:
        The folder.

    Raises:
        UserError: something is wrong with the configuration, the models or ``out``: nothing is written.
    """
    target = folder_named(out)
    check_out(target, overwrite=overwrite)
    asked = config if isinstance(config, MergeConfig) else load_config(config)
    return run_plan(make_plan(asked), target, overwrite=overwrite, shard_size=shard_size, progress=progress)


def run_plan(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
) -> Path:
    """Carry out a plan; arguments as for :func:`merge`."""
    check_inputs_apart(out, plan)
    check_plan(plan, out)
    shards = sharded([output.entry for output in plan.outputs], shard_size)
    read = {path for model in plan.inputs for path in (model.folder, tokenizer_folder(model))}
    followed = [__version__, plan.config.text, repr(plan.outputs), repr(shards), *plan.fingerprints]
    digest = combined_digest([*followed, *(stamps(path) for path in sorted(read))])
    with growing(out, digest, shards, partial(check_out, out, overwrite=overwrite)) as folder:
        write_models([plan], {out.name: folder}, shards, progress=progress)
    return out


def check_plan(plan: Plan, out: Path, copies: int = 1) -> None:
    """Refuse what would fail later: a disk that is too small, a model that is the base."""
    check_space(out, copies * plan.size)
    check_different(plan)


def write_models(
    plans: Sequence[Plan], folders: Mapping[str, Path], shards: Sequence[Shard], *, progress: bool = False
) -> None:
    """Write the models of plans that differ in weights and rates alone, in one pass over their inputs.

    Args:
        plans: of the same inputs and output tensors, and of one method.
        folders: the name of each model, and the folder that its files go to.
        shards: which tensors go to which file; a file that all folders have is not written again.
        progress: as for :func:`merge`.
    """
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("merging")) if progress else _silent
        runner = stack.enter_context(running(plans, bar))
        for shard in shards:
            if all((folder / shard.file).is_file() for folder in folders.values()):
                runner.skip(shard)
            else:
                runner.write(list(folders.values()), shard)
    for plan, (name, folder) in zip(plans, folders.items(), strict=True):
        write_index(folder, shards)
        write_surroundings(folder, plan, model_card(plan, plan.fingerprints, name))


def chunk_of(dtype: torch.dtype) -> int:
    """Entries of a chunk in a dtype.

    Examples:
        >>> chunk_of(torch.bfloat16) == 2 * chunk_of(torch.float32)
        True
    """
    return max(1, CHUNK * torch.float32.itemsize // dtype.itemsize)


@contextmanager
def running(plans: Sequence[Plan], progress: Progress) -> Iterator[Runner]:
    """Yield what computes and writes, with its threads."""
    threads = max(1, torch.get_num_threads())
    try:
        with (
            ThreadPoolExecutor(threads, "merge", _one_thread) as pool,
            ThreadPoolExecutor(1, "write") as writing,
        ):
            yield Runner(plans, pool, writing, progress)
    finally:
        torch.set_num_threads(threads)  # what the pool has set holds for threads that begin later, too


class Runner:
    """Computes the tensors of plans and writes them.

    Args:
        plans: as for :func:`write_models`.
        pool: computes.
        writing: writes; one thread, so that the order stays.
        progress: is told how far it is.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        pool: ThreadPoolExecutor,
        writing: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self._plans = plans
        self._pool, self._writing, self._progress = pool, writing, progress
        self._place = {output.entry.key: number for number, output in enumerate(plans[0].outputs)}
        self._cuts: Mapping[int, Cuts] | None = None
        if plans[0].preset.scope == "model":
            self._cuts = model_cuts(plans)
            _give_back()
        self._buffers: dict[torch.dtype, list[_Buffer]] = {}
        self._done, self._total = 0, sum(plan.size for plan in plans)

    def skip(self, shard: Shard) -> None:
        """Count a file that was complete already."""
        self._done += shard.size * len(self._plans)
        self._progress(shard.file, self._done, self._total)

    def write(self, folders: Sequence[Path], shard: Shard) -> None:
        """Compute the tensors of one file of each output and write them."""
        with ExitStack() as stack:
            lasting = len(shard.entries) < len(self._plans[0].outputs)
            writers = [stack.enter_context(ShardWriter(folder, shard, lasting=lasting)) for folder in folders]
            stack.callback(self._settle)
            for number, entry in enumerate(shard.entries):
                works = self._prepared(self._place[entry.key])
                size = chunk_of(entry.dtype)
                for low in range(0, entry.count, size):
                    high = min(low + size, entry.count)
                    if high < entry.count:
                        self._expect(entry, high)
                    elif number + 1 < len(shard.entries):
                        self._expect(shard.entries[number + 1], 0)
                    for writer, work in zip(writers, works, strict=True):
                        self._chunk(writer, work, entry.dtype, low, high)
                    self._progress(entry.key, self._done, self._total)

    def _expect(self, entry: Entry, low: int) -> None:
        """Have the inputs of the chunk that begins at ``low`` read while another one is computed."""
        plan = self._plans[0]
        for origin in plan.outputs[self._place[entry.key]].origins():
            count = prod(plan.inputs[origin.model].shape(origin.key))
            high = low + chunk_of(entry.dtype)
            plan.inputs[origin.model].expect(origin.key, min(low, count), min(high, count))

    def _chunk(self, writer: ShardWriter, work: Work, dtype: torch.dtype, low: int, high: int) -> None:
        """Compute a range with all threads and have it written, while the next one is computed."""
        buffer = self._buffer(dtype, high - low)
        pieces = [(at, min(at + PIECE, high)) for at in range(low, high, PIECE)]
        for _ in self._pool.map(_compute, repeat(work), torch.split(buffer.values, PIECE), pieces):
            pass
        buffer.written = self._writing.submit(writer.write, buffer.values)
        self._done += buffer.values.numel() * dtype.itemsize

    def _prepared(self, number: int) -> list[Work]:
        """What computes a range of an output tensor in each plan; what needs the whole of it is decided."""
        outputs = [plan.outputs[number] for plan in self._plans]
        if outputs[0].copied:
            same = same_whole_numbers(self._plans[0], outputs[0])
            return [lambda low, high, out: out.copy_(same(low, high))] * len(outputs)
        tasks = [plan.task(output) for plan, output in zip(self._plans, outputs, strict=True)]
        found = None if self._cuts is None else self._cuts.get(number, {})
        return [
            _merging(plan, output, task)
            for plan, output, task in zip(self._plans, outputs, decided(tasks, found), strict=True)
        ]

    def _buffer(self, dtype: torch.dtype, count: int) -> _Buffer:
        """The memory that was written longest ago."""
        pair = self._buffers.setdefault(dtype, [_Buffer(dtype), _Buffer(dtype)])
        buffer = pair.pop(0)
        pair.append(buffer)
        buffer.wait()
        buffer.take(count)
        return buffer

    def _settle(self) -> None:
        """Wait until everything has been written."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer.wait()


class _Buffer:
    """Memory for one chunk."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype)
        self.values = self._memory
        self.written: Future[None] | None = None

    def take(self, count: int) -> None:
        """Make room for ``count`` entries."""
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=self._memory.dtype)
        self.values = self._memory[:count]

    def wait(self) -> None:
        """Wait until what is in it has been written."""
        written, self.written = self.written, None
        if written is not None:
            written.result()


def _compute(work: Work, part: Tensor, piece: tuple[int, int]) -> None:
    work(*piece, part)


def _merging(plan: Plan, output: Output, task: Task) -> Work:
    """What computes a range of an output tensor for which everything is decided."""

    def work(low: int, high: int, out: Tensor) -> None:
        if not compute_into(task, low, high, out):
            raise not_finite(plan, output, low, high)

    return work


def model_cuts(plans: Sequence[Plan]) -> Mapping[int, Cuts]:
    """Where ``top`` cuts deltas whose entries are ranked over all tensors of a model together.

    The tensors in which a model has the same rate are ranked as one, in the order of the output (TIES, arXiv
    2306.01708, Algorithm 1, trims the task vector as a whole).

    Returns:
        The number of an output tensor -> its cuts.
    """
    groups: dict[tuple[int, torch.dtype, tuple[int, ...]], set[float]] = defaultdict(set)
    tasks: dict[int, Task] = {}
    for plan in plans:
        members: dict[tuple[int, torch.dtype, float], list[int]] = defaultdict(list)
        for number, output in enumerate(plan.outputs):
            if output.copied or output.operator is None or output.operator.sparsify != "top":
                continue
            tasks[number] = plan.task(output)
            for part in output.parts:
                if 0 < part.rate < 1 and output.entry.count:
                    members[part.origin.model, output.dtype, part.rate].append(number)
        for (place, dtype, rate), listed in members.items():
            groups[place, dtype, tuple(listed)].add(rate)
    found: dict[int, dict[tuple[int, float], Cut]] = defaultdict(dict)
    for (place, _, numbers), rates in groups.items():
        own = [tasks[number] for number in numbers]
        native = all(task.native for task in own)  # digits of one kind for all
        terms = [next(term for term in task.terms if term.place == place) for task in own]
        magnitudes = [task.magnitudes(term, native=native) for task, term in zip(own, terms, strict=True)]
        total, asked = sum(one.total for one in magnitudes), sorted(rates)
        counts = [top_count(total, rate, own[0].counting) for rate in asked]
        for rate, found_there in zip(asked, ranked(magnitudes, counts), strict=True):
            for number, cut in zip(numbers, found_there, strict=True):
                found[number][place, rate] = cut
    return found


def _give_back() -> None:
    """Return freed memory to the system, where the C library can: ranking a model has used many small pieces.

    Of a model with 10⁹ parameters they are 30 MB, an entire chunk, which a merge in large pieces cannot use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _silent(name: str, done: int, total: int) -> None:
    return None
