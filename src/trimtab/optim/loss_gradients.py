"""Gradients of losses other than the one that is trained on, beside the gradients of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from trimtab.errors import UserError
from trimtab.optim.sharding import shard_group

Losses = Callable[[], Iterable[Tensor]]
"""Makes the losses of some rows, one after the other, each to be differentiated at once.

Under torch.distributed each process makes those of its own share of the rows.
"""


def mean_gradients(losses: Losses, parameters: Sequence[Tensor], *, squared: bool = False) -> list[Tensor]:
    """Average the gradients of some losses, over all processes; ``p.grad`` is left alone.

    Args:
        losses: makes scalars; each is freed before the next is made.
        parameters: what to differentiate for; one that takes no part gets zeros.
        squared: average the squares of the gradients instead, entry by entry.

    Returns:
        One fp32 tensor (fp64 for fp64 parameters) a parameter, the same on all processes.

    Raises:
        UserError: there are no losses, or a gradient is not finite.
    """
    sums = [torch.zeros_like(p, dtype=_wide(p), memory_format=torch.contiguous_format) for p in parameters]
    count = torch.zeros((), dtype=torch.float64)
    with torch.enable_grad():
        for loss in losses():
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for total, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        wide = gradient.to(total.dtype)
                        total.add_(wide * wide if squared else wide)
            count += 1
    if distributed.is_available() and distributed.is_initialized():
        for total in (*sums, count := count.to(parameters[0].device)):
            distributed.all_reduce(total)
    if not count:
        raise UserError("there are no rows to take gradients of")
    for total in sums:
        total.div_(float(count))
        if not torch.isfinite(total).all():
            raise UserError("the gradient of a row is not finite; look for broken rows or a broken model")
    return sums


def trained(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The parameters of some groups that are trained."""
    return [p for group in groups for p in group["params"] if p.requires_grad]


def refuse_shards(parameters: Iterable[Tensor], what: str) -> None:
    """Refuse parameters of which each process has a part only."""
    if any(shard_group(p) is not None for p in parameters):
        raise UserError(
            f"{what} needs whole parameters, and these are sharded (FSDP2, tensor parallelism); use DDP"
        )


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
