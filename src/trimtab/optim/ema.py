"""An exponential moving average of the weights, to evaluate and to keep instead of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import move_towards
from trimtab.optim.regulariser import Regulariser, attached
from trimtab.optim.sharding import local_of

AVERAGE = "ema_average"
_STEPS = "ema_steps"


class EMA(Regulariser):
    """Average the weights as they are trained (a baseline of arXiv 2405.17931).

    After each step (or each K-th) of the optimizer, with e = θ before the first step,

        e ← (1 − c)·e + c·θ.

    Training goes on from θ, never from e; e is what is evaluated and saved. There is no bias correction: e
    starts at the reference and leaves it slowly, which is what is wanted of it here.

    e is kept in fp32 (fp64 for fp64 parameters) in the optimizer's state: one more copy of the weights.

    Args:
        optimizer: see :class:`~trimtab.optim.regulariser.Regulariser`.
        coefficient: c in (0, 1], the share of the new weights; other libraries call 1 − c the decay.
        every: K, steps between averagings.

    Raises:
        UserError: an argument out of range.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> ema = EMA(optimizer, coefficient=0.25)
        >>> model(torch.ones(1)).backward()
        >>> optimizer.step()
        >>> with ema.swapped_in():
        ...     print(model.weight.item())
        0.75
        >>> model.weight.item()
        0.0
    """

    keys = (AVERAGE,)

    def __init__(self, optimizer: Optimizer, coefficient: float = 1e-3, *, every: int = 1) -> None:
        check_coefficient(coefficient)
        check_count("every", every)
        super().__init__(optimizer)
        self.coefficient, self.every = coefficient, every

    def before_step(self) -> None:
        """Begin the averages of the parameters that take their first step."""
        for group in self.moving_groups():
            begin_averages(self, group, AVERAGE)

    def after_step(self) -> None:
        """Take the weights into the averages, where that is due."""
        for group in self.moving_groups():
            if self.count(group, _STEPS) % self.every == 0:
                update_averages(self, group, AVERAGE, self.coefficient)

    def average(self, p: Tensor) -> Tensor | None:
        """The average of a parameter, fp32 or wider; None where it has not moved yet, so that it is θ."""
        found: Tensor | None = self.kept(p, AVERAGE)
        return found

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights for a while; then it has its own again, to the bit.

        For that while there is one more copy of the weights in memory.
        """
        own = [(p, local_of(p).clone()) for p, _ in self._averages()]
        self.swap_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, values in own:
                    local_of(p).copy_(values)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Give the model the averaged weights for good, rounded to its dtype; training is over then."""
        for p, average in self._averages():
            local_of(p).copy_(local_of(average))

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                average = self.average(p)
                if average is not None:
                    yield p, average


@contextmanager
def averaged_weights(optimizer: Optimizer | None) -> Iterator[None]:
    """Give the model the averages of the EMA that is attached to its optimizer; without one, do nothing."""
    found = [] if optimizer is None else attached(optimizer, EMA)
    if not found:
        yield
        return
    with found[-1].swapped_in():
        yield


def begin_averages(regulariser: Regulariser, group: dict[str, Any], key: str) -> None:
    """Keep the value of each parameter that takes its first step, in fp32 or wider."""
    for p in regulariser.stepping(group):
        if regulariser.kept(p, key) is None:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            regulariser.keep(p, key, p.detach().to(wide, copy=True, memory_format=torch.contiguous_format))


def update_averages(regulariser: Regulariser, group: dict[str, Any], key: str, coefficient: float) -> None:
    """Move the averages towards the parameters, those that took no step included."""
    for p in group["params"]:
        average = regulariser.kept(p, key)
        if average is not None:
            move_towards(local_of(average), regulariser.value(p), coefficient)


def check_coefficient(coefficient: float) -> None:
    """Refuse a coefficient that is none."""
    if not 0 < coefficient <= 1:
        raise UserError(f"coefficient is the share of the new weights, in (0, 1], got {coefficient}")


def check_count(name: str, value: int) -> None:
    """Refuse a number of steps that is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is a number of steps, 1 or more, got {value!r}")
