"""The host's side of the GPU kernels' tables: what a job's row says, how its layout falls into pieces, which
programs there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.ops import moments
from trimtab.ops.combine import Operator
from trimtab.ops.formats import INT8_BLOCK, SPARSE_BLOCK, DenseTau, Int8Tau, SparseTau
from trimtab.ops.kernels.job import Job, Settings
from trimtab.ops.kernels.triton_columns import DOUBLES, INTEGERS, PIECE, SINGLES, WIDTH, column
from trimtab.ops.layout import Layout, Span
from trimtab.ops.masks import FIRST_MOMENT, ROUNDING, UPDATE, MaskKey
from trimtab.ops.sparsify import Cut, top_cut

Words = NDArray[np.int64]

KEEP_ALL = Cut(-1, 0)
"""The cut below which nothing lies."""
_LONGEST = 1 << 31  # entries of a piece
_WORD = (1 << 32) - 1


class Terms(NamedTuple):
    """What of a step's settings the kernels are compiled for."""

    merge: bool
    thins: bool
    fine: bool
    skips: bool
    reopens: bool


def terms_of(settings: Settings, operator: Operator) -> Terms:
    """What of a step's settings the kernels are compiled for."""
    thins = settings.merge and operator.sparsify != "none" and settings.rate != 1
    draws = thins and operator.sparsify == "bernoulli"
    # A sector of memory is 8 entries of fp32: below 1/16 most of them hold nothing that is kept.
    return Terms(
        settings.merge,
        thins,
        draws and bool(_threshold(settings) & 0xFFFF),
        draws and settings.rate < 1 / 16,
        settings.reopen,
    )


def _threshold(settings: Settings) -> int:
    return round(settings.rate * (1 << 32))


def settings_words(settings: Settings, operator: Operator) -> tuple[list[int], list[float], list[float]]:
    """The columns that follow from a step's settings alone, in the order of INTEGERS, SINGLES and DOUBLES."""
    decay = settings.decay
    before, after = (1.0, decay) if settings.decay_after else (decay, 1.0)
    weight = float(np.float32(1 - settings.beta1))
    light = abs(weight) < 0.5
    factor = 1.0 / settings.rate if operator.rescale == "expected" else 1.0
    singles = {
        "update_weight": settings.weights[0],
        "tau_weight": settings.weights[1],
        "update_factor": factor,
        "tau_factor": factor,
        "decay": before,
        "decay_after": after,
        "anchor_decay": 1.0,
        "sign": -1.0 if settings.maximize else 1.0,
        "blend": weight if light else float(np.float32(weight) - np.float32(1)),
        "light": float(light),
        "beta2": settings.beta2,
        "fresh": 1 - settings.beta2,
        "size": -(settings.lr / (1 - settings.beta1**settings.step)) if settings.step else 0.0,
        "root": (1 - settings.beta2**settings.step) ** 0.5 if settings.step else 1.0,
        "eps": settings.eps,
    }
    rate = (1 - decay) / settings.lr if settings.lr else 0.0
    doubles = {
        "decay_64": before,
        "decay_after_64": after,
        "anchor_decay_64": 1.0,
        "beta1_64": settings.beta1,
        "beta2_64": settings.beta2,
        "decay_rate_64": 0.0 if settings.decay_after else rate,
        "decay_after_rate_64": rate if settings.decay_after else 0.0,
    }
    integers = {"step": settings.step, "threshold": _threshold(settings), "cut_bits": -1, "tau_bits": -1}
    return (
        [integers.get(name, 0) for name in INTEGERS],
        [singles[name] for name in SINGLES],
        [doubles[name] for name in DOUBLES],
    )


# -- layouts


def pieces_of(layout: Layout, seed: int, name: str) -> Words:
    """The pieces of a layout, one row each: within one the global index has the same bits above the 32nd."""
    first_block = layout.spans()[0].base // INT8_BLOCK if layout.numel else 0
    lanes: dict[int, list[int]] = {}
    rows = []
    for span in _cut_at_words(layout):
        high = span.base >> 32
        if high not in lanes:
            pairs = [MaskKey(seed, s, 0, name).lanes(high) for s in (UPDATE, FIRST_MOMENT, ROUNDING)]
            lanes[high] = [_signed(lane) for lane in (*pairs[0], pairs[1][0], *pairs[2])]
        shift = (high << 32) // INT8_BLOCK - first_block
        base, stride = span.base & _WORD, span.stride & _WORD
        rows.append([span.first, span.count, base, span.run, stride, high, shift, *lanes[high]])
    return np.array(rows, dtype=np.int64).reshape(-1, len(PIECE))


def _cut_at_words(layout: Layout) -> Iterator[Span]:
    """The spans of a layout, cut where the index passes a multiple of 2^32."""
    for span in layout.spans():
        at = 0
        while at < span.count:
            row, along = divmod(at, span.run)
            base = span.base + row * span.stride + along
            left = min(((base >> 32) + 1 << 32) - base, _LONGEST)
            rows = min((span.count - at) // span.run, (left - span.run) // span.stride + 1)
            if along == 0 and rows > 1 and left >= span.run:
                count, run = rows * span.run, span.run
            else:
                count = run = min(span.run - along, left)
            yield Span(span.first + at, count, base, run, span.stride)
            at += count


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def program_blocks(pieces: Words, block: int) -> Words:
    """(piece, block within it) of every program that the pieces of one job need."""
    blocks = -(-pieces[:, 1] // block)
    piece = np.repeat(np.arange(len(pieces)), blocks)
    begins = np.cumsum(blocks) - blocks
    return np.stack([piece, np.arange(int(blocks.sum())) - begins[piece]], axis=1)


# -- jobs


@dataclass(slots=True, eq=False)
class Known:
    """What never changes while a job lives; the engine keeps it in ``job.cache``.

    Args:
        row: the job's row, with the addresses of what it owns.
        pieces: its layout.
        aligned: whether addresses, ends and sizes are multiples of 16 (bytes, entries).
        runs: whether a piece has gaps.
        plans: see :mod:`~trimtab.ops.kernels.triton_plan`; of the first job in a list.
        kept: what captured graphs need.
        device: where its tensors lie.
        decided: what its kind was decided for, last.
        operator: the operator that was.
        seen: the τ that was.
        kind: what was decided: its kind; None where the torch engine has to run it.
        tau: the τ whose address is held.
        tau_words: address and second address.
        tau_kept: tensors made for it.
        tau_cut: (count, where top cuts it).
    """

    row: Words
    pieces: Words
    aligned: bool
    runs: bool
    plans: dict[Any, Any]
    kept: list[Any]
    device: torch.device
    decided: tuple[Any, ...] = ()
    operator: Any = None
    seen: Any = None
    kind: Any = None
    tau: Any = None
    tau_words: tuple[int, int] = (0, 0)
    tau_kept: tuple[Tensor, ...] = ()
    tau_cut: tuple[int, Cut] | None = None


def known(job: Job) -> Known:
    """What is known of a job, found once."""
    cache = job.cache
    if type(cache) is not Known:
        cache = job.cache = _learn(job)
    return cache


def _learn(job: Job) -> Known:
    row = np.zeros(WIDTH, dtype=np.int64)
    owned = {
        "param": job.param,
        "residual": job.residual,
        "first": moments.flat(job.exp_avg),
        "second": moments.flat(job.exp_avg_sq),
        "greatest": job.max_exp_avg_sq,
        "clock": getattr(job, "device_step", None),
        "rate": getattr(job, "device_lr", None),
    }
    for name, tensor in owned.items():
        if tensor is not None:
            row[column(name)] = tensor.data_ptr()
    pieces = pieces_of(job.layout, job.seed, job.name)
    large = [row[column(name)] for name in ("param", "residual", "first", "second", "greatest")]
    aligned = not any(int(address) % 16 for address in large) and not bool((pieces[:, :2] % 16).any())
    runs = bool((pieces[:, 3] < pieces[:, 1]).any())
    return Known(row, pieces, aligned, runs, {}, [], job.param.device)


def tau_words(job: Job, it: Known) -> tuple[int, int]:
    """Address of τ's values or codes, and of its scales or bitmap."""
    if it.tau is not job.tau:
        it.tau, it.tau_cut, it.tau_kept = job.tau, None, ()
        if isinstance(job.tau, DenseTau):
            it.tau_words = job.tau.values.data_ptr(), 0
        elif isinstance(job.tau, Int8Tau):
            it.tau_words = job.tau.codes.data_ptr(), job.tau.scales.data_ptr()
        else:
            assert isinstance(job.tau, SparseTau)
            index = sparse_index(job.tau)
            bitmap = _bitmap(index, job.tau.numel)
            it.tau_kept = (index, bitmap)
            it.tau_words = job.tau.values.data_ptr(), bitmap.data_ptr()
    return it.tau_words


def sparse_index(tau: SparseTau) -> Tensor:
    """Local indices of a sparse τ's entries, ascending."""
    counts = tau.starts.diff()
    block = torch.arange(counts.numel(), device=counts.device)
    block = block.repeat_interleave(counts, output_size=tau.values.numel())
    return block * SPARSE_BLOCK + tau.offsets.to(torch.int64)


def _bitmap(index: Tensor, numel: int) -> Tensor:
    """One bit for each local entry, 32 to a word: which of them a sparse τ has."""
    bits = torch.ones(index.numel(), dtype=torch.int32, device=index.device) << (index & 31).to(torch.int32)
    return torch.zeros(-(-numel // 32), dtype=torch.int32, device=index.device).index_add_(
        0, index >> 5, bits
    )


def entries_before(it: Known, programs: Words, block: int) -> Words:
    """How many entries of a sparse τ lie before the first one of each program."""
    (index, _) = it.tau_kept
    begins = it.pieces[programs[:, 0], 0] + programs[:, 1] * block
    found = torch.searchsorted(index, torch.from_numpy(begins).to(index.device))
    return found.cpu().numpy()


def tau_cut(job: Job, it: Known) -> Cut:
    """Where top cuts τ: as the job says, or found once."""
    given = job.cuts[1]
    if given is not None:
        return given
    if it.tau_cut is None or it.tau_cut[0] != job.count:
        assert job.tau is not None
        it.tau_cut = job.count, top_cut(job.tau.dense(0, job.layout.numel), job.count)
    return it.tau_cut[1]


def fill_rows(template: Words, into: Words, jobs: Sequence[Job], operator: Operator) -> None:
    """Write the rows of a step: the template, and what follows from the jobs' settings.

    Args:
        template: (jobs, WIDTH) words that stay.
        into: (jobs, WIDTH) words, to be overwritten.
        jobs: the jobs.
        operator: F and ⊕.
    """
    into[...] = template
    singles, doubles = into.view(np.float32), into.view(np.float64)
    same: dict[int, list[int]] = {}
    for i, job in enumerate(jobs):
        same.setdefault(id(job.settings), []).append(i)
    at = column(INTEGERS[0])
    for rows in same.values():
        words = settings_words(jobs[rows[0]].settings, operator)
        where: Any = slice(None) if len(rows) == len(jobs) else np.array(rows)
        into[where, at : at + len(INTEGERS)] = words[0]
        first = at + len(INTEGERS)
        singles[where, 2 * first : 2 * (first + len(SINGLES)) : 2] = words[1]
        doubles[where, first + len(SINGLES) : WIDTH] = words[2]
