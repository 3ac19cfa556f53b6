"""What does not fit, collected, so that one sentence can tell all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.errors import UserError

_SHOWN = 4


@dataclass
class Problems:
    """Parameters that are missing, left over, or of another shape than expected.

    Args:
        missing: expected and not there.
        extra: there and not expected.
        mismatched: there, with another shape; each entry says which.

    Examples:
        >>> print(Problems(missing=["a", "b"], mismatched=["c (2 × 2, expected 2 × 3)"]).summary())
        2 missing (a, b); 1 mismatched (c (2 × 2, expected 2 × 3))
    """

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.mismatched)

    def summary(self) -> str:
        """All of them counted, the first few named."""
        kinds = (("missing", self.missing), ("extra", self.extra), ("mismatched", self.mismatched))
        return "; ".join(f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds if names)

    def refuse(self, sentence: str) -> None:
        """Raise a UserError that opens with ``sentence`` if there is any problem."""
        if self:
            raise UserError(f"{sentence}: {self.summary()}")


def first_few(names: list[str]) -> str:
    """Join the first names, and say that there are more.

    Examples:
        >>> first_few(["a", "b", "c", "d", "e"])
        'a, b, c, d, …'
    """
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line.

    Examples:
        >>> first_line(KeyError()), first_line(ValueError("it is: "))
        ('KeyError', 'it is')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :;,.")


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a shape.

    Examples:
        >>> shape_text((2, 3)), shape_text(())
        ('2 × 3', 'scalar')
    """
    return " × ".join(map(str, shape)) or "scalar"
