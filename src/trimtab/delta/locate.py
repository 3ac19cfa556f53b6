"""From what a user names, a folder or a hub id, to a local folder. Only safetensors and text are fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trimtab.delta.checkpoint import shard_files
from trimtab.delta.problems import first_line
from trimtab.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXTS = ["*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
_WEIGHTS = ["model.safetensors", "adapter_model.safetensors", "initial_adapter.safetensors"]
_SUBFOLDERS = ["*/*"]


@dataclass(frozen=True)
class Located:
    """A model folder on this machine, and how to speak of it.

    Args:
        folder: where it lies.
        label: the path as given, or the hub id with its revision.
    """

    folder: Path
    label: str


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Located:
    """Find a model: a folder as it is, a hub id through the hub's cache.

    From the hub only JSON and tokenizer text and the safetensors named in the index are fetched; pickles
    never are, nor what lies in subfolders. With the hub off (``HF_HUB_OFFLINE=1``) its cache is used.

    Args:
        source: path of a folder, or a hub id (``org/name``).
        revision: branch, tag or commit; for hub ids only.
        cache_dir: the hub cache; default as huggingface_hub has it.
        local_files_only: do not ask the hub, use what is cached.

    Raises:
        UserError: neither a folder nor a model that can be had from the hub.
    """
    if "\0" in str(source):
        raise UserError(f"{str(source)!r} holds a null character, so it is neither a folder nor a hub id")
    try:
        folder = Path(source).expanduser()
    except RuntimeError:
        raise UserError(
            f"{str(source)!r} begins with a home folder that is not known here; give the whole path"
        ) from None
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"revision {revision!r} was given for the local folder {source}; it is for hub ids only"
            )
        return Located(folder, str(source))
    if folder.exists():
        raise UserError(f"{source} is a file; give the folder that holds the weights and their config.json")
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"there is no folder {str(source)!r}, and it cannot be a hub id (org/name)")
    snapshot = _fetch(str(source), revision, cache_dir, local_files_only)
    return Located(snapshot, f"{source}@{snapshot.name[:12]}")


def _fetch(name: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RevisionResolutionError

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=_SUBFOLDERS,
            )
        )

    try:
        folder = fetch(_TEXTS)
        index = folder / "model.safetensors.index.json"
        return fetch(shard_files(index) if index.is_file() else _WEIGHTS)
    except (EntryNotFoundError, RevisionResolutionError, HFValidationError, OSError) as error:
        # Every error of the hub's (not found, gated, offline, no connection) is one of these.
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"there is no folder {name!r} here, and the hub does not give a model of that name{at}: "
            f"{first_line(error)}"
        ) from error
