"""log P of given tokens, without a float32 copy of all logits.

Shapes: N positions, D width of the model, V vocabulary, C positions of one chunk.

A chunk of positions is projected, reduced to two numbers a position (the target's log-probability and the
logarithm of the normalizer) and forgotten; the backward pass computes it again. What lives at once is C·V
numbers instead of N·V, for two matrix products with the output embedding more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 24
"""How many logits of a chunk are held by default: 64 MiB of float32."""


def head_log_probabilities(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    chunk: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of the targets under the output embedding.

    log P_n = z_n[t_n] − log Σ_v exp z_n[v] with z_n = W h_n + b. The product is taken in the inputs' dtype
    (autocast's where it is on), all that follows in float32 or wider. Gradients for hidden states, weight and
    bias are accumulated in float32 and given in their own dtypes; second derivatives are not there.

    Args:
        hidden_ND: hidden states at the positions that predict, shape (N, D).
        weight_VD: the output embedding, shape (V, D).
        targets_N: the tokens that are predicted, integers in [0, V), shape (N,).
        bias_V: the output bias, shape (V,), or None.
        chunk: how many positions at once; what makes :data:`CHUNK_ELEMENTS` logits when None.

    Returns:
        Log-probabilities in nats, float32 or wider, shape (N,).

    Examples:
        >>> hidden, weight = torch.eye(3)[:2], torch.zeros(4, 3)
        >>> head_log_probabilities(hidden, weight, torch.tensor([0, 3])).exp()
        tensor([0.2500, 0.2500])
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    else:
        product = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    size = chunk or max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    inputs = (hidden_ND, weight_VD, bias_V, targets_N, size, product)
    result: torch.Tensor = _HeadLogProbabilities.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


def selective_log_softmax(
    logits: torch.Tensor, targets: torch.Tensor, *, chunk: int | None = None
) -> torch.Tensor:
    """``log_softmax(logits, -1)`` at the targets, for logits that are there already.

    Keeps nothing of the size of the logits but themselves; their gradient, in their own dtype, is the only
    tensor of that size that is made.

    Args:
        logits: unnormalized log-probabilities, shape (…, V).
        targets: integers in [0, V), shape (…).
        chunk: how many positions at once; what makes :data:`CHUNK_ELEMENTS` logits when None.

    Returns:
        Log-probabilities in nats, float32 or wider, shape (…).

    Examples:
        >>> selective_log_softmax(torch.zeros(2, 4), torch.tensor([1, 2])).exp()
        tensor([0.2500, 0.2500])
    """
    size = chunk or max(1, CHUNK_ELEMENTS // logits.shape[-1])
    inputs = (logits.flatten(0, -2), targets.flatten(), size)
    flat: torch.Tensor = _SelectiveLogSoftmax.apply(*inputs)  # type: ignore[no-untyped-call]
    return flat.view(targets.shape)


class _HeadLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        chunk: int,
        product: torch.dtype,
    ) -> torch.Tensor:
        ctx.chunk, ctx.product = chunk, product
        result_N = hidden_ND.new_empty(targets_N.shape, dtype=_wide(product))
        normalizer_N = torch.empty_like(result_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            cast_VD = weight_VD.to(product)
            for part in _parts(targets_N, chunk):
                logits_CV = _logits(hidden_ND[part], cast_VD, bias_V)
                result_N[part], normalizer_N[part] = _select(logits_CV, targets_N[part])
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, normalizer_N)
        return result_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, normalizer_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = gradient_N.dtype
        to_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        to_weight = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        to_bias = torch.zeros_like(bias_V, dtype=wide) if wants_bias else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            cast_VD = weight_VD.to(ctx.product)
            for part in _parts(targets_N, ctx.chunk):
                logits_CV = _logits(hidden_ND[part], cast_VD, bias_V)
                slope_CV = _slope(logits_CV, normalizer_N[part], targets_N[part], gradient_N[part])
                if to_bias is not None:
                    to_bias += slope_CV.sum(0)
                slope_CV = slope_CV.to(ctx.product)
                if to_hidden is not None:
                    to_hidden[part] = slope_CV @ cast_VD
                if to_weight is not None:
                    _add_product(to_weight, slope_CV, hidden_ND[part].to(ctx.product))
        return (
            to_hidden,
            None if to_weight is None else to_weight.to(weight_VD.dtype),
            None if to_bias is None else to_bias.to(bias_V.dtype),
            *(None,) * 3,
        )


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, chunk: int) -> torch.Tensor:
        ctx.chunk = chunk
        result_N = logits_NV.new_empty(targets_N.shape, dtype=_wide(logits_NV.dtype))
        normalizer_N = torch.empty_like(result_N)
        for part in _parts(targets_N, chunk):
            wide_CV = logits_NV[part].to(result_N.dtype)
            result_N[part], normalizer_N[part] = _select(wide_CV, targets_N[part])
        ctx.save_for_backward(logits_NV, targets_N, normalizer_N)
        return result_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_NV, targets_N, normalizer_N = ctx.saved_tensors
        result_NV = torch.empty_like(logits_NV)
        for part in _parts(targets_N, ctx.chunk):
            wide_CV = logits_NV[part].to(gradient_N.dtype, copy=True)
            result_NV[part] = _slope(wide_CV, normalizer_N[part], targets_N[part], gradient_N[part])
        return result_NV, None, None


def _parts(targets_N: torch.Tensor, chunk: int) -> Iterator[slice]:
    for first in range(0, targets_N.shape[0], chunk):
        yield slice(first, min(first + chunk, targets_N.shape[0]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden_CD: torch.Tensor, cast_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """A chunk's logits in float32 or wider; a tensor that may be overwritten."""
    logits_CV = (hidden_CD.to(cast_VD.dtype) @ cast_VD.T).to(_wide(cast_VD.dtype))
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _select(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' log-probabilities and the logarithm of each position's normalizer."""
    normalizer_C = logits_CV.logsumexp(-1)
    return logits_CV.gather(-1, targets_C[:, None]).squeeze(-1) - normalizer_C, normalizer_C


def _slope(
    logits_CV: torch.Tensor, normalizer_C: torch.Tensor, targets_C: torch.Tensor, gradient_C: torch.Tensor
) -> torch.Tensor:
    """Return g · (onehot(t) − softmax(z)), the gradient for a chunk's logits, written over them."""
    slope_CV = logits_CV.sub_(normalizer_C[:, None]).exp_().mul_(-gradient_C[:, None])
    return slope_CV.scatter_add_(-1, targets_C[:, None], gradient_C[:, None])


def _add_product(sum_VD: torch.Tensor, slope_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    if sum_VD.dtype == slope_CV.dtype:
        sum_VD.addmm_(slope_CV.T, hidden_CD)
    else:
        sum_VD += slope_CV.T @ hidden_CD
