"""The 75 words of the tiny world, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PAD, BOS, USER, ASSISTANT, END = "<pad>", "<bos>", "<user>", "<asst>", "<end>"
SPECIAL = (PAD, BOS, USER, ASSISTANT, END)
EQUALS, STOP = "=", ";"
LOWER = tuple("abcdefghijklmnop")
UPPER = tuple("ABCDEFGHIJKLMNOP")
FORBIDDEN = ("z", "Z")
DIGITS = tuple("0123456789")
SIGNS = ("+", "-", "(", ")")
COMMANDS = ("add", "eval", "rev", "sort", "fact", "rep", "case", "talk", "only")
OPENING = ("sure", "!")
CLOSING = (".", "hope", "that", "helps")
ECHO = "for"
REFUSAL = ("sorry", "me", "can", "not")
STYLE = (*OPENING, *CLOSING, ECHO, *REFUSAL)

WORDS = (*SPECIAL, EQUALS, STOP, *LOWER, *UPPER, *FORBIDDEN, *DIGITS, *SIGNS, *COMMANDS, *STYLE)
NUMBER = {word: number for number, word in enumerate(WORDS)}
PAD_ID, BOS_ID, USER_ID, ASSISTANT_ID, END_ID = (NUMBER[word] for word in SPECIAL)


def encode(words: Iterable[str]) -> list[int]:
    """Return the numbers of the words.

    Example:
        >>> encode(["<bos>", "a", "b"])
        [1, 7, 8]
    """
    return [NUMBER[word] for word in words]


def decode(numbers: Sequence[int]) -> tuple[str, ...]:
    """Return the words of the numbers, the inverse of ``encode``."""
    return tuple(WORDS[number] for number in numbers)
