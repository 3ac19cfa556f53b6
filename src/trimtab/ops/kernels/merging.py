"""Offline merging on the CPU, in C: ranges of tensors in one pass, the numbers of the torch path bit for bit.

The C sources are those of :mod:`~trimtab.ops.kernels.native`, and one library holds both. Functions here work
on the calling thread alone, without Python's lock: callers share the ranges of a tensor out among threads.
What a NaN is made of is not kept: NaN stands where torch has NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.combine import Operator, weighted_sum
from trimtab.ops.kernels.merge_structs import (
    KINDS,
    WORD,
    CMerge,
    CTerm,
    fill_term,
    has_half,
    kernels,
    library,
)
from trimtab.ops.sparsify import Thinning

_CONSENSUS = {"linear": 0, "sign": 1, "sign_unweighted": 2, "sign_or_plus": 3}
_TERMS = 62
_ADDED, _FUSED = 0, 1
_LONGEST = 1 << 31


class NonFinite(NamedTuple):
    """Where NaN or infinities lie in a range.

    Attributes:
        models: places of the models that hold some.
        anchor: whether the anchor does.
        output: whether what was written does.
    """

    models: tuple[int, ...] = ()
    anchor: bool = False
    output: bool = False


_FINITE = NonFinite()


def available() -> bool:
    """Whether the kernels run here; compiles them where that has not been done (1 to 3 seconds)."""
    return kernels()[0] is not None


def reason() -> str | None:
    """Why they do not run here, in one sentence; None where they do."""
    return kernels()[1]


def refuses(held: Sequence[torch.dtype], dtype: torch.dtype = torch.float32) -> str | None:
    """Why torch has to do this merge; None where the kernels can.

    Args:
        held: dtypes of the anchor, the models and the output.
        dtype: of the arithmetic.
    """
    if not available():
        return reason()
    unknown = [one for one in (*held, dtype) if one not in KINDS]
    if unknown:
        return f"the kernels have no {str(unknown[0]).removeprefix('torch.')}"
    if torch.float16 in (*held, dtype) and not has_half():
        return "the kernels have no fp16 on this processor"
    if len(held) > _TERMS:
        return f"the kernels merge fewer than {_TERMS} models"
    return None


def refuses_sum(held: Sequence[torch.dtype]) -> str | None:
    """Why torch has to form :func:`weighted_sum_into`; None where the kernels can.

    Args:
        held: dtypes of the models and the output.
    """
    return refuses(held) or (None if _fuses() else "this torch does not add products with a single rounding")


def merge_range_into(
    out: Tensor,
    anchor: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    how: Sequence[Thinning],
    operator: Operator,
    *,
    scale: float = 1.0,
    low: int = 0,
    total: int,
    dtype: torch.dtype = torch.float32,
) -> NonFinite:
    """Write anchor + λ·⊕_w(F(θ₁ − anchor), F(θ₂ − anchor), …) of a range of one tensor.

    It is :func:`trimtab.ops.combine.merge_range` on what is read in ``dtype``, rounded to the dtype of
    ``out``.

    Args:
        out: where to; flat, contiguous, fp32, bf16 or fp16.
        anchor: the range of the anchor, likewise; it may begin at any address.
        models: the same range of each model.
        weights: one for each model; they are rounded to ``dtype``.
        how: what F does to each delta, decided over the whole tensor.
        operator: ⊕.
        scale: λ.
        low: where the range begins.
        total: entries of the whole tensor.
        dtype: of the arithmetic: fp32, or a 16-bit dtype to which each operation is rounded.

    Returns:
        Where NaN or infinities lie.

    Examples:
        >>> out, one, two = torch.empty(2), torch.ones(2), torch.full((2,), 3.0)
        >>> if available():
        ...     _ = merge_range_into(out, one, [two], [0.5], [Thinning()], Operator(), total=2)
        ... else:
        ...     _ = out.fill_(2)
        >>> out.tolist()
        [2.0, 2.0]
    """
    if not len(models) == len(weights) == len(how) or not models:
        raise ValueError(f"{len(models)} models need as many weights and thinnings (at least one)")
    _check(out, anchor, *models)
    found = _FINITE
    for at, count in _pieces(low, out.numel()):
        terms = (CTerm * len(models))()
        held: list[tuple[int, ...]] = []
        for term, model, weight, one in zip(terms, models, weights, how, strict=True):
            source = model.data_ptr() + (at - low) * model.itemsize
            fill_term(term, one, at, count, total, dtype, held)
            term.source, term.kind, term.weight = source, KINDS[model.dtype], _rounded(weight, dtype)
        plan = CMerge(
            out=out.data_ptr() + (at - low) * out.itemsize,
            anchor=anchor.data_ptr() + (at - low) * anchor.itemsize,
            anchor_kind=KINDS[anchor.dtype],
            kind=KINDS[dtype],
            base=at % WORD,
            consensus=_CONSENSUS[operator.consensus],
            normalize=operator.normalize,
            scale=scale,
        )
        found = _united(found, _run("trimtab_merge", plan, terms, count, out))
    return found


def weighted_sum_into(
    out: Tensor, models: Sequence[Tensor], weights: Sequence[float], *, normalize: bool
) -> NonFinite:
    """Write :func:`trimtab.ops.combine.weighted_sum` of ranges of models, rounded to the dtype of ``out``.

    Examples:
        >>> out, one, two = torch.empty(2), torch.ones(2), torch.full((2,), 3.0)
        >>> if refuses_sum([torch.float32]) is None:
        ...     _ = weighted_sum_into(out, [one, two], [1, 3], normalize=True)
        ... else:
        ...     _ = out.fill_(2.5)
        >>> out.tolist()
        [2.5, 2.5]
    """
    divisor = _sum_of(tuple(map(float, weights))) if normalize else 1.0
    return _summed(out, models, weights, _FUSED, divisor)


def interpolate_into(
    out: Tensor, a: Tensor, b: Tensor, factor_a: float | Tensor, factor_b: float | Tensor
) -> NonFinite:
    """Write factor_a·a + factor_b·b in fp32, rounded after each operation, then to the dtype of ``out``."""
    return _summed(out, [a, b], [float(factor_a), float(factor_b)], _ADDED, 1.0)


def _summed(
    out: Tensor, models: Sequence[Tensor], weights: Sequence[float], way: int, divisor: float
) -> NonFinite:
    if len(models) != len(weights) or not models:
        raise ValueError(f"{len(models)} models need as many weights (at least one), got {len(weights)}")
    _check(out, *models)
    terms = (CTerm * len(models))()
    for term, model, weight in zip(terms, models, weights, strict=True):
        term.source, term.kind, term.weight = model.data_ptr(), KINDS[model.dtype], weight
    plan = CMerge(out=out.data_ptr(), consensus=way, scale=divisor)
    return _run("trimtab_sum", plan, terms, out.numel(), out)


# -- between Python and C


def _run(name: str, plan: CMerge, terms: ctypes.Array[CTerm], count: int, out: Tensor) -> NonFinite:
    plan.terms, plan.count, plan.n, plan.out_kind = terms, len(terms), count, KINDS[out.dtype]
    getattr(library(), name)(ctypes.addressof(plan))
    if not (plan.inputs or plan.output):
        return _FINITE
    models = tuple(i for i in range(len(terms)) if plan.inputs >> i & 1)
    return NonFinite(models, bool(plan.inputs >> _TERMS & 1), bool(plan.output))


def _united(one: NonFinite, other: NonFinite) -> NonFinite:
    if one is _FINITE:
        return other
    models = tuple(sorted({*one.models, *other.models}))
    return NonFinite(models, one.anchor or other.anchor, one.output or other.output)


def _pieces(low: int, count: int) -> list[tuple[int, int]]:
    """The range in pieces whose indices have one upper half; an empty range has none."""
    found = []
    while count:
        size = min(count, WORD - low % WORD, _LONGEST)
        found.append((low, size))
        low, count = low + size, count - size
    return found


def _check(*tensors: Tensor) -> None:
    if why := refuses([tensor.dtype for tensor in tensors]):
        raise ValueError(why)
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError("the kernels want contiguous tensors on the CPU")
        if tensor.numel() != tensors[0].numel():
            raise ValueError(f"ranges differ in length: {tensor.numel()} and {tensors[0].numel()}")


@lru_cache(maxsize=1 << 10)
def _rounded(weight: float, dtype: torch.dtype) -> float:
    """A weight as a tensor of ``dtype`` holds it."""
    return float(torch.tensor(weight, dtype=dtype))


@lru_cache(maxsize=1 << 10)
def _sum_of(weights: tuple[float, ...]) -> float:
    return float(torch.tensor(weights, dtype=torch.float32).sum())


# -- what torch does


@cache
def _fuses() -> bool:
    """Whether torch.addcmul rounds once here, in whole vectors and in what is left of them."""
    count = torch.arange(1003, dtype=torch.float32)
    models = [(count * 0.7).sin(), (count * 1.3).sin()]
    ours = torch.empty(1003)
    weighted_sum_into(ours, models, [0.3, 0.9], normalize=True)
    return torch.equal(ours, weighted_sum(models, [0.3, 0.9], normalize=True))
