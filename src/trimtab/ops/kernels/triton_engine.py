"""The engine for GPUs: one launch for all parameters of a kind, through Triton.

Importing this module imports triton, which torch brings along where it is built for CUDA. With
TRITON_INTERPRET=1 set before that, the kernels run in Triton's interpreter on tensors of the CPU: slow,
and for tests.

Masks are the CPU's bit for bit. Values are the CPU's within 2 units in the last place of fp32: every
product, sum, quotient and root is rounded as IEEE 754 says, and fused where torch's CPU code fuses it, so
what differs is where that code is not exact itself (its vectorised square root is not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from trimtab.ops.combine import Operator
from trimtab.ops.formats import INT8_BLOCK, DenseTau, Int8Tau, SparseTau
from trimtab.ops.kernels.job import Job
from trimtab.ops.kernels.torch_engine import TorchEngine
from trimtab.ops.kernels.triton_kernels import INTERPRETED
from trimtab.ops.kernels.triton_plan import DTYPES, Kind, Plan, Turn, is_capturing, kind_of
from trimtab.ops.kernels.triton_search import Shape
from trimtab.ops.kernels.triton_tables import Terms, known, terms_of

_LARGEST = (1 << 31) - (1 << 16)
"""Entries of a tensor in which top can search, and of a sparse τ."""
_RESIDUALS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.float16,
    torch.float32: torch.bfloat16,
}
_PLANS = 8


class TritonEngine:
    """Runs jobs on a GPU: fp32, bf16 and fp16 parameters with fp32 or bf16 moments.

    A captured CUDA graph replays a step with the scalars it was captured with. Where a job has the attributes
    ``device_step`` and ``device_lr`` (fp32 tensors of one entry on the device: the step count, this step
    included, and the learning rate), these are read at every replay, and bias corrections, decay and masks
    follow them. One step must have been taken before the capture.

    Args:
        shape: how the kernels cut their work.
    """

    name = "triton"
    measures = False

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = Shape() if shape is None else shape
        self._torch = TorchEngine()
        self._kinds: dict[tuple[object, ...], Kind] = {}

    def refuses(self, job: Job, operator: Operator) -> str | None:
        """Why this engine cannot run the job as it stands; None where it can."""
        for check in _CHECKS:
            reason = check(job, operator)
            if reason is not None:
                return reason
        return None

    def update(self, jobs: Sequence[Job]) -> None:
        """Advance Adam's moments and form Δ in full, in ``job.update`` (flat, fp32)."""
        plain = Operator()
        ours, others = self._shared(jobs, plain, form=True)
        self._torch.update(others)
        for job in ours:
            job.update = torch.empty(job.layout.numel, dtype=torch.float32, device=job.param.device)
        self._run(ours, plain, form=True)

    def step(self, jobs: Sequence[Job], operator: Operator, sums: Tensor | None = None) -> None:
        """Take the step that :class:`~trimtab.ops.kernels.job.Job` describes.

        What this engine cannot run as it stands in this step is run by the torch engine, and so is everything
        where sums are asked for.

        Args:
            jobs: what to step.
            operator: F and ⊕.
            sums: float64 (jobs, SUMS), to which what is measured is added.
        """
        if sums is not None:
            self._torch.step(jobs, operator, sums)
            return
        ours, others = self._shared(jobs, operator, form=False)
        if others:
            self._torch.step(others, operator)
        self._run(ours, operator, form=False)

    def _shared(self, jobs: Sequence[Job], operator: Operator, *, form: bool) -> tuple[list[Job], list[Job]]:
        """(ours, the torch engine's)."""
        reasons = [_refuses_now(job, operator, form=form) for job in jobs]
        ours = [job for job, reason in zip(jobs, reasons, strict=True) if reason is None]
        return ours, [job for job, reason in zip(jobs, reasons, strict=True) if reason is not None]

    def _run(self, jobs: Sequence[Job], operator: Operator, *, form: bool) -> None:
        by_device: dict[torch.device, list[Turn]] = {}
        terms: dict[int, Terms] = {}
        for job in jobs:
            settings = job.settings
            if id(settings) not in terms:
                terms[id(settings)] = terms_of(settings, operator)
            turn = Turn(job, known(job), terms[id(settings)], _gradient(job), form)
            by_device.setdefault(job.param.device, []).append(turn)
        for device, turns in by_device.items():
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                self._plan(turns, operator).run(turns)

    def _plan(self, turns: Sequence[Turn], operator: Operator) -> Plan:
        kinds = []
        for turn in turns:
            sign = (operator, *turn.sign())
            kind = self._kinds.get(sign)
            if kind is None:
                kind = self._kinds[sign] = kind_of(turn, operator)
            kinds.append(kind)
        sparse = tuple(id(turn.it.tau) for turn in turns if isinstance(turn.it.tau, SparseTau))
        key = (operator, self.shape, tuple(id(turn.job) for turn in turns), tuple(map(id, kinds)), sparse)
        plans = turns[0].it.plans
        if key not in plans:
            if is_capturing(turns[0].job.param.device):
                raise ValueError(
                    "take one step outside the CUDA graph before capturing one: it makes the kernels' tables"
                )
            while len(plans) >= _PLANS:
                del plans[next(iter(plans))]
            plans[key] = Plan(turns, kinds, operator, self.shape)
        plan: Plan = plans[key]
        return plan


def _gradient(job: Job) -> Tensor | None:
    """The gradient as the kernels can read it."""
    grad = job.grad
    if grad is None:
        return None
    if grad.dtype not in DTYPES:
        grad = grad.to(torch.float32)
    return grad if grad.is_contiguous() else grad.contiguous()


# -- what the engine does not do


def _refuses_device(job: Job, operator: Operator) -> str | None:
    device = job.param.device.type
    if device == "cuda" or (device == "cpu" and INTERPRETED):
        return None
    return f"it runs on CUDA, not on {device}"


def _refuses_parameter(job: Job, operator: Operator) -> str | None:
    p = job.param
    if p.dtype not in DTYPES:
        return f"it steps fp32, bf16 and fp16 parameters, not {p.dtype}"
    if job.update_dtype not in (None, torch.float32):
        return f"it forms Δ in fp32, not in {job.update_dtype}"
    if job.stored == "residual" and (job.residual is None or job.residual.dtype != _RESIDUALS[p.dtype]):
        return f"the residual of {p.dtype} weights must be in {_RESIDUALS[p.dtype]}"
    if not all(t is None or t.is_contiguous() for t in (p, job.residual)):
        return "its parameter or residual is not contiguous"
    return None


def _refuses_moments(job: Job, operator: Operator) -> str | None:
    first, second, greatest = job.exp_avg, job.exp_avg_sq, job.max_exp_avg_sq
    if first is None and second is None and job.grad is None:
        return None
    if type(first) is not type(second) or not isinstance(first, Tensor):
        return "it needs both of Adam's moments"
    if first.dtype != second.dtype or first.dtype not in (torch.float32, torch.bfloat16):
        return f"its moments are fp32 or bf16, not {first.dtype} and {second.dtype}"
    if hasattr(first, "codes"):
        return "its moments are fp32 or bf16, not 8-bit"
    if greatest is not None and (greatest.dtype != torch.float32 or not greatest.is_contiguous()):
        return "AMSGrad's maximum must be contiguous and in fp32"
    return None


def _refuses_operator(job: Job, operator: Operator) -> str | None:
    if operator.normalize:
        return "it does not normalize (offline merging does)"
    if operator.sparsify != "none" and operator.rescale == "l1" and job.factors is None:
        return "rescale 'l1' needs sums over whole tensors, which it does not form"
    if operator.sparsify == "top" and job.layout.total >= _LARGEST:
        return f"top searches in fewer than {_LARGEST:,} entries, and this tensor has {job.layout.total:,}"
    return None


def _refuses_anchor(job: Job, operator: Operator) -> str | None:
    if job.anchor is None:
        return None
    wide = job.param.dtype == torch.float32 and job.stored != "nearest"
    wanted = torch.float64 if wide else torch.float32
    if job.anchor.dtype != wanted or not job.anchor.is_contiguous():
        return f"its anchor must be contiguous and in {wanted}"
    return None


def _refuses_tau(job: Job, operator: Operator) -> str | None:
    tau = job.tau
    if tau is None:
        return None
    if not isinstance(tau, DenseTau | Int8Tau | SparseTau):
        return f"it does not know τ held as {type(tau).__name__}"
    if tau.device != job.param.device:
        return f"τ is on {tau.device}, and the parameter on {job.param.device}"
    if isinstance(tau, Int8Tau):
        return None if tau.block == INT8_BLOCK else f"int8 blocks have {INT8_BLOCK} entries, not {tau.block}"
    if tau.values.dtype not in (torch.float32, torch.bfloat16):
        return f"τ is held in fp32 or bf16, not in {tau.values.dtype}"
    if isinstance(tau, SparseTau) and tau.values.numel() >= _LARGEST:
        return f"a sparse τ has fewer than {_LARGEST:,} entries"
    return None


_CHECKS: tuple[Callable[[Job, Operator], str | None], ...] = (
    _refuses_device,
    _refuses_parameter,
    _refuses_moments,
    _refuses_operator,
    _refuses_anchor,
    _refuses_tau,
)


def _refuses_now(job: Job, operator: Operator, *, form: bool) -> str | None:
    """As :meth:`TritonEngine.refuses`, of what may change from step to step."""
    if job.settings.merge and not form:
        if job.tau is None:
            return "a merge needs τ"
        if job.settings.rate != 1:
            reason = _refuses_operator(job, operator)
            if reason is not None:
                return reason
        if job.update is not None and job.update.dtype != torch.float32:
            return "Δ is held in fp32"
        reason = _refuses_tau(job, operator)
        if reason is not None:
            return reason
    return _refuses_anchor(job, operator)
