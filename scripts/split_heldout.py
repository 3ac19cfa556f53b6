#!/usr/bin/env python
"""Splits a JSONL file (plain or .gz) into rows to train on and rows held out, by what was asked.

    python scripts/split_heldout.py hh_harmless_base_test.jsonl.gz runs/data/hh --heldout 0.34

writes train.jsonl and heldout.jsonl into runs/data/hh, rows and their order unchanged. Rows that share a
question (an HH dialogue's first human turn; an instruction; a first message) land on the same side, so that
nothing that is measured was trained on. The side depends on the question's hash alone: more rows later move
no old ones.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.files import write_text

QUESTION_COLUMNS = ("instruction", "prompt", "question", "messages", "chosen")


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and split, turning a user's mistake into one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="JSONL file, plain or .gz")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--heldout", type=float, default=0.1, help="share of questions held out")
    options = parser.parse_args(argv)
    try:
        split(options.source, options.out, options.heldout)
    except UserError as error:
        print(f"split_heldout: {error}", file=sys.stderr)
        return 2
    return 0


def split(source: Path, out: Path, heldout: float) -> None:
    """Write the two files."""
    if not 0 < heldout < 1:
        raise UserError(f"--heldout must lie between 0 and 1, got {heldout}")
    sides: dict[str, list[str]] = {"train": [], "heldout": []}
    for number, line in lines(source):
        side = "heldout" if position(question(line, f"{source}:{number}")) < heldout else "train"
        sides[side].append(line)
    for name, rows in sides.items():
        write_text(out / f"{name}.jsonl", "".join(row + "\n" for row in rows))
        print(f"{out / name}.jsonl: {len(rows)} rows")


def lines(source: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and the non-empty lines of ``source``."""
    opened = gzip.open if source.suffix == ".gz" else open
    try:
        with opened(source, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from error


def question(line: str, where: str) -> str:
    """Return what the row asks: its question column, and of a dialogue the first turn."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg})") from error
    column = next((name for name in QUESTION_COLUMNS if name in row), None)
    if column is None:
        raise UserError(
            f"{where} has none of the columns {', '.join(QUESTION_COLUMNS)}; found {', '.join(row)}"
        )
    value = row[column]
    if isinstance(value, list):
        value = value[0]["content"]
    return str(value).split("\n\nAssistant:")[0].strip()


def position(text: str) -> float:
    """Hash ``text`` to a number in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


if __name__ == "__main__":
    sys.exit(main())
