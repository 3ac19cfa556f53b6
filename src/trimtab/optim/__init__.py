"""Online merging as torch optimizers.

:mod:`~trimtab.optim.adamw` has OnDARE and OnTIES, :mod:`~trimtab.optim.wrapper` the merge around any
optimizer, :mod:`~trimtab.optim.galore` AdamW in a low-rank subspace; :mod:`~trimtab.optim.merging` is the
merge itself, :mod:`~trimtab.optim.shell` what makes OnDARE, OnTIES and OnlineMerging torch optimizers.
"""

from trimtab.optim.adamw import OnDARE, OnlineMergingAdamW, OnTIES
from trimtab.optim.arrival import Arrival, PrecisionWarning
from trimtab.optim.galore import GaLoreAdamW, ProjectorWarning
from trimtab.optim.groups import parameter_groups
from trimtab.optim.shell import MergingShell, schedule
from trimtab.optim.wrapper import OnlineMerging

__all__ = [
    "Arrival",
    "GaLoreAdamW",
    "MergingShell",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "OnlineMergingAdamW",
    "PrecisionWarning",
    "ProjectorWarning",
    "parameter_groups",
    "schedule",
]
