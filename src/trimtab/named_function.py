"""Functions that a user names as ``module:function``."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from trimtab.errors import UserError

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def names_function(text: str) -> bool:
    """Return whether ``text`` is written as ``module:function``.

    Examples:
        >>> names_function("my_rules:is_short"), names_function("org/reward-model")
        (True, False)
    """
    return _FORM.fullmatch(text) is not None


def function_named(text: str, key: str) -> Callable[..., Any]:
    """Import what ``module:function`` names; modules of the current folder count.

    Args:
        text: what the user wrote.
        key: where: an option or a recipe's key, for the sentence when there is no such function.

    Raises:
        UserError: there is no such thing.

    Examples:
        >>> function_named("math:sqrt", "--rule")(9)
        3.0
    """
    if not names_function(text):
        raise UserError(f"{key} {text!r} names no function; write module:function")
    module, _, name = text.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key} {text!r} cannot be imported: {error}") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UserError(f"{key} {text!r} is no function")
    return found  # type: ignore[no-any-return]
