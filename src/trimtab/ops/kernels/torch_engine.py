"""The engine written in torch: the specification of the others, and what runs where no kernel does.

It works through each tensor in chunks that stay in the processor's cache, so that a step needs no temporaries
of the model's size (``top`` and ``l1``, which must see a whole tensor before they can act, hold its Δ).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from trimtab.ops import moments
from trimtab.ops.combine import Operator
from trimtab.ops.consensus import agreeing_terms, consensus
from trimtab.ops.kernels.job import Job, Stored
from trimtab.ops.kernels.sums import measure
from trimtab.ops.masks import DELTA, ROUNDING, UPDATE, MaskKey, Place, uniform_u32
from trimtab.ops.rounding import join_master, split_master, stochastic_round
from trimtab.ops.sparsify import Thinning, l1_factor, thin, top_cut

# Entries worked on at a time: a multiple of every format's block. On an accelerator launches cost more than
# temporaries.
CHUNK = {"cpu": 1 << 17}
_ELSEWHERE = 1 << 26


class TorchEngine:
    """Runs every job on every device, tensor by tensor."""

    name = "torch"
    measures = True

    def refuses(self, job: Job, operator: Operator) -> str | None:
        """Nothing."""
        return None

    def update(self, jobs: Sequence[Job]) -> None:
        """Advance Adam's moments and form Δ in full, in ``job.update`` (flat, in the dtype of updates)."""
        for job in jobs:
            parts = _Parts(job)
            whole = torch.empty(job.layout.numel, dtype=parts.update_dtype, device=job.param.device)
            for low, high in parts.chunks():
                whole[low:high] = parts.base_and_update(low, high)[1]
            parts.close(moments_only=True)
            job.update = whole

    def step(self, jobs: Sequence[Job], operator: Operator, sums: Tensor | None = None) -> None:
        """Take the step that :class:`~trimtab.ops.kernels.job.Job` describes.

        Args:
            jobs: what to step.
            operator: F and ⊕.
            sums: float64 (jobs, :data:`~trimtab.ops.kernels.sums.SUMS`), to which what is measured is added.
        """
        for row, job in enumerate(jobs):
            if job.settings.merge:
                self._merge(job, operator, None if sums is None else sums[row])
            else:
                _plain(job)

    def _merge(self, job: Job, operator: Operator, sums: Tensor | None) -> None:
        settings, passing = job.settings, job.update is None
        if passing and needs_whole_update(job, operator):
            self.update([job])
        parts, how = _Parts(job), thinnings(job, operator)
        for low, high in parts.chunks():
            place = Place(job.layout, low)
            base, update = parts.base_and_update(low, high)
            tau = job.tau.dense(low, high).to(update)  # type: ignore[union-attr]
            kept = thin([update, tau], how, place)
            if sums is not None:
                terms = agreeing_terms(kept, settings.weights, operator.consensus)
                bracket = terms[0] + terms[1]
                sums += measure(base, update, kept[0], kept[1], terms, parts.kept_dtype).to(sums.device)
            elif operator.consensus == "linear":
                bracket = _sum_in_place([update, tau], kept, settings.weights)
            else:
                bracket = consensus(kept, settings.weights, operator.consensus)
            master = base + bracket if job.anchor is not None else base.add_(bracket)
            if settings.decay_after and settings.decay != 1:
                master.mul_(settings.decay)
            parts.store(low, high, master)
        parts.close()
        if passing:
            job.update = None


def _sum_in_place(given: Sequence[Tensor], kept: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The linear :func:`consensus`, in the memory of what F has made."""
    terms = [
        term * weight if term is x else term.mul_(weight)
        for x, term, weight in zip(given, kept, weights, strict=True)
    ]
    return terms[0].add_(terms[1])


def _plain(job: Job) -> None:
    """The step of torch.optim.AdamW, operation by operation."""
    parts, settings = _Parts(job), job.settings
    for low, high in parts.chunks():
        master = parts.master(low, high)
        if not settings.decay_after and settings.decay != 1:
            master.mul_(settings.decay)
        if job.grad is not None:
            parts.add_adam(low, high, master)
        if settings.decay_after and settings.decay != 1:
            master.mul_(settings.decay)
        parts.store(low, high, master)
    parts.close()


def needs_whole_update(job: Job, operator: Operator) -> bool:
    """Whether F must see all of Δ before it can act on a part of it."""
    if operator.sparsify == "none" or job.settings.rate == 1 or not job.settings.merge:
        return False
    if operator.sparsify == "top" and job.cuts[0] is None and job.count < job.layout.total:
        return True
    return operator.rescale == "l1" and job.factors is None


def thinnings(job: Job, operator: Operator) -> tuple[Thinning, Thinning]:
    """What F does to Δ and to τ in this step: as the job says, or found here from what it holds."""
    update = _thinning(job, operator, 0, job.update)
    if job.tau is None or job.tau.masked:
        return update, Thinning()
    whole = None
    if operator.sparsify == "top" or operator.rescale == "l1":
        whole = job.tau.dense(0, job.layout.numel)
    return update, _thinning(job, operator, 1, whole)


def _thinning(job: Job, operator: Operator, which: int, whole: Tensor | None) -> Thinning:
    rate = job.settings.rate
    if operator.sparsify == "none" or rate == 1 or job.layout.total == 0:
        return Thinning()
    if operator.sparsify == "bernoulli":
        key = MaskKey(job.seed, (UPDATE, DELTA)[which], job.settings.step, job.name)
        how = Thinning(rate, key=key)
    elif job.count == job.layout.total:
        return Thinning()
    else:
        cut = job.cuts[which]
        if cut is None:
            assert whole is not None
            assert job.layout.is_whole
            cut = top_cut(whole, job.count)
        how = Thinning(rate, cut=cut)
    if operator.rescale == "none":
        return how
    if operator.rescale == "expected":
        return replace(how, factor=1.0 / rate)
    if job.factors is not None:
        return replace(how, factor=job.factors[which])
    assert whole is not None
    assert job.layout.is_whole
    return replace(how, factor=l1_factor(whole, thin([whole], [how])[0]))


class _Parts:
    """The tensors of a job, flat, a chunk at a time. What is not contiguous is copied and copied back."""

    def __init__(self, job: Job) -> None:
        self.job, self._copied = job, list[tuple[Tensor, Tensor]]()
        self.param, self.residual = self._flat(job.param), self._flat(job.residual)
        self.anchor, self.grad = self._flat(job.anchor), self._flat(job.grad)
        self.first, self.second = moments.flat(job.exp_avg), moments.flat(job.exp_avg_sq)
        self.greatest = self._flat(job.max_exp_avg_sq)
        self.update_dtype = job.update_dtype or update_dtype(job.param.dtype)
        plain = job.param.dtype if job.stored == "nearest" else master_dtype(job.param.dtype, job.stored)
        self.kept_dtype = job.kept_dtype or plain

    def chunks(self) -> Iterator[tuple[int, int]]:
        size = CHUNK.get(self.job.param.device.type, _ELSEWHERE)
        for low in range(0, self.job.layout.numel, size):
            yield low, min(low + size, self.job.layout.numel)

    def master(self, low: int, high: int) -> Tensor:
        assert self.param is not None
        residual = None if self.residual is None else self.residual[low:high]
        return read_master(self.param[low:high], residual, self.job.stored)

    def base_and_update(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(base, Δ) as :class:`Job` defines them; nothing but the moments is written."""
        job, settings = self.job, self.job.settings
        base = self.master(low, high)
        if not settings.decay_after and settings.decay != 1:
            base = base * settings.decay
        moved = None
        if self.anchor is not None:
            anchor = self.anchor[low:high].to(base.dtype)
            master, base = base, anchor if job.anchor_decay == 1 else anchor * job.anchor_decay
            moved = (master - base).to(self.update_dtype)
        if job.update is not None:
            return base, job.update[low:high]
        if job.grad is None:
            assert moved is not None
            return base, moved
        update = self.add_adam(low, high, None)
        return base, update if moved is None else moved + update

    def add_adam(self, low: int, high: int, target: Tensor | None) -> Tensor:
        """Advance the moments and add u = −lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε) to ``target`` (None is 0).

        The operations are those of torch.optim.AdamW's loop, in its order, and so are the bits.
        """
        settings, dtype = self.job.settings, self.update_dtype
        assert self.grad is not None
        grad = self.grad[low:high].to(dtype)
        if settings.maximize:
            grad = -grad
        first = moments.read(self.first, low, high, dtype)
        second = moments.read(self.second, low, high, dtype)
        first.lerp_(grad, 1 - settings.beta1)
        second.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
        widest = second
        if self.greatest is not None:
            widest = self.greatest[low:high]
            torch.maximum(widest, second, out=widest)
        denominator = widest.sqrt().div_((1 - settings.beta2**settings.step) ** 0.5).add_(settings.eps)
        size = settings.lr / (1 - settings.beta1**settings.step)
        if target is None:
            zero = torch.zeros((), dtype=dtype, device=denominator.device)
            target = torch.addcdiv(zero, first, denominator, value=-size, out=denominator)
        elif target.dtype == dtype:
            target.addcdiv_(first, denominator, value=-size)
        else:
            target.add_(torch.zeros_like(first).addcdiv_(first, denominator, value=-size))
        place, keys = Place(self.job.layout, low), self._moment_keys
        moments.write(self.first, low, high, first, keys[0], place)
        moments.write(self.second, low, high, second, keys[1], place)
        return target

    def store(self, low: int, high: int, master: Tensor) -> None:
        """Write the new master of a chunk, and open the next interval with it where the settings say so."""
        job = self.job
        assert self.param is not None
        residual = None if self.residual is None else self.residual[low:high]
        key = MaskKey(job.seed, ROUNDING, job.settings.step, job.name)
        write_master(self.param[low:high], residual, master, job.stored, key, Place(job.layout, low))
        if job.settings.reopen and self.anchor is not None:
            self.anchor[low:high] = master

    def close(self, *, moments_only: bool = False) -> None:
        """Copy back what had to be made contiguous."""
        for original, copy in self._copied:
            if not moments_only:
                original.copy_(copy.view(original.shape))

    def _flat(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.is_contiguous():
            return None if tensor is None else tensor.detach().view(-1)
        copy = tensor.detach().contiguous().view(-1)
        if tensor is not self.job.grad:
            self._copied.append((tensor.detach(), copy))
        return copy

    @cached_property
    def _moment_keys(self) -> tuple[MaskKey, MaskKey]:
        return moments.keys(self.job.seed, self.job.settings.step, self.job.name)


def update_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which updates are formed: max(fp32, the parameter's dtype)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def master_dtype(dtype: torch.dtype, stored: Stored) -> torch.dtype:
    """The dtype of a parameter's exact value: fp64 where an fp32 parameter has a rounding help."""
    if dtype == torch.float32:
        return torch.float32 if stored == "nearest" else torch.float64
    return update_dtype(dtype)


def read_master(param: Tensor, residual: Tensor | None, stored: Stored) -> Tensor:
    """A parameter's value in its working dtype: the parameter itself where nothing wider is kept.

    Args:
        param: (a range of) the parameter.
        residual: of the same shape, for ``stored="residual"``.
        stored: how the master is kept.

    Returns:
        ``param`` itself for plain rounding at fp32 or fp64; else a wider copy: fp32 for bf16 and fp16, fp64
        for fp32 with a rounding help.
    """
    if stored == "nearest" and param.dtype in (torch.float32, torch.float64):
        return param
    if stored == "residual":
        assert residual is not None
        return join_master(param, residual)
    return param.to(torch.float64 if param.dtype == torch.float32 else torch.float32)


def write_master(
    param: Tensor, residual: Tensor | None, master: Tensor, stored: Stored, key: MaskKey, place: Place
) -> None:
    """Store ``master`` in the parameter (and its residual). ``key`` draws the bits of stochastic rounding."""
    if stored == "residual":
        assert residual is not None
        weight, rest = split_master(master, param.dtype)
        param.copy_(weight)
        residual.copy_(rest)
    elif stored == "stochastic":
        random = uniform_u32(master.shape, key, place=place, device=master.device)
        param.copy_(stochastic_round(master, param.dtype, random))
    elif master.data_ptr() != param.data_ptr() or master.dtype != param.dtype:
        param.copy_(master)
