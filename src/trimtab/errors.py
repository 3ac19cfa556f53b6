"""What a user did wrong, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: what is wrong, where, and what would be right, in one sentence.

    The command line prints the sentence and exits with code 2, without a traceback. Library code raises it
    wherever bad input is found; as a ``ValueError`` it reads as one to callers from Python.
    """


class IncompatibleState(UserError):
    """A saved state (checkpoint, delta) that does not belong to what it is loaded into."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option closest to ``name``, or None when nothing is close.

    Examples:
        >>> nearest("merge_wieght", ["merge_weight", "merge_every"])
        'merge_weight'
    """
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(what: str, name: str, options: Iterable[str], where: str = "") -> UserError:
    """Build the error for a name that is not one of ``options``, with the near miss when there is one.

    Examples:
        >>> print(unknown("consensus", "sgn", ["linear", "sign"]))
        unknown consensus 'sgn'; did you mean 'sign'? Known: linear, sign
    """
    options = list(options)
    close = nearest(name, options)
    place = f" at {where}" if where else ""
    hint = f"; did you mean {close!r}?" if close else "."
    return UserError(f"unknown {what} {name!r}{place}{hint} Known: {', '.join(options)}")
