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

from trimtab.ops.combine import Operator, merge_range, weighted_sum
from trimtab.ops.consensus import CONSENSUS
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
from trimtab.ops.masks import MaskKey
from trimtab.ops.rounding import rounded
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
    return reason() is None


def reason() -> str | None:
    """Why they do not run here, in one sentence; None where they do."""
    found, why = kernels()
    if found is not None and not _agrees():
        return "the compiled CPU kernels do not merge as this torch does"
    return why


def refuses(held: Sequence[torch.dtype], dtype: torch.dtype = torch.float32) -> str | None:
    """Why torch has to do this merge; None where the kernels can.

    Args:
        held: dtypes of the anchor and each model; the output's may be among them.
        dtype: of the arithmetic.
    """
    return reason() or _unknown((*held, dtype)) or _too_many(len(held) - 1)


def _too_many(models: int) -> str | None:
    return f"the kernels merge at most {_TERMS} models" if models > _TERMS else None


def _unknown(dtypes: Sequence[torch.dtype]) -> str | None:
    for dtype in dtypes:
        if dtype not in KINDS:
            return f"the kernels have no {str(dtype).removeprefix('torch.')}"
    if torch.float16 in dtypes and not has_half():
        return "the kernels have no fp16 on this processor"
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
    pieces = _pieces(low, out.numel())
    if len(pieces) > 1:
        cut = [slice(at - low, at - low + count) for at, count in pieces]
        parts = [(out[part], anchor[part], [model[part] for model in models]) for part in cut]
    else:
        parts = [(out, anchor, list(models))]
    found = _FINITE
    for (at, count), part in zip(pieces, parts, strict=False):
        plan = CMerge(
            kind=KINDS[dtype],
            base=at % WORD,
            consensus=_CONSENSUS[operator.consensus],
            normalize=operator.normalize,
            scale=scale,
        )
        terms, held = (CTerm * len(models))(), list[tuple[int, ...]]()
        for term, weight, one in zip(terms, weights, how, strict=True):
            fill_term(term, one, at, count, total, dtype, held)
            term.weight = rounded(weight, dtype)
        found = _united(found, _run("trimtab_merge", plan, terms, *part))
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
    for term, weight in zip(terms, weights, strict=True):
        term.weight = weight
    return _run("trimtab_sum", CMerge(consensus=way, scale=divisor), terms, out, None, models)


# -- between Python and C


def _run(
    name: str,
    plan: CMerge,
    terms: ctypes.Array[CTerm],
    out: Tensor,
    anchor: Tensor | None,
    models: Sequence[Tensor],
) -> NonFinite:
    if why := _too_many(len(terms)):
        raise ValueError(why)
    plan.terms, plan.count, plan.n = terms, len(terms), out.numel()
    plan.out, plan.out_kind = out.data_ptr(), KINDS[out.dtype]
    if anchor is not None:
        plan.anchor, plan.anchor_kind = anchor.data_ptr(), KINDS[anchor.dtype]
    for term, model in zip(terms, models, strict=True):
        term.source, term.kind = model.data_ptr(), KINDS[model.dtype]
    getattr(library(), name)(ctypes.addressof(plan))
    if not (plan.inputs or plan.output):
        return _FINITE
    spoilt = tuple(i for i in range(len(terms)) if plan.inputs >> i & 1)
    return NonFinite(spoilt, bool(plan.inputs >> _TERMS & 1), bool(plan.output))


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
    if why := _unknown([tensor.dtype for tensor in tensors]):
        raise ValueError(why)
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError("the kernels want contiguous tensors on the CPU")
        if tensor.numel() != tensors[0].numel():
            raise ValueError(f"ranges differ in length: {tensor.numel()} and {tensors[0].numel()}")


@lru_cache(maxsize=1 << 10)
def _sum_of(weights: tuple[float, ...]) -> float:
    return float(torch.tensor(weights, dtype=torch.float32).sum())


# -- what torch does


@cache
def _agrees() -> bool:
    """Whether a few merges have torch's bits."""
    anchor, *models = _waves()
    how = [Thinning(0.4, key=MaskKey(1, 1, 0, "trial"), factor=1 / 0.4), Thinning(factor=0.7)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.float16 and not has_half():
            continue
        deltas = [model.to(dtype) - anchor.to(dtype) for model in models]
        for consensus in CONSENSUS:
            weights = [rounded(weight, dtype) for weight in (0.3, -0.9)]
            operator = Operator(consensus=consensus, normalize=True)
            wanted = merge_range(anchor.to(dtype), deltas, weights, how, operator, scale=0.7)
            ours = torch.empty_like(wanted)
            total = ours.numel()
            merge_range_into(
                ours, anchor, models, weights, how, operator, scale=0.7, total=total, dtype=dtype
            )
            if not torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8)):
                return False
    return True


@cache
def _fuses() -> bool:
    """Whether torch.addcmul rounds once here, in whole vectors and in what is left of them."""
    models, weights = _waves(), [0.3, 0.9, -0.2]
    ours = torch.empty_like(models[0])
    weighted_sum_into(ours, models, weights, normalize=True)
    return torch.equal(ours, weighted_sum(models, weights, normalize=True))


def _waves() -> list[Tensor]:
    """Numbers that are easily made; denormal ones among them."""
    count = torch.arange(1003, dtype=torch.float64, device="cpu")
    waves = [(count * factor).sin().to(torch.float32) for factor in (0.7, 1.3, 2.9)]
    for wave in waves:
        wave[7:60:11] *= 1e-39
    return waves
