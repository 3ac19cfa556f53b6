"""ChildTuning-F: a random part of the gradient, another one at every step."""

from __future__ import annotations

from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import GRADIENT, MaskKey
from trimtab.ops.masks import Place
from trimtab.ops.sparsify import Thinning, thin
from trimtab.optim.regulariser import Regulariser
from trimtab.optim.sharding import local_of, local_part
from trimtab.optim.shell import dense_grad

_STEP = "child_tuning_step"


class ChildTuning(Regulariser):
    """Train with a random part of the gradient (ChildTuning-F, arXiv 2109.05687, §2.2.1).

    Before each step, and so before the moments, with M drawn anew at every step,

        g ← g · M / p,    M_i ~ Bernoulli(p).

    The masks are those of our counter-based hash (stream ``gradient``), keyed by the seed, the parameter's
    name and its own count of steps: the same on one process or eight, sharded or not, after a resume. A mask
    of the gradient is not one of the update: through Adam's moments every entry moves at every step.

    Clipping by the norm, which happens before ``step()``, sees the whole gradient, as in the published code
    (its mask is inside of the optimizer's step): how much is clipped does not depend on the draw.

    Args:
        optimizer: see :class:`~trimtab.optim.regulariser.Regulariser`; built from named parameters.
        reserve_rate: p in (0, 1]; at 1 nothing is masked.
        seed: of the masks, in [0, 2^64).

    Raises:
        UserError: an argument out of range, or parameters without names.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 4, bias=False)
        >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
        >>> _ = ChildTuning(optimizer, reserve_rate=0.5)
        >>> model(torch.ones(2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(set(model.weight.grad.flatten().tolist()))
        [0.0, 2.0]
    """

    def __init__(self, optimizer: Optimizer, reserve_rate: float, *, seed: int = 0) -> None:
        check_reserve_rate(reserve_rate)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise UserError(f"seed must be a whole number in [0, 2^64), got {seed!r}")
        super().__init__(optimizer)
        self.reserve_rate, self.seed = reserve_rate, seed

    def before_step(self) -> None:
        """Mask the gradients."""
        rate = self.reserve_rate
        for group in self.optimizer.param_groups:
            for name, p in self.named(group):
                step = (self.kept(p, _STEP) or 0) + 1
                self.keep(p, _STEP, step)
                p.grad = dense_grad(name, p)
                gradient, (_, layout, _) = local_of(p.grad), local_part(p)
                if rate < 1 and gradient.numel():
                    how = Thinning(rate, key=MaskKey(self.seed, GRADIENT, step, name), factor=1.0 / rate)
                    gradient.copy_(thin([gradient], [how], Place(layout))[0])


def check_reserve_rate(reserve_rate: float) -> None:
    """Refuse a share that is none."""
    if not 0 < reserve_rate <= 1:
        raise UserError(f"reserve_rate must be in (0, 1], got {reserve_rate}")
