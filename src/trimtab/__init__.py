"""trimtab: preference alignment without the alignment tax.

The public names below are loaded on first use, so that ``import trimtab`` costs nothing and starts no GPU.

Example:
    >>> import trimtab
    >>> "OnDARE" in dir(trimtab)
    True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "OnDARE": "trimtab.optim",
    "OnTIES": "trimtab.optim",
    "OnlineMerging": "trimtab.optim",
    "ReferenceDelta": "trimtab.delta",
    "UserError": "trimtab.errors",
    "parameter_groups": "trimtab.optim",
    "schedule": "trimtab.optim",
}

__all__ = ["OnDARE", "OnTIES", "OnlineMerging", "ReferenceDelta", "UserError", "parameter_groups", "schedule"]

if TYPE_CHECKING:
    from trimtab.delta import ReferenceDelta
    from trimtab.errors import UserError
    from trimtab.optim import OnDARE, OnlineMerging, OnTIES, parameter_groups, schedule


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
