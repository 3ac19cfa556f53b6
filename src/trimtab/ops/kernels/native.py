"""The engine in C: the whole step of many parameters in one pass over memory, on the CPU.

The C sources (``native.c`` and what lies in ``native``) are compiled at first use by the system's C compiler
(:mod:`~trimtab.ops.kernels.build`); where there is none, or where this torch rounds otherwise than the
kernels do, the engine is not available and says why. Its numbers are those of
:class:`~trimtab.ops.kernels.torch_engine.TorchEngine`, bit for bit, on any number of threads.

Each job keeps a table row (a C struct of pointers) in ``job.cache``, so that a step writes a gradient's
address and the address of its settings, and little more. Python threads call the C function, which takes work
from a counter: the calling thread takes part, and nobody spins.
"""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from trimtab.ops.combine import Operator
from trimtab.ops.formats import DenseTau, Int8Tau, SparseTau
from trimtab.ops.kernels.build import SOURCES
from trimtab.ops.kernels.job import Job, Settings, Stored
from trimtab.ops.kernels.loaded import load, together
from trimtab.ops.kernels.torch_engine import TorchEngine
from trimtab.ops.layout import Layout
from trimtab.ops.masks import FIRST_MOMENT, ROUNDING, UPDATE, MaskKey
from trimtab.ops.rounding import split_master

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_STORED = {"nearest": 0, "residual": 1, "stochastic": 2}
_SPARSIFIERS = {"none": 0, "bernoulli": 1, "top": 2}
_CONSENSUS = {"linear": 0, "sign": 1, "sign_unweighted": 2}
_TAU_FORMATS: dict[type, int] = {DenseTau: 1, Int8Tau: 2, SparseTau: 3}
_NO_CUT = -1
_SHORT = 64  # runs below this length (of a shard cut in an inner dimension) have their indices listed
_PER_THREAD = 1 << 17  # entries below which another thread costs more than it brings
_SHARED = 1 << 22  # entries from which on threads share a tensor that top has to see whole


def available() -> bool:
    """Whether the engine runs here; compiles it where that has not been done (1 to 3 seconds)."""
    return _loaded()[0] is not None


def reason() -> str | None:
    """Why the engine does not run here, in one sentence; None where it does."""
    return _loaded()[1]


class NativeEngine:
    """Runs jobs on the CPU: fp32, bf16 and fp16 parameters with fp32 or bf16 moments.

    Args:
        library: the compiled kernels; default those of this process.

    Raises:
        RuntimeError: the engine is not :func:`available`.
    """

    name = "native"
    measures = False

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        found, why = (library, None) if library is not None else _loaded()
        if found is None:
            raise RuntimeError(why)
        self._library = found

    def refuses(self, job: Job, operator: Operator) -> str | None:
        """Why the torch engine has to run this job; None where this one can."""
        return _refusal(job) or _operator_refusal(job, operator)

    def update(self, jobs: Sequence[Job]) -> None:
        """Advance Adam's moments and form Δ in full, in ``job.update`` (flat, fp32)."""
        for job in jobs:
            job.update = torch.empty(job.layout.numel, dtype=torch.float32)
        self._run(jobs, Operator(), only_update=True)

    def step(self, jobs: Sequence[Job], operator: Operator, sums: Tensor | None = None) -> None:
        """Take the step that :class:`~trimtab.ops.kernels.job.Job` describes.

        Args:
            jobs: what to step; none that :meth:`refuses` has named.
            operator: F and ⊕.
            sums: not served.
        """
        if sums is not None:
            raise ValueError("the native engine does not measure; give the step that measures to another")
        self._run(jobs, operator, only_update=False)

    def _run(self, jobs: Sequence[Job], operator: Operator, *, only_update: bool) -> None:
        alive: list[Any] = []  # what C reads by address in this call
        rows = array("q", bytes(8 * len(jobs)))
        last, settings = None, 0
        for i, job in enumerate(jobs):
            row = job.cache
            if row.__class__ is not _Row:
                row = job.cache = _Row(job)
            if job.settings is not last:
                last, settings = job.settings, _settings(job.settings, operator, alive)
            row.prepare(job, settings, alive)
            rows[i] = row.address
        if not jobs:
            return
        fields = _fields()["Plan"]
        plan = array("q", bytes(8 * len(fields)))
        ends = array("q", bytes(8 * len(jobs)))
        plan[fields["jobs"]], plan[fields["ends"]] = rows.buffer_info()[0], ends.buffer_info()[0]
        plan[fields["job_count"]], plan[fields["threads"]] = len(jobs), torch.get_num_threads()
        plan[fields["shared"]] = _SHARED
        plan[fields["sparsify"]] = _SPARSIFIERS[operator.sparsify]
        plan[fields["consensus"]] = _CONSENSUS[operator.consensus]
        plan[fields["only_update"]] = only_update
        _work(self._library, plan)
        if plan[fields["failed"]]:
            raise MemoryError("the CPU kernels found no memory to select the largest updates in")


class _Row:
    """A job as C sees it: one struct, written once, of which a step changes a few fields."""

    __slots__ = (
        "address",
        "count",
        "cuts",
        "factors",
        "grad_dtype",
        "held",
        "reals",
        "struct",
        "tau",
        "words",
    )

    def __init__(self, job: Job) -> None:
        self.struct = (ctypes.c_int64 * len(_ROW))()
        self.address = ctypes.addressof(self.struct)
        self.words = memoryview(self.struct).cast("B").cast("q")
        self.reals = memoryview(self.struct).cast("B").cast("d")
        self.tau: Any = None
        self.grad_dtype = torch.float32
        self.count = -1
        self.cuts: Any = ()
        self.factors: Any = ()
        layout = job.layout
        spans = array("q", [number for span in layout.spans() for number in _span(span)])
        lanes = _lanes(job.seed, job.name, (max(layout.total, 1) - 1) >> 32)
        self.held = (spans, lanes)
        runs = [span.run for span in layout.spans()]
        words = {
            "param": job.param.data_ptr(),
            "residual": _pointer(job.residual),
            "first": _pointer(job.exp_avg),
            "second": _pointer(job.exp_avg_sq),
            "spans": spans.buffer_info()[0],
            "lanes": lanes.buffer_info()[0],
            "span_count": len(runs),
            "entries": layout.numel,
            "total": layout.total,
            "scattered": int(bool(runs) and min(runs) < min(_SHORT, layout.numel)),
            "param_kind": _KINDS[job.param.dtype],
            "stored": _STORED[job.stored],
            "moment_kind": 0 if job.exp_avg is None else _KINDS[job.exp_avg.dtype],
        }
        for name, value in words.items():
            self.words[_ROW[name]] = value

    def prepare(self, job: Job, settings: int, alive: list[Any]) -> None:
        """Write what this step has: asked for each parameter in each step, so without detours."""
        words = self.words
        words[_SETTINGS] = settings
        grad, anchor, update = job.grad, job.anchor, job.update
        if grad is None:
            words[_GRAD] = 0
        else:
            if grad.dtype is not self.grad_dtype:
                grad = self._other_grad(grad, alive)
            if not grad.is_contiguous():
                grad = grad.contiguous()
                alive.append(grad)
            words[_GRAD] = grad.data_ptr()
        words[_UPDATE] = 0 if update is None else _checked(update, job, "update")
        words[_ANCHOR] = 0 if anchor is None else _checked(anchor, job, "anchor")
        self.reals[_ANCHOR_DECAY] = job.anchor_decay
        if job.tau is not self.tau or job.count != self.count:
            self._set_tau(job)
        if job.cuts is not self.cuts or job.factors is not self.factors:
            self._set_cuts(job)

    def _other_grad(self, grad: Tensor, alive: list[Any]) -> Tensor:
        if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            grad = grad.to(torch.float32)
            alive.append(grad)
        self.grad_dtype = grad.dtype
        self.words[_ROW["grad_kind"]] = _KINDS[grad.dtype]
        return grad

    def _set_tau(self, job: Job) -> None:
        tau: Any = job.tau
        self.tau, self.count = tau, job.count
        words = dict.fromkeys(("scales", "starts", "offsets", "tau_kind", "scale_block", "scale_first"), 0)
        words |= {"tau_format": 0, "tau": 0, "tau_masked": 0, "count": job.count, "tau_cut": _NO_CUT}
        if tau is not None:
            values = tau.codes if isinstance(tau, Int8Tau) else tau.values
            words |= {
                "tau_format": _TAU_FORMATS[type(tau)],
                "tau": values.data_ptr(),
                "tau_masked": tau.masked,
            }
            words["tau_kind"] = _KINDS.get(values.dtype, 0)
        if isinstance(tau, Int8Tau):
            words |= {
                "scales": tau.scales.data_ptr(),
                "scale_block": tau.block,
                "scale_first": tau.first_block,
            }
        elif isinstance(tau, SparseTau):
            words |= {"starts": tau.starts.data_ptr(), "offsets": tau.offsets.data_ptr()}
        for name, value in words.items():
            self.words[_ROW[name]] = value
        self.cuts = ()

    def _set_cuts(self, job: Job) -> None:
        self.cuts, self.factors = job.cuts, job.factors
        for name, cut in zip(("update_cut", "tau_cut"), job.cuts, strict=True):
            self.words[_ROW[name]] = _NO_CUT if cut is None else cut.bits
            self.words[_ROW[f"{name}_index"]] = 0 if cut is None else cut.index
        for name, factor in zip(("update_factor", "tau_factor"), job.factors or (1.0, 1.0), strict=True):
            self.reals[_ROW[name]] = factor


def _checked(tensor: Tensor, job: Job, what: str) -> int:
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous() or tensor.numel() != job.layout.numel:
        raise ValueError(f"{job.name}: {what} must be contiguous fp32 of {job.layout.numel} entries")
    return tensor.data_ptr()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _span(span: Any) -> tuple[int, int, int, int, int]:
    return span.first, span.count, span.base, span.run, span.stride


@lru_cache(maxsize=1 << 14)
def _lanes(seed: int, name: str, highest: int) -> array[int]:
    """The lanes of the pairs of streams that the kernels draw from, for each upper half of an index."""
    keys = [MaskKey(seed, stream, 0, name) for stream in (UPDATE, FIRST_MOMENT, ROUNDING)]
    return array("Q", [lane for high in range(highest + 1) for key in keys for lane in key.lanes(high)])


def _settings(settings: Settings, operator: Operator, alive: list[Any]) -> int:
    """Address of a step's settings as C reads them."""
    at = _fields()["Settings"]
    struct = (ctypes.c_int64 * len(at))()
    alive.append(struct)
    words = memoryview(struct).cast("B").cast("q")
    reals = memoryview(struct).cast("B").cast("d")
    rescaled = operator.rescale == "expected" and operator.sparsify == "bernoulli" and settings.rate != 1
    before, after = (1.0, settings.decay) if settings.decay_after else (settings.decay, 1.0)
    whole = {
        "merge": settings.merge,
        "identity": settings.rate == 1,
        "threshold": round(settings.rate * (1 << 32)),
        "step": settings.step,
        "maximize": settings.maximize,
        "reopen": settings.reopen,
        "factors_given": operator.rescale == "l1",
    }
    real = {
        "weight_update": settings.weights[0],
        "weight_tau": settings.weights[1],
        "decay_before": before,
        "decay_after": after,
        "one_minus_beta1": 1 - settings.beta1,
        "beta2": settings.beta2,
        "one_minus_beta2": 1 - settings.beta2,
        "correction": (1 - settings.beta2**settings.step) ** 0.5,
        "eps": settings.eps,
        "size": -(settings.lr / (1 - settings.beta1**settings.step)),
        "expected": 1.0 / settings.rate if rescaled else 1.0,
    }
    for name, value in whole.items():
        words[at[name]] = value
    for name, number in real.items():
        reals[at[name]] = number
    return ctypes.addressof(struct)


# -- what the engine does not run


def _refusal(job: Job) -> str | None:
    """What about the parameter and its state the kernels do not know."""
    param, stored = job.param, job.stored
    moments = [moment for moment in (job.exp_avg, job.exp_avg_sq) if moment is not None]
    if param.device.type != "cpu":
        return f"the kernels run on the CPU, and {job.name} is on {param.device.type}"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels have no {_name(param.dtype)} parameters"
    if param.dtype == torch.float16 and not _has_half():
        return "the kernels have no fp16 on this processor"
    if param.dtype == torch.float32 and stored != "nearest":
        return f"the kernels keep fp32 parameters as they are, without rounding {stored!r}"
    if job.update_dtype not in (None, torch.float32):
        return f"the kernels have no updates in {_name(job.update_dtype)}"
    if job.max_exp_avg_sq is not None:
        return "the kernels have no AMSGrad"
    if any(type(m) is not Tensor or m.dtype not in (torch.float32, torch.bfloat16) for m in moments):
        return "the kernels have fp32 and bf16 moments only"
    if len({m.dtype for m in moments}) > 1:
        return "the kernels want both moments in one dtype"
    if not all(t.is_contiguous() for t in (param, job.residual, *moments) if t is not None):
        return f"{job.name} or its state is not contiguous"
    return None


def _operator_refusal(job: Job, operator: Operator) -> str | None:
    if operator.normalize:
        return "the kernels do not normalize"
    if operator.consensus not in _CONSENSUS:
        return f"the kernels have no consensus {operator.consensus!r} (offline merging has)"
    if operator.rescale == "l1" and operator.sparsify != "none" and job.group is None:
        return "the kernels do not rescale by the L1 norm"
    if operator.sparsify == "top" and job.layout.numel >= 1 << 32:
        return "the kernels select among fewer than 2^32 entries"
    return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# -- copies


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy contiguous CPU tensors into others of the same size, past the caches.

    Args:
        pairs: (to, from) each.
    """
    found, why = _loaded()
    if found is None:
        raise RuntimeError(why)
    fields = _fields()["Copies"]
    to = array("q", [one.data_ptr() for one, _ in pairs])
    given = array("q", [one.data_ptr() for _, one in pairs])
    sizes = array("q", [one.numel() * one.itemsize for _, one in pairs])
    ends = array("q", bytes(8 * len(pairs)))
    plan = array("q", bytes(8 * len(fields)))
    for name, words in (("to", to), ("from", given), ("bytes", sizes), ("ends", ends)):
        plan[fields[name]] = words.buffer_info()[0]
    plan[fields["count"]] = len(pairs)
    address = plan.buffer_info()[0]
    pieces = found.trimtab_copy_begin(address)
    together(found.trimtab_copy, address, min(pieces, torch.get_num_threads()))


# -- threads


def _work(found: ctypes.CDLL, plan: array[int]) -> None:
    """Run a plan to its end on as many threads as it is worth."""
    fields, address = _fields()["Plan"], plan.buffer_info()[0]
    try:
        items = found.trimtab_begin(address)
        while items > 0:
            worth = min(items, torch.get_num_threads(), 1 + plan[fields["entries"]] // _PER_THREAD)
            together(found.trimtab_work, address, worth)
            items = found.trimtab_continue(address)
    finally:
        found.trimtab_end(address)


# -- the library


@cache
def _fields() -> dict[str, dict[str, int]]:
    """Names of the structs' fields and their places, in units of eight bytes, as job.h declares them."""
    text = (SOURCES / "native" / "job.h").read_text(encoding="utf-8")
    found = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\n\} (\w+);", text, re.DOTALL):
        names = re.findall(r"^    [\w ]+?[ *]+(\w+);", body, re.MULTILINE)
        found[name] = {field: place for place, field in enumerate(names)}
    return found


_ROW = _fields()["Job"]
_SETTINGS, _GRAD, _UPDATE, _ANCHOR = (_ROW[name] for name in ("settings", "grad", "update", "anchor"))
_ANCHOR_DECAY = _ROW["anchor_decay"]


_FUNCTIONS = {
    "trimtab_begin": ctypes.c_int64,
    "trimtab_continue": ctypes.c_int64,
    "trimtab_work": None,
    "trimtab_end": None,
    "trimtab_copy_begin": ctypes.c_int64,
    "trimtab_copy": None,
    "trimtab_size": ctypes.c_int64,
}
"""What the library offers, with what it returns."""


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found, why = load()
    if found is None:
        return None, why
    for name, result in _FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes = [ctypes.c_int64 if name == "trimtab_size" else ctypes.c_void_p]
        function.restype = result
    sizes = [8 * len(_fields()[name]) for name in ("Job", "Settings", "Plan", "Copies")]
    if sizes != [found.trimtab_size(i) for i in range(4)]:
        return None, "the compiled CPU kernels lay out their structs in an unexpected way"
    if what := _disagreement(NativeEngine(found)):
        return None, f"the compiled CPU kernels do not round as this torch does ({what} differ)"
    return found, None


def _disagreement(engine: NativeEngine) -> str | None:
    """What the kernels compute otherwise than torch in a few small steps; None where all bits agree."""
    plain, top = Operator("bernoulli"), Operator("top", consensus="sign")
    step = Settings(True, (0.9, 0.1), 0.3, decay=0.99, step=3, lr=1e-3)
    trials = [
        ("plain steps", Settings(False, (1.0, 0.0), 1.0, decay=0.99, step=3, lr=1e-3), plain, torch.float32),
        ("random masks", step, plain, torch.float32),
        ("largest entries", step, top, torch.float32),
        ("bf16 parameters", step, plain, torch.bfloat16),
    ]
    for what, settings, operator, dtype in trials:
        ours, theirs = (_trial(settings, dtype) for _ in range(2))
        engine.step([ours], operator)
        TorchEngine().step([theirs], operator)
        if not all(map(_same_bits, _written(ours), _written(theirs))):
            return what
    return None


def _trial(settings: Settings, dtype: torch.dtype) -> Job:
    """A job of numbers that are easily made: most ordinary, some 0, tiny or infinite."""
    count = torch.arange(3001, dtype=torch.float64, device="cpu")
    waves = [(count * factor).sin().to(torch.float32) for factor in (0.7, 1.3, 2.9, 0.11)]
    first, second = waves[1] * 1e-3, waves[2].square() * 1e-6
    for at, value in enumerate((0.0, 1e-45, 1e-39, 1e-33, torch.inf)):
        second[7 + at] = value
    low = dtype != torch.float32
    param, residual = split_master(waves[3], dtype) if low else (waves[3], None)
    stored: Stored = "residual" if low else "nearest"
    job = Job("trial", 1, Layout.whole((3001,)), param, stored, residual, first.to(dtype), second.to(dtype))
    job.settings, job.grad, job.count = settings, waves[0] * 1e-3, 700
    job.tau = DenseTau(waves[1].roll(1) * 1e-3, masked=low)
    return job


def _written(job: Job) -> list[Tensor]:
    return [t for t in (job.param, job.residual, job.exp_avg, job.exp_avg_sq) if t is not None]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@cache
def _has_half() -> bool:
    found, _ = _loaded()
    return found is not None and bool(found.trimtab_size(4))
