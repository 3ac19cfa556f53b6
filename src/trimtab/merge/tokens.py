"""The tokenizers of models: where they lie, what ids they give, and how they are cut and joined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.delta.checkpoint import read_json
from trimtab.delta.problems import first_few, first_line
from trimtab.errors import UserError
from trimtab.merge.inputs import Input

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any((folder / name).is_file() for name in _FILES)


def tokenizer_folder(model: Input) -> Path:
    """Where a model's tokenizer lies: an adapter may bring its own."""
    folder: Path = getattr(model, "tokenizer_folder", model.folder)
    return folder


def load(folder: Path) -> Any:
    """Load a tokenizer; code from its folder is never run.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizer libraries raise anything, down to bare Exception
        raise UserError(f"cannot read the tokenizer in {folder}: {first_line(error)}") from error


def same_files(ours: Path, theirs: Path) -> bool:
    """Whether the files that decide the ids are the same bytes; ``tokenizer.json`` goes before others."""
    if all((folder / _FILES[0]).is_file() for folder in (ours, theirs)):
        return (ours / _FILES[0]).read_bytes() == (theirs / _FILES[0]).read_bytes()
    present = [{name for name in _FILES if (folder / name).is_file()} for folder in (ours, theirs)]
    return present[0] == present[1] and all(
        (ours / name).read_bytes() == (theirs / name).read_bytes() for name in present[0]
    )


def tokens_of(folder: Path) -> dict[str, int]:
    """Token -> id; from ``tokenizer.json`` itself where there is one, since that is ten times as fast."""
    path = folder / "tokenizer.json"
    stated = read_json(path) if path.is_file() else {}
    try:
        listed, added = stated["model"]["vocab"], stated["added_tokens"]
        tokens = {token: id_ for id_, (token, _) in enumerate(listed)} if isinstance(listed, list) else listed
        return {**tokens, **{token["content"]: token["id"] for token in added}}
    except (KeyError, TypeError, ValueError):  # another format: the library says what it is, or what is wrong
        found: dict[str, int] = load(folder).get_vocab()
        return found


def add_all(tokenizer: Any, others: Sequence[tuple[Any, int]]) -> None:
    """Add the tokens of tokenizers: ordinary ones first, in the order of tokenizers and ids, then added ones.

    Args:
        tokenizer: what they are added to; its ids stay.
        others: tokenizers, each with its model's number of rows; tokens beyond those are left out.
    """
    present, has = set(tokenizer.get_vocab()), set(tokenizer.added_tokens_encoder)
    added: dict[str, Any] = {}
    ordinary: dict[str, None] = {}
    for other, limit in others:
        theirs = other.added_tokens_decoder
        for id_, token in sorted(theirs.items()):
            if id_ < limit:
                added.setdefault(token.content, token)
        known = {token.content for token in theirs.values()}
        by_id = sorted(other.get_vocab().items(), key=lambda item: item[1])
        ordinary |= dict.fromkeys(token for token, id_ in by_id if id_ < limit and token not in known)
    tokenizer.add_tokens([token for token in ordinary if token not in present and token not in added])
    tokenizer.add_tokens([token for content, token in added.items() if content not in has])


def cut(tokenizer: Any, limit: int, label: str) -> Any:
    """Drop the tokens of a tokenizer for which its model has no row.

    Args:
        tokenizer: it is changed.
        limit: the model's number of rows.
        label: how to speak of the model.

    Raises:
        UserError: there are such tokens, and it is no BPE tokenizer.
    """
    beyond = {token for token, id_ in tokenizer.get_vocab().items() if id_ >= limit}
    if not beyond:
        return tokenizer
    core = getattr(tokenizer, "_tokenizer", None)
    stated = json.loads(core.to_str()) if core is not None else {"model": {}}
    if stated["model"].get("type") != "BPE":
        raise UserError(
            f"the tokenizer of {label} has {len(beyond)} tokens without a row in the model (it has {limit}: "
            f"{first_few(sorted(beyond))}), and only BPE tokenizers can be cut; resize the model's "
            f"embeddings to {len(tokenizer)} first"
        )
    from tokenizers import Tokenizer

    stated["added_tokens"] = [token for token in stated["added_tokens"] if token["id"] < limit]
    model = stated["model"]
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if token not in beyond}
    model["merges"] = [pair for pair in model["merges"] if not beyond.intersection(_pair(pair))]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stated))
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and token in beyond:  # else saving and loading would add it again
            setattr(tokenizer, name, None)
    return tokenizer


def _pair(merge: str | list[str]) -> list[str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return [*parts, "".join(parts)]
