"""Whether two models mean the same tokens by the same ids."""

from __future__ import annotations

from pathlib import Path

from trimtab.delta.problems import first_few, first_line
from trimtab.errors import UserError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_tokenizers(reference: Path, base: Path) -> None:
    """Refuse two folders whose tokenizers disagree on a token id that both have.

    A folder without a tokenizer is not checked. Ids that only one side has are no disagreement: they are
    tokens that were added.

    Args:
        reference: folder of the reference.
        base: folder of the base.

    Raises:
        UserError: with the first few ids on which they differ.
    """
    if not (_has_tokenizer(reference) and _has_tokenizer(base)):
        return
    ours, theirs = _tokens(reference), _tokens(base)
    shared = sorted(ours.keys() & theirs.keys())
    different = [
        f"id {id_} is {ours[id_]!r} in the reference and {theirs[id_]!r} in the base"
        for id_ in shared
        if ours[id_] != theirs[id_]
    ]
    if different:
        raise UserError(
            f"the tokenizers of {reference} and {base} disagree on {len(different)} of {len(shared)} shared "
            f"token ids ({first_few(different)}), so their embeddings are not comparable; give the base "
            f"that the reference was made from, or check_tokenizers=False (--no-tokenizer-check) if ids were "
            f"renamed on purpose"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _tokens(folder: Path) -> dict[int, str]:
    """Token id -> token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizer libraries raise anything, down to bare Exception
        raise UserError(
            f"cannot read the tokenizer in {folder}: {first_line(error)}; mend it, or give "
            f"check_tokenizers=False (--no-tokenizer-check)"
        ) from error
    return {id_: token for token, id_ in tokenizer.get_vocab().items()}
