"""Offline merging: the operators of :mod:`trimtab.ops`, streamed over model folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.merge.config import MergeConfig, load_config, read_config
    from trimtab.merge.run import merge

__all__ = ["MergeConfig", "load_config", "merge", "read_config"]

_WHERE = {
    "MergeConfig": "trimtab.merge.config",
    "load_config": "trimtab.merge.config",
    "read_config": "trimtab.merge.config",
    "merge": "trimtab.merge.run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: a check of a configuration needs no torch."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
