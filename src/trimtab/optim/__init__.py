"""Online merging as torch optimizers.

:mod:`~trimtab.optim.adamw` has OnDARE and OnTIES, :mod:`~trimtab.optim.wrapper` the merge around any
optimizer; :mod:`~trimtab.optim.merging` is the merge itself, :mod:`~trimtab.optim.shell` what makes both
torch optimizers.
"""

from trimtab.optim.adamw import OnDARE, OnlineMergingAdamW, OnTIES
from trimtab.optim.arrival import Arrival, PrecisionWarning
from trimtab.optim.groups import parameter_groups
from trimtab.optim.shell import MergingShell, schedule
from trimtab.optim.wrapper import OnlineMerging

__all__ = [
    "Arrival",
    "MergingShell",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "OnlineMergingAdamW",
    "PrecisionWarning",
    "parameter_groups",
    "schedule",
]
