"""Reading and converting preference, ranked and instruction data into the columns that TRL's trainers want.

Example:
    >>> from trimtab.data import FORMATS
    >>> "sharegpt" in FORMATS
    True
"""

from __future__ import annotations

from trimtab.data.formats import FORMATS
from trimtab.data.load import DataSpec, PreparedData, load_data
from trimtab.data.locate import Source
from trimtab.data.outcome import REASONS
from trimtab.data.report import DataReport, SourceReport

__all__ = [
    "FORMATS",
    "REASONS",
    "DataReport",
    "DataSpec",
    "PreparedData",
    "Source",
    "SourceReport",
    "load_data",
]
