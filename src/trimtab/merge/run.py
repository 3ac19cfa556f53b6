"""The merge itself: tensor after tensor, range after range, from mapped files to a growing one."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from trimtab.delta.progress import progress_bar
from trimtab.errors import UserError
from trimtab.merge.arithmetic import Read, Task, coefficients, computed, decided, interpolated
from trimtab.merge.card import model_card
from trimtab.merge.config import MergeConfig, load_config
from trimtab.merge.folder import (
    check_inputs_apart,
    check_out,
    check_space,
    growing,
    write_surroundings,
)
from trimtab.merge.plan import Origin, Output, Plan, make_plan
from trimtab.merge.writer import Shard, ShardWriter, sharded, write_index
from trimtab.ops.fingerprint import combined_digest
from trimtab.ops.select import cuts
from trimtab.ops.sparsify import Cut, top_count

CHUNK = 1 << 23
"""Entries of an output tensor that are in memory at a time, twice: while one chunk is written, another one is
computed."""

PIECE = 1 << 17
"""Entries that a thread works on at a time."""

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
    target = Path(out).expanduser()
    check_out(target, overwrite=overwrite)
    asked = config if isinstance(config, MergeConfig) else load_config(config)
    return run_plan(make_plan(asked), target, shard_size=shard_size, progress=progress)


def run_plan(plan: Plan, out: Path, *, shard_size: int = SHARD_SIZE, progress: bool = False) -> Path:
    """Carry out a plan; arguments as for :func:`merge`."""
    check_inputs_apart(out, plan)
    check_space(out, plan.size)
    shards = sharded([output.entry for output in plan.outputs], shard_size)
    fingerprints = tuple(model.fingerprint() for model in plan.inputs)
    digest = combined_digest([plan.config.text, repr(shards), *fingerprints])
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("merging")) if progress else _silent
        threads = max(1, torch.get_num_threads())
        pool = stack.enter_context(ThreadPoolExecutor(threads, "merge", _one_thread))
        writing = stack.enter_context(ThreadPoolExecutor(1, "write"))
        _check_different(plan)
        folder = stack.enter_context(growing(out, digest, shards))
        runner = Runner(plan, pool, writing, bar)
        for shard in shards:
            if (folder / shard.file).is_file():
                runner.skip(shard)
            else:
                runner.write(folder, shard)
        write_index(folder, shards)
        write_surroundings(folder, plan, model_card(plan, fingerprints, out.name))
    return out


class Runner:
    """Computes a plan's tensors and writes them.

    Args:
        plan: the merge.
        pool: computes.
        writing: writes; one thread, so that the order stays.
        progress: is told how far it is.
    """

    def __init__(
        self, plan: Plan, pool: ThreadPoolExecutor, writing: ThreadPoolExecutor, progress: Progress
    ) -> None:
        self._plan = plan
        self._pool, self._writing, self._progress = pool, writing, progress
        self._outputs = {output.entry.key: output for output in plan.outputs}
        self._cuts = global_cuts(plan) if plan.preset.scope == "model" else {}
        self._buffers: dict[torch.dtype, list[_Buffer]] = {}
        self._done = 0

    def skip(self, shard: Shard) -> None:
        """Count a file that was complete already."""
        self._done += shard.size
        self._progress(shard.file, self._done, self._plan.size)

    def write(self, folder: Path, shard: Shard) -> None:
        """Compute the tensors of one file and write them."""
        with ShardWriter(folder, shard) as writer:
            for entry in shard.entries:
                for chunk in self._chunks(self._outputs[entry.key]):
                    chunk.written = self._writing.submit(writer.write, chunk.values)
                    self._done += chunk.values.numel() * entry.dtype.itemsize
                    self._progress(entry.key, self._done, self._plan.size)
            for buffers in self._buffers.values():
                for buffer in buffers:
                    buffer.wait()

    def _chunks(self, output: Output) -> Iterator[_Buffer]:
        """One output tensor in order; a chunk's memory is used again for the one after the next."""
        work = _prepared(self._plan, output, self._cuts.get(output.entry.key, ()))
        count = output.entry.count
        for low in range(0, count, CHUNK):
            high = min(low + CHUNK, count)
            buffer = self._buffer(output.entry.dtype, high - low)
            pieces = [(at, min(at + PIECE, high)) for at in range(low, high, PIECE)]
            parts = torch.split(buffer.values, PIECE)
            for _ in self._pool.map(_compute, repeat(work), parts, pieces):
                pass
            yield buffer

    def _buffer(self, dtype: torch.dtype, count: int) -> _Buffer:
        """The memory that was written longest ago."""
        pair = self._buffers.setdefault(dtype, [_Buffer(dtype), _Buffer(dtype)])
        buffer = pair.pop(0)
        pair.append(buffer)
        buffer.wait()
        buffer.take(count)
        return buffer


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
        if self.written is not None:
            self.written.result()
            self.written = None


def _compute(work: Callable[[int, int], Tensor], part: Tensor, piece: tuple[int, int]) -> None:
    part.copy_(work(*piece))


def _prepared(plan: Plan, output: Output, found: Sequence[Cut | None]) -> Callable[[int, int], Tensor]:
    """What computes a range of an output tensor, with everything decided that needs the whole of it."""
    if output.copied:
        return _copying(plan, output)

    def checked(origin: Origin, read: Read) -> Read:
        label = plan.inputs[origin.model].label
        return lambda low, high: _finite(read(low, high), f"tensor {origin.key!r} of {label} holds")

    task = plan.task(output, checked)
    if task.operator is None:
        factors = coefficients(task)
        work: Callable[[int, int], Tensor] = lambda low, high: interpolated(task, factors, low, high)  # noqa: E731
    else:
        ready = replace(decided(plan.task(output), found), terms=task.terms, base=task.base)
        work = lambda low, high: computed(ready, low, high)  # noqa: E731
    what = f"merging {output.entry.key!r} in {_name(output.entry.dtype)} gives"
    return lambda low, high: _finite(work(low, high).to(output.entry.dtype), what)


def _copying(plan: Plan, output: Output) -> Callable[[int, int], Tensor]:
    reads = [(plan.inputs[one.model], one.key) for one in output.origins()]

    def same(low: int, high: int) -> Tensor:
        values = [model.read(key, low, high) for model, key in reads]
        for (model, _), other in zip(reads[1:], values[1:], strict=True):
            if not torch.equal(values[0], other):
                raise UserError(
                    f"{output.entry.key!r} holds whole numbers, which are not merged, and they differ "
                    f"between {reads[0][0].label} and {model.label}"
                )
        return values[0]

    return same


def _finite(values: Tensor, what: str) -> Tensor:
    """The values, if none is NaN or infinite."""
    if values.numel():
        least, most = torch.aminmax(values)
        if not (least.isfinite() and most.isfinite()):
            wrong = values[~values.isfinite()]
            raise UserError(f"{what} {wrong[0].item()}; a merge needs finite weights")
    return values


def global_cuts(plan: Plan) -> dict[str, tuple[Cut | None, ...]]:
    """Where ``top`` cuts the deltas of models whose entries are ranked over all their tensors together.

    The tensors that a model has the same density in are ranked as one, in the order of the output (TIES,
    arXiv 2306.01708, Algorithm 1, trims the task vector as a whole).

    Returns:
        The cuts of each output tensor: one for each of its parts.
    """
    groups: dict[tuple[int, float, torch.dtype], list[tuple[str, int, Task]]] = defaultdict(list)
    found: dict[str, list[Cut | None]] = {}
    for output in plan.outputs:
        if output.copied or output.operator is None or output.operator.sparsify != "top":
            continue
        task = plan.task(output)
        found[output.entry.key] = [None] * len(task.terms)
        for number, term in enumerate(task.terms):
            if 0 < term.rate < 1 and task.count:
                groups[term.place, term.rate, task.dtype].append((output.entry.key, number, task))
    for (_, rate, _), members in groups.items():
        magnitudes = [task.magnitudes(task.terms[number]) for _, number, task in members]
        total = sum(one.total for one in magnitudes)
        count = top_count(total, rate, members[0][2].operator.counting)  # type: ignore[union-attr]
        for (key, number, _), cut in zip(members, cuts(magnitudes, [count])[0], strict=True):
            found[key][number] = cut
    return {key: tuple(one) for key, one in found.items()}


def _check_different(plan: Plan) -> None:
    """Refuse a model that is the base: it has no delta.

    Raises:
        UserError: names it.
    """
    if not plan.preset.anchored:
        return
    waiting = {part.origin.model for output in plan.outputs for part in output.parts}
    for output in plan.outputs:
        for part in output.parts:
            if part.origin.model in waiting and output.base is not None:
                reads = [_plain(plan, one) for one in (output.base, part.origin)]
                if not _equal(reads[0], reads[1], output.entry.count):
                    waiting.discard(part.origin.model)
        if not waiting:
            return
    base = plan.inputs[plan.outputs[0].base.model].label if plan.outputs[0].base else "the base"
    names = ", ".join(plan.inputs[place].label for place in sorted(waiting))
    raise UserError(
        f"{names} equals the base {base} in every entry, so there is nothing to merge in; give the model "
        "that was tuned from it"
    )


def _plain(plan: Plan, origin: Origin) -> Read:
    model = plan.inputs[origin.model]
    return lambda low, high: model.read(origin.key, low, high)


def _equal(one: Read, other: Read, count: int) -> bool:
    """Whether two tensors are equal; a difference is mostly found at once."""
    low, size = 0, 1 << 10
    while low < count:
        high = min(low + size, count)
        if not torch.equal(one(low, high).to(torch.float64), other(low, high).to(torch.float64)):
            return False
        low, size = high, min(size * 4, PIECE)
    return True


def _one_thread() -> None:
    torch.set_num_threads(1)


def _silent(name: str, done: int, total: int) -> None:
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
