"""One step's launches for one list of jobs, prepared once and run in every step that is alike.

Jobs whose code is the same share a launch, whatever their number; a model has one to three such kinds. What
changes from step to step (addresses of gradients, scalars) goes to the device in one copy from pinned memory,
which the host does not wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.combine import Operator
from trimtab.ops.formats import DenseTau, Int8Tau, SparseTau
from trimtab.ops.kernels import triton_kernels as kernels
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.triton_columns import column
from trimtab.ops.kernels.triton_numbers import NEAREST, RESIDUAL, STOCHASTIC
from trimtab.ops.kernels.triton_search import Search, Shape, options
from trimtab.ops.kernels.triton_tables import (
    Known,
    Terms,
    Words,
    entries_before,
    fill_rows,
    program_blocks,
    tau_cut,
    tau_words,
)

DTYPES: dict[torch.dtype, Any] = kernels.FORMATS
_FP32 = DTYPES[torch.float32]
_STORED = {"nearest": NEAREST.value, "residual": RESIDUAL.value, "stochastic": STOCHASTIC.value}
_VOTES = {
    "linear": kernels.LINEAR.value,
    "sign": kernels.SIGN.value,
    "sign_unweighted": kernels.SIGN_UNWEIGHTED.value,
}
_KEEP_ALL, _BERNOULLI, _TOP = (how.value for how in (kernels.KEEP_ALL, kernels.BERNOULLI, kernels.TOP))
_DENSE, _SPARSE = kernels.DENSE.value, kernels.SPARSE.value
_PLAIN, _MERGE, _FORM = (mode.value for mode in (kernels.PLAIN, kernels.MERGE, kernels.FORM))
_NOTHING, _ADVANCE, _REPEAT, _BUFFER = (
    source.value for source in (kernels.NOTHING, kernels.ADVANCE, kernels.REPEAT, kernels.BUFFER)
)
_GRAD, _ANCHOR, _UPDATE, _TAU, _CUT, _TAU_CUT, _FACTOR, _ANCHOR_DECAY, _ANCHOR_DECAY_64 = map(
    column,
    (
        "grad",
        "anchor",
        "update",
        "tau",
        "cut_bits",
        "tau_bits",
        "update_factor",
        "anchor_decay",
        "anchor_decay_64",
    ),
)


class Kind(NamedTuple):
    """The arguments that a job's code is compiled for; jobs of one kind share launches."""

    ALIGNED: bool
    RUNS: bool
    MODE: int
    SOURCE: int
    ANCHOR: bool
    REOPEN: bool
    PARAM: Any
    STORED: int
    WIDE: bool
    GRAD: Any
    MOMENT: Any
    GREATEST: bool
    TAU: int
    TAU_KIND: Any
    THIN: int
    THIN_TAU: int
    HASH: bool
    FINE: bool
    SKIP: bool
    RESCALE: bool
    VOTE: int
    searches: bool


class Turn(NamedTuple):
    """One job in one step.

    Args:
        job: the job, with this step's fields.
        it: what is known of it.
        terms: what its settings ask for.
        grad: its gradient, contiguous and in a dtype the kernels read.
        form: whether Δ is to be formed only.
        aligned: whether addresses (but τ's), ends and sizes are multiples of 16 (bytes, entries).
    """

    job: Job
    it: Known
    terms: Terms
    grad: Tensor | None
    form: bool
    aligned: bool


def kind_of(turn: Turn, operator: Operator) -> Kind:
    """What code a job needs in this step."""
    job, it, terms = turn.job, turn.it, turn.terms
    merge = terms.merge and not turn.form
    source = _NOTHING if turn.grad is None else _ADVANCE
    if merge and job.update is not None:
        source = _BUFFER
    thin = thin_tau = _KEEP_ALL
    if merge and terms.thins and (operator.sparsify == "bernoulli" or job.count < job.layout.total):
        thin = _TOP if operator.sparsify == "top" else _BERNOULLI
        thin_tau = _KEEP_ALL if job.tau is None or job.tau.masked else thin
    searches = thin == _TOP and job.cuts[0] is None
    moment = DTYPES[job.exp_avg.dtype] if job.exp_avg is not None else _FP32
    if searches and source == _ADVANCE and moment == _FP32:
        source = _REPEAT  # the search has advanced the moments
    tau, tau_kind = _tau_kind(job) if merge else (_DENSE, _FP32)
    begin = tau_words(job, it)[0] if merge else 0
    return Kind(
        ALIGNED=turn.aligned and not begin % 16,
        RUNS=it.runs,
        MODE=_FORM if turn.form else _MERGE if merge else _PLAIN,
        SOURCE=source,
        ANCHOR=job.anchor is not None and (merge or turn.form),
        REOPEN=terms.reopens and not turn.form and job.anchor is not None,
        PARAM=DTYPES[job.param.dtype],
        STORED=_STORED[job.stored],
        WIDE=job.param.dtype == torch.float32 and job.stored != "nearest",
        GRAD=_FP32 if turn.grad is None else DTYPES[turn.grad.dtype],
        MOMENT=moment,
        GREATEST=job.max_exp_avg_sq is not None,
        TAU=tau,
        TAU_KIND=tau_kind,
        THIN=thin,
        THIN_TAU=thin_tau,
        HASH=_BERNOULLI in (thin, thin_tau),
        FINE=merge and terms.fine,
        SKIP=merge and terms.skips and thin_tau == _BERNOULLI,
        RESCALE=merge and operator.rescale != "none",
        VOTE=_VOTES[operator.consensus] if merge else 0,
        searches=searches,
    )


def _tau_kind(job: Job) -> tuple[int, Any]:
    if isinstance(job.tau, Int8Tau):
        return kernels.INT8.value, _FP32
    assert isinstance(job.tau, DenseTau | SparseTau)
    return _DENSE if isinstance(job.tau, DenseTau) else _SPARSE, DTYPES[job.tau.values.dtype]


class Launch(NamedTuple):
    """Jobs of one kind: their programs, and, where they search, the numbers of their searches.

    ``scans`` are the programs again, with the search's number instead of the sparse τ's entries.
    """

    kind: Kind
    constants: dict[str, Any]
    owners: Tensor
    scans: Tensor
    which: Tensor


class Plan:
    """The launches of one list of jobs.

    Args:
        turns: the jobs, on one device, in a first step.
        kinds: what code each needs.
        operator: F and ⊕.
        shape: how the kernels cut their work.
    """

    def __init__(
        self, turns: Sequence[Turn], kinds: Sequence[Kind], operator: Operator, shape: Shape
    ) -> None:
        self.operator, self.shape = operator, shape
        self.device = turns[0].job.param.device
        self.taus = [turn.job.tau for turn in turns]  # alive, so that no other takes its identity
        self.template = np.stack([turn.it.row for turn in turns])
        self.clocked = bool(self.template[:, column("clock")].any())
        self.spare = self._staging()
        self.pieces = self._placed(np.concatenate([turn.it.pieces for turn in turns]))
        self.searching = [i for i, kind in enumerate(kinds) if kind.searches]
        self.search: Search | None = None
        self.kinds = list(kinds)
        self.special = [i for i, kind in enumerate(kinds) if _is_special(kind)]
        self.merging = [i for i, kind in enumerate(kinds) if kind.MODE == _MERGE]
        self.launches = self._prepared(turns)

    def run(self, jobs: Sequence[Job], its: Sequence[Known], grads: Sequence[Tensor | None]) -> None:
        """Send this step's rows to the device and launch.

        Args:
            jobs: the jobs, with this step's fields.
            its: what is known of them.
            grads: their gradients, as the kernels can read them.
        """
        rows = self._send(jobs, its, grads)
        if self.clocked:
            kernels.tick[(len(jobs),)](rows, num_warps=1)
        if self.searching:
            searching = [jobs[i] for i in self.searching]
            if self.search is None or self.search.counts != [job.count for job in searching]:
                self.search = Search(searching, self.searching, self.shape, self.device)
            self.search.run(self.launches, self.pieces, rows)
        for launch in self.launches:
            kernels.sweep[(len(launch.owners),)](
                launch.owners,
                self.pieces,
                rows,
                BLOCK=self.shape.block,
                INTERPRET=kernels.INTERPRETED,
                **launch.constants,
                **options(self.shape.warps),
            )

    def _prepared(self, turns: Sequence[Turn]) -> list[Launch]:
        offsets = np.cumsum([0, *(len(turn.it.pieces) for turn in turns)])
        numbers = {i: number for number, i in enumerate(self.searching)}
        launches = []
        for kind in dict.fromkeys(self.kinds):
            members = [i for i, one in enumerate(self.kinds) if one == kind]
            owners = np.concatenate([self._owners(turns[i].it, i, int(offsets[i]), kind) for i in members])
            if not len(owners):
                continue
            scans, which = owners[:0], [numbers[i] for i in members if kind.searches]
            if kind.searches:
                scans = owners.copy()
                scans[:, 3] = [numbers[i] for i in owners[:, 0].tolist()]
            placed = (self._placed(a.astype(np.int32)) for a in (owners, scans, np.array(which)))
            constants = kind._asdict()
            del constants["searches"]
            launches.append(Launch(kind, constants, *placed))
        return launches

    def _owners(self, it: Known, job: int, first_piece: int, kind: Kind) -> Words:
        programs = program_blocks(it.pieces, self.shape.block)
        rows = np.zeros((len(programs), 4), dtype=np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = job, programs[:, 0] + first_piece, programs[:, 1]
        if kind.TAU == _SPARSE and len(programs):
            rows[:, 3] = entries_before(it, programs, self.shape.block)
        return rows

    def _send(self, jobs: Sequence[Job], its: Sequence[Known], grads: Sequence[Tensor | None]) -> Tensor:
        capturing = is_capturing(self.device)
        host = self.spare if capturing else self._staging()
        words = host.numpy()
        fill_rows(self.template, words, jobs, self.operator)
        words[:, _GRAD] = [0 if grad is None else grad.data_ptr() for grad in grads]
        if self.merging:
            taus = [tau_words(jobs[i], its[i]) for i in self.merging]
            words[self.merging, _TAU : _TAU + 2] = taus
        for i in self.special:
            _fill(jobs[i], its[i], self.kinds[i], words[i])
        if capturing:
            its[0].kept.append(self)  # at every replay the graph reads this host memory
        return host.to(self.device, non_blocking=True)

    def _staging(self) -> Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(self.template.shape, dtype=torch.int64, pin_memory=pinned)

    def _placed(self, array: Words) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _is_special(kind: Kind) -> bool:
    """Whether a job's row has more than addresses of gradient and τ to be written at each step."""
    buffered = kind.SOURCE == _BUFFER or kind.MODE == _FORM
    cut = kind.THIN_TAU == _TOP or (kind.THIN == _TOP and not kind.searches)
    return kind.ANCHOR or kind.REOPEN or kind.RESCALE or buffered or cut


def _fill(job: Job, it: Known, kind: Kind, row: Words) -> None:
    """Write what else is a job's own in this step: anchor, Δ, cuts and factors."""
    if kind.ANCHOR or kind.REOPEN:
        assert job.anchor is not None
        row[_ANCHOR] = job.anchor.data_ptr()
        row.view(np.float32)[2 * _ANCHOR_DECAY] = job.anchor_decay
        row.view(np.float64)[_ANCHOR_DECAY_64] = job.anchor_decay
    if job.update is not None:
        row[_UPDATE] = job.update.data_ptr()
    if kind.THIN == _TOP and job.cuts[0] is not None:
        row[_CUT : _CUT + 2] = job.cuts[0].bits, job.cuts[0].index
    if kind.THIN_TAU == _TOP:
        cut = tau_cut(job, it)
        row[_TAU_CUT : _TAU_CUT + 2] = cut.bits, cut.index
    if kind.RESCALE and job.factors is not None:
        row.view(np.float32)[2 * _FACTOR : 2 * _FACTOR + 4 : 2] = job.factors


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
