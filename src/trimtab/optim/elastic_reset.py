"""Elastic Reset: from time to time the weights go back to their own moving average."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trimtab.optim.ema import begin_averages, check_coefficient, check_count, update_averages
from trimtab.optim.merging import ANCHOR, DECAY, SINCE
from trimtab.optim.pull import START, remember_start
from trimtab.optim.regulariser import Regulariser
from trimtab.optim.sharding import local_of

AVERAGE = "elastic_average"
_STEPS = "elastic_steps"


class ElasticReset(Regulariser):
    """Every N steps set the weights to their average, and the average to where it all began.

    arXiv 2312.07551. With θ_0 the weights before the first step, e = θ_0 to begin with, after each step

        e ← (1 − c)·e + c·θ,    and at every N-th:  θ ← e,  e ← θ_0.

    The optimizer's moments stay as they are: the published code (its StackLLaMA part) resets weights and
    average alone, as we do. A reset closes an interval of step-K merging that is open: the next one is
    measured from the weights that were set.

    e is kept in fp32, θ_0 in the parameters' dtype, both in the optimizer's state: two copies of the weights.

    Args:
        optimizer: see :class:`~trimtab.optim.regulariser.Regulariser`.
        coefficient: c in (0, 1]; 0.005 is the decay 0.995 of the published StackLLaMA configuration.
        every: N; 260 in that configuration.

    Raises:
        UserError: an argument out of range.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> _ = ElasticReset(optimizer, coefficient=0.5, every=1)
        >>> weight.grad = torch.tensor([4.0])
        >>> optimizer.step()
        >>> weight.item()  # half-way between 1 and 1 − 4
        -1.0
    """

    keys = (AVERAGE, START)

    def __init__(self, optimizer: Optimizer, coefficient: float = 5e-3, *, every: int = 260) -> None:
        check_coefficient(coefficient)
        check_count("every", every)
        super().__init__(optimizer)
        self.coefficient, self.every = coefficient, every

    def before_step(self) -> None:
        """Remember the start of the parameters that take their first step, and begin their averages."""
        for group in self.moving_groups():
            remember_start(self, group)
            begin_averages(self, group, AVERAGE)

    def after_step(self) -> None:
        """Take the weights into the averages, and reset where that is due."""
        for group in self.moving_groups():
            update_averages(self, group, AVERAGE, self.coefficient)
            if self.count(group, _STEPS) % self.every == 0:
                for p in group["params"]:
                    self._reset(p)

    def _reset(self, p: Tensor) -> None:
        average = self.kept(p, AVERAGE)
        if average is None:
            return
        self.set_value(p, local_of(average))
        local_of(average).copy_(local_of(self.kept(p, START)))
        state: dict[str, Any] = self.optimizer.state[p]
        if ANCHOR in state:
            local_of(state[ANCHOR]).copy_(self.value(p))
            state[DECAY], state[SINCE] = 1.0, 0
