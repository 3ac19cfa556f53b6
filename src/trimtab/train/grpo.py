"""Group relative policy optimization (arXiv 2402.03300): TRL's trainer, our optimizer, an explicit reference.

Of G responses y_i to a prompt x, with rewards r_i and ρ_t = π_θ(y_t | x, y_<t) / π_old(y_t | x, y_<t),

    A_i = (r_i − mean(r)) / std(r)
    L = −1/G Σ_i 1/|y_i| Σ_t [min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i) − β (q_t − log q_t − 1)],

with q_t = π_ref(y_t | x, y_<t) / π_θ(y_t | x, y_<t). ``docs/methods.md`` says how TRL normalises.
"""

from __future__ import annotations

from trl import GRPOTrainer

from trimtab.train.group_sampling import GroupSampling, group_trainer_arguments
from trimtab.train.guard import GuardedTrainer
from trimtab.train.parts import Parts


class MergingGRPOTrainer(GuardedTrainer, GroupSampling, GRPOTrainer):
    """TRL's GRPO trainer with an optimizer built from named parameters; arguments of all three."""


def make_trainer(parts: Parts) -> MergingGRPOTrainer:
    """Load policy, reference and rewards and put the trainer together."""
    return MergingGRPOTrainer(**group_trainer_arguments(parts))
