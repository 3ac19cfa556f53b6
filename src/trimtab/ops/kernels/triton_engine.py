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
from trimtab.ops.kernels.triton_tables import Known, Terms, known, terms_of

_LARGEST = (1 << 31) - (1 << 16)
"""Entries of a tensor in which top can search, and of a sparse τ."""
_RESIDUALS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.float16,
    torch.float32: torch.bfloat16,
}
_PLANS = 8
_FORMING = Operator()


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
        self._kinds: dict[Kind, Kind] = {}
        self._terms: dict[Terms, Terms] = {}

    def refuses(self, job: Job, operator: Operator) -> str | None:
        """Why this engine cannot run the job as it stands; None where it can."""
        for check in _CHECKS:
            reason = check(job, operator)
            if reason is not None:
                return reason
        return None

    def update(self, jobs: Sequence[Job]) -> None:
        """Advance Adam's moments and form Δ in full, in ``job.update`` (flat, fp32)."""
        for job in jobs:
            job.update = torch.empty(job.layout.numel, dtype=torch.float32, device=job.param.device)
        others = self._run(jobs, _FORMING, form=True)
        for job in others:
            job.update = None
        self._torch.update(others)

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
        self._torch.step(self._run(jobs, operator, form=False), operator)

    def _run(self, jobs: Sequence[Job], operator: Operator, *, form: bool) -> list[Job]:
        """Run the jobs; returns those that this engine does not run as they stand."""
        turns: dict[torch.device, list[Turn]] = {}
        kinds: dict[torch.device, list[Kind]] = {}
        others = []
        terms: dict[int, Terms] = {}
        for job in jobs:
            settings = job.settings
            term = terms.get(id(settings))
            if term is None:
                term = terms[id(settings)] = self._interned(terms_of(settings, operator))
            if type(job.cache) is not Known and self.refuses(job, operator) is not None:
                others.append(job)
                continue
            it = known(job)
            turn = _turn(job, it, term, form)
            kind = self._kind(turn, operator)
            if kind is None:
                others.append(job)
            else:
                turns.setdefault(it.device, []).append(turn)
                kinds.setdefault(it.device, []).append(kind)
        for device, members in turns.items():
            plan = self._plan(members, kinds[device], operator)
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                plan.run([t.job for t in members], [t.it for t in members], [t.grad for t in members])
        return others

    def _interned(self, terms: Terms) -> Terms:
        return self._terms.setdefault(terms, terms)

    def _kind(self, turn: Turn, operator: Operator) -> Kind | None:
        """The kind of a job, decided anew only where something it depends on has changed."""
        job, it = turn.job, turn.it
        decided = (
            turn.terms,
            turn.form,
            None if turn.grad is None else turn.grad.dtype,
            None if job.anchor is None else job.anchor.dtype,
            None if job.update is None else job.update.dtype,
            job.cuts[0] is None,
            job.count,
            turn.aligned,
        )
        if it.operator is operator and it.seen is job.tau and it.decided == decided:
            return it.kind  # type: ignore[no-any-return]
        it.operator, it.seen, it.decided = operator, job.tau, decided
        it.kind = None
        if _refuses_now(turn, operator) is None:
            kind = kind_of(turn, operator)
            it.kind = self._kinds.setdefault(kind, kind)
        return it.kind  # type: ignore[no-any-return]

    def _plan(self, turns: Sequence[Turn], kinds: Sequence[Kind], operator: Operator) -> Plan:
        sparse = tuple(id(turn.job.tau) for turn in turns if isinstance(turn.job.tau, SparseTau))
        key = (operator, self.shape, tuple([id(turn.job) for turn in turns]), tuple(map(id, kinds)), sparse)
        plans = turns[0].it.plans
        if key not in plans:
            if is_capturing(turns[0].it.device):
                raise ValueError(
                    "take one step outside the CUDA graph before capturing one: it makes the kernels' tables"
                )
            while len(plans) >= _PLANS:
                del plans[next(iter(plans))]
            plans[key] = Plan(turns, kinds, operator, self.shape)
        plan: Plan = plans[key]
        return plan


def _turn(job: Job, it: Known, terms: Terms, form: bool) -> Turn:
    grad = job.grad
    if grad is not None and (grad.dtype not in DTYPES or not grad.is_contiguous()):
        grad = grad.to(grad.dtype if grad.dtype in DTYPES else torch.float32).contiguous()
    addresses = 0 if grad is None else grad.data_ptr()
    if job.anchor is not None:
        addresses |= job.anchor.data_ptr()
    if job.update is not None:
        addresses |= job.update.data_ptr()
    return Turn(job, it, terms, grad, form, it.aligned and not addresses % 16)


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
    if operator.consensus == "sign_or_plus":
        return "it has no consensus 'sign_or_plus' (offline merging has)"
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


def _refuses_now(turn: Turn, operator: Operator) -> str | None:
    """As :meth:`TritonEngine.refuses`, of what may change from step to step."""
    job = turn.job
    checks = [_refuses_anchor]
    if turn.terms.merge and not turn.form:
        if job.tau is None:
            return "a merge needs τ"
        if job.update is not None and job.update.dtype != torch.float32:
            return f"Δ is held in fp32, not in {job.update.dtype}"
        checks += [_refuses_tau, _refuses_operator] if turn.terms.thins else [_refuses_tau]
    return next(filter(None, (check(job, operator) for check in checks)), None)
