"""A decoupled pull of the weights to where they started: weight decay towards the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import move_towards
from trimtab.optim.merging import ANCHOR, DECAY
from trimtab.optim.regulariser import Regulariser
from trimtab.optim.sharding import local_of

START = "start"
"""Where the optimizer's state keeps a parameter as it was before its first step, in its own dtype."""


class PullToReference(Regulariser):
    """Pull the weights to the reference a little before every step.

    With θ_r the weights before the first step and Δ the optimizer's update,

        θ ← θ + Δ + η·(θ_r − θ),

    which is decoupled weight decay with θ_r in the place of 0 (L2-SP, arXiv 1802.01483, has the pull in the
    gradient). It comes before everything else in the step, as AdamW's decay does, so that Δ is not changed
    by it and an online merging optimizer neither thins nor weighs it; of step-K, the anchor is pulled along.

    η is taken at every step as it is: it does not follow the learning rate's schedule. A parameter below
    fp32 without a residual takes the nearest value it can hold, so that a small pull may be lost there.

    θ_r is kept in the parameters' dtype in the optimizer's state: one more copy of the weights.

    Args:
        optimizer: see :class:`~trimtab.optim.regulariser.Regulariser`.
        strength: η in [0, 1].

    Raises:
        UserError: an argument out of range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> _ = PullToReference(optimizer, strength=0.25)
        >>> for gradient in (4.0, 0.0):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> weight.item()  # 1 − 4, and a quarter of the way back
        -2.0
    """

    keys = (START,)

    def __init__(self, optimizer: Optimizer, strength: float = 1e-3) -> None:
        if not 0 <= strength <= 1:
            raise UserError(f"strength is the share of the way back, in [0, 1], got {strength}")
        super().__init__(optimizer)
        self.strength = strength

    def before_step(self) -> None:
        """Pull the parameters that take this step; those that take their first one are remembered."""
        for group in self.moving_groups():
            remember_start(self, group)
            for p in self.stepping(group):
                self._pull(p, self.optimizer.state.get(p, {}))

    def _pull(self, p: Tensor, state: dict[str, Any]) -> None:
        value, anchor = self.value(p), state.get(ANCHOR)
        before = value.clone() if anchor is not None else value
        after = move_towards(value, local_of(self.kept(p, START)), self.strength)
        self.set_value(p, after)
        if anchor is not None:  # its decay c is undone here, since θ − c·anchor is what is merged
            local_of(anchor).add_((after - before) / state[DECAY])


def remember_start(regulariser: Regulariser, group: dict[str, Any]) -> None:
    """Keep each parameter that takes its first step as it is before it."""
    for p in regulariser.stepping(group):
        if regulariser.kept(p, START) is None:
            regulariser.keep(p, START, p.detach().clone(memory_format=torch.contiguous_format))
