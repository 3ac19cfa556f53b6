"""Training: one module per method, thin over TRL, and the seam through which any trainer takes ours.

:func:`run` is ``trimtab train``; :class:`OnlineMergingMixin` gives a transformers or TRL trainer of your own
an optimizer from an :class:`OptimizerPlan`. Importing this package loads neither TRL nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.train.arguments import config_class as config_class
    from trimtab.train.diagnostics_callback import DiagnosticsCallback as DiagnosticsCallback
    from trimtab.train.launch import run as run
    from trimtab.train.mixin import OnlineMergingMixin as OnlineMergingMixin
    from trimtab.train.optimizers import OptimizerPlan as OptimizerPlan

_WHERE = {
    "DiagnosticsCallback": "trimtab.train.diagnostics_callback",
    "OnlineMergingMixin": "trimtab.train.mixin",
    "OptimizerPlan": "trimtab.train.optimizers",
    "config_class": "trimtab.train.arguments",
    "run": "trimtab.train.launch",
}
__all__ = ["DiagnosticsCallback", "OnlineMergingMixin", "OptimizerPlan", "config_class", "run"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
