"""Online merging as torch optimizers.

:mod:`~trimtab.optim.adamw` has OnDARE and OnTIES, :mod:`~trimtab.optim.wrapper` the merge around any
optimizer, :mod:`~trimtab.optim.galore` AdamW in a low-rank subspace; :mod:`~trimtab.optim.merging` is the
merge itself, :mod:`~trimtab.optim.shell` what makes OnDARE, OnTIES and OnlineMerging torch optimizers. EMA
and the others are regularisers (:mod:`~trimtab.optim.regulariser`): they act around any optimizer's steps.
"""

from trimtab.optim.adamw import OnDARE, OnlineMergingAdamW, OnTIES
from trimtab.optim.arrival import Arrival, PrecisionWarning
from trimtab.optim.child_tuning import ChildTuning
from trimtab.optim.elastic_reset import ElasticReset
from trimtab.optim.ema import EMA, averaged_weights
from trimtab.optim.fisher import FisherChildTuning
from trimtab.optim.galore import GaLoreAdamW, ProjectorWarning
from trimtab.optim.groups import parameter_groups
from trimtab.optim.projection import GradientProjection
from trimtab.optim.pull import PullToReference
from trimtab.optim.regulariser import Regulariser
from trimtab.optim.shell import MergingShell, schedule
from trimtab.optim.wrapper import OnlineMerging

__all__ = [
    "EMA",
    "Arrival",
    "ChildTuning",
    "ElasticReset",
    "FisherChildTuning",
    "GaLoreAdamW",
    "GradientProjection",
    "MergingShell",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "OnlineMergingAdamW",
    "PrecisionWarning",
    "ProjectorWarning",
    "PullToReference",
    "Regulariser",
    "averaged_weights",
    "parameter_groups",
    "schedule",
]
