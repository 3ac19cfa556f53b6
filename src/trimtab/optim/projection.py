"""Orthogonal gradient projection: steps that leave the loss on capability rows alone, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import normalized, project_out
from trimtab.optim.ema import check_count
from trimtab.optim.loss_gradients import Losses, mean_gradients, refuse_shards
from trimtab.optim.regulariser import Regulariser

DIRECTIONS = "capability_directions"
_STEPS = "projection_steps"


class GradientProjection(Regulariser):
    """Remove from the gradient what lies in the span of capability gradients (OGPSA, arXiv 2602.07892).

    At the first step and at every M-th after it, the mean gradient of each of k sets of capability rows is
    taken at the current weights; at every step, tensor by tensor, with these k gradients as rows of D,

        g ← g − Dᵀ(DDᵀ)⁺D·g,

    whether they are in conflict or not. So no first-order step along −g changes a capability loss, in any
    tensor by itself. That is the published code's default for DPO (one or two sets, projection always,
    tensor by tensor); the paper writes of one low-rank subspace of all gradients, and we could read its
    abstract and its code, not its appendix. Through Adam's moments the *update* is not exactly orthogonal.

    The gradients at ``step()`` are those after clipping and after averaging over processes: projecting is
    linear, so that only the factor of the clipping differs from projecting each micro-batch's.

    The k directions are kept in fp32 in the optimizer's state, since those of weights that have moved on
    cannot be made again after a resume: k copies of the weights.

    Args:
        optimizer: see :class:`~trimtab.optim.regulariser.Regulariser`.
        losses: for each set, what makes the losses of its rows (or batches) when they are due; under
            torch.distributed each process those of its share.
        every: M, steps between refreshes.

    Raises:
        UserError: an argument out of range; at a refresh, sharded parameters, no rows, or a gradient that is
            not finite.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> _ = GradientProjection(optimizer, [lambda: [weight @ torch.tensor([0.0, 2.0])]])
        >>> weight.grad = torch.tensor([0.5, 0.5])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.5, 1.0]
    """

    keys = (DIRECTIONS,)

    def __init__(self, optimizer: Optimizer, losses: Sequence[Losses], *, every: int = 5) -> None:
        check_count("every", every)
        if not losses:
            raise UserError("GradientProjection needs the losses of at least one set of capability rows")
        super().__init__(optimizer)
        self.losses, self.every = tuple(losses), every

    def before_step(self) -> None:
        """Refresh the directions where that is due; project the gradients."""
        groups = self.optimizer.param_groups
        due = [(self.count(group, _STEPS) - 1) % self.every == 0 for group in groups]
        if any(due):
            self._refresh(groups)
        for group in groups:
            for p in self.stepping(group):
                directions: Tensor | None = self.kept(p, DIRECTIONS)
                if directions is not None and p.grad is not None:
                    project_out(p.grad, directions)

    def _refresh(self, groups: list[dict[str, Any]]) -> None:
        parameters = [p for group in groups for p in self.stepping(group)]
        refuse_shards(parameters, "GradientProjection")
        found = [mean_gradients(make, parameters) for make in self.losses]
        for p, *gradients in zip(parameters, *found, strict=True):
            self.keep(p, DIRECTIONS, normalized(torch.stack(gradients)))
