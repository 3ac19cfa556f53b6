"""REINFORCE leave-one-out (arXiv 2402.14740): TRL's trainer, our optimizer, an explicit reference.

Of k responses y_i to a prompt x, with R_i = r_i − β log(π_old(y_i | x) / π_ref(y_i | x)), the baseline of
each is the mean of the others, and ρ_i = π_θ(y_i | x) / π_old(y_i | x) is of the whole response:

    A_i = R_i − 1/(k − 1) Σ_{j ≠ i} R_j
    L = −1/k Σ_i min(ρ_i A_i, clip(ρ_i, 1 − ε, 1 + ε) A_i)
"""

from __future__ import annotations

from trl import RLOOTrainer

from trimtab.train.group_sampling import GroupSampling, group_trainer_arguments
from trimtab.train.guard import GuardedTrainer
from trimtab.train.parts import Parts


class MergingRLOOTrainer(GuardedTrainer, GroupSampling, RLOOTrainer):
    """TRL's RLOO trainer with an optimizer built from named parameters; arguments of all three."""


def make_trainer(parts: Parts) -> MergingRLOOTrainer:
    """Load policy, reference and rewards and put the trainer together."""
    return MergingRLOOTrainer(**group_trainer_arguments(parts))
