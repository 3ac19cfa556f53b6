"""ChildTuning-D: the part of the weights with the most Fisher information, chosen once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import UserError
from trimtab.ops import kth_largest, top_count
from trimtab.optim.child_tuning import check_reserve_rate
from trimtab.optim.loss_gradients import Losses, mean_gradients, refuse_shards, trained
from trimtab.optim.regulariser import Regulariser, takes_step

MASK = "fisher_mask"
_MASKED = "fisher_masked"


class FisherChildTuning(Regulariser):
    """Train only the weights that matter most to some rows (ChildTuning-D, arXiv 2109.05687, §2.2.2).

    Before the first step, with N losses −log P of single rows, the empirical Fisher information of each
    entry θ_i is estimated, and a fixed mask keeps the share p of all entries that have the most of it:

        F_i = (1/N) · Σ_n (∂ log P_n / ∂θ_i)²,    g ← g · [F_i among the largest],  at every step.

    The largest are taken over all trained parameters together, as in the published code, where they are
    those of the model's layers; entries equal to the last one taken are taken too, entries without any
    information never. Nothing is rescaled. The published code squares the gradients of batches; we square
    those of single losses, as the paper's formula has it. Clipping by the norm sees the whole gradient, as
    for :class:`~trimtab.optim.ChildTuning`.

    The mask (one byte per entry) is kept in the optimizer's state: a resume does not estimate it again.

    Args:
        optimizer: see :class:`~trimtab.optim.regulariser.Regulariser`.
        losses: makes the losses, one a row, when the first step is taken; under torch.distributed each
            process those of its share of the rows.
        reserve_rate: p in (0, 1].

    Raises:
        UserError: an argument out of range; at the first step, sharded parameters, parameters without a
            gradient, no rows, or a gradient that is not finite; later, parameters that were added.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> _ = FisherChildTuning(optimizer, lambda: [weight @ torch.tensor([1.0, 3.0])], reserve_rate=0.5)
        >>> weight.grad = torch.tensor([0.5, 0.5])
        >>> optimizer.step()
        >>> weight.tolist()
        [1.0, 0.5]
    """

    keys = (MASK,)

    def __init__(self, optimizer: Optimizer, losses: Losses, reserve_rate: float) -> None:
        check_reserve_rate(reserve_rate)
        super().__init__(optimizer)
        self.losses, self.reserve_rate = losses, reserve_rate

    def before_step(self) -> None:
        """Choose the mask before the first step; mask the gradients."""
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        chosen = [bool(group.get(_MASKED)) for group in groups]
        if not any(chosen):
            self._choose(groups)
        elif not all(chosen):
            raise UserError("parameters were added after ChildTuning-D had chosen what to train")
        for group in groups:
            for p in self.stepping(group):
                mask: Tensor | None = self.kept(p, MASK)
                if mask is not None:
                    p.grad.masked_fill_(~mask, 0.0)  # type: ignore[union-attr]

    def after_step(self) -> None:
        """Note that the mask has been chosen, and is kept."""
        for group in self.optimizer.param_groups:
            group[_MASKED] = True

    def _choose(self, groups: list[dict[str, Any]]) -> None:
        parameters = trained(groups)
        refuse_shards(parameters, "ChildTuning-D")
        if not all(map(takes_step, parameters)):
            raise UserError("ChildTuning-D needs a gradient of every trained parameter at its first step")
        masks = largest(mean_gradients(self.losses, parameters, squared=True), self.reserve_rate)
        for p, mask in zip(parameters, masks, strict=True):
            self.keep(p, MASK, mask)


def largest(information: list[Tensor], share: float) -> list[Tensor]:
    """Masks of the entries that are among the largest of all tensors together, and above 0.

    Args:
        information: fp32 or fp64, entries ≥ 0; compared in fp32.
        share: of all entries, in (0, 1]; those equal to the last one are taken too.

    Examples:
        >>> import torch
        >>> [mask.tolist() for mask in largest([torch.tensor([1.0, 4.0]), torch.tensor([0.0, 3.0])], 0.5)]
        [[False, True], [False, True]]
    """
    values = [x.float() for x in information]
    least = kth_largest(values, top_count(sum(x.numel() for x in values), share))
    return [(x >= least) & (x > 0) for x in values]
