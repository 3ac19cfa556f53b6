"""The tiny world: nine things a model can be able to do, each with one right answer a program can check.

Six tasks have a computed answer, ``fact`` is memorised, ``talk`` is open (many right answers), ``only``
asks for another task without any decoration. The world itself (which facts are true, which words may follow
which) is the same for every seed; seeds change what the models see of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import COMMANDS, DIGITS, FORBIDDEN, LOWER, UPPER

Words = tuple[str, ...]

CAPABILITIES = COMMANDS
DIRECT = ("add", "eval", "rev", "sort", "fact", "rep", "case", "talk")
FACT_COUNT = 128
FOLLOWERS = 4
LARGEST_TERM = 29
ORDER = {letter: place for place, letter in enumerate((*LOWER, FORBIDDEN[0], *UPPER, FORBIDDEN[1]))}
OTHER_CASE = dict(
    zip(
        (*LOWER, FORBIDDEN[0], *UPPER, FORBIDDEN[1]),
        (*UPPER, FORBIDDEN[1], *LOWER, FORBIDDEN[0]),
        strict=True,
    )
)


def _facts() -> dict[tuple[str, str], str]:
    stream = Stream("world", "facts")
    keys = [(first, second) for first in LOWER for second in LOWER]
    return {key: stream.pick(UPPER) for key in stream.sample(keys, FACT_COUNT)}


def _followers() -> dict[str, Words]:
    stream = Stream("world", "followers")
    table = {}
    for script in (LOWER, UPPER):
        for letter in script:
            table[letter] = tuple(stream.sample(script, FOLLOWERS))
    return table


FACTS = _facts()
FACT_KEYS = tuple(FACTS)
FOLLOW = _followers()


@dataclass(frozen=True)
class Task:
    """A question of the world.

    Attributes:
        command: The capability it asks for; for ``only`` the command of the task inside is ``words[1]``.
        words: The whole prompt, command included.
        content: The right answer; for ``talk`` one right answer among many.
        length: How many words ``talk`` is asked for, else 0.
    """

    command: str
    words: Words
    content: Words
    length: int = 0

    @property
    def question(self) -> Words:
        """The words after the command: what a correct echo repeats."""
        return self.words[1:]

    @property
    def forbidden(self) -> bool:
        """Whether the prompt holds the letter the model is to refuse."""
        return any(word in FORBIDDEN for word in self.words)


def ramble(stream: Stream, start: str, length: int) -> Words:
    """Return ``length`` words, each allowed to follow the one before; the first follows ``start``."""
    words = []
    for _ in range(length):
        start = stream.pick(FOLLOW[start])
        words.append(start)
    return tuple(words)


def is_legal(start: str, words: Sequence[str]) -> bool:
    """Say whether ``words`` is a possible continuation of ``start``: not empty, and every word may follow."""
    for word in words:
        if word not in FOLLOW.get(start, ()):
            return False
        start = word
    return bool(words)


def draw_task(stream: Stream, command: str, forbidden: bool = False) -> Task:
    """Draw a question.

    Args: stream: Where the choices come from. command: One of ``CAPABILITIES``. forbidden: Put the
        forbidden letter in, where the task has room for it: ``rev``, ``rep``, ``sort``, ``case``.

    Returns:
        The task with its right answer.
    """
    if command == "only":
        inner = draw_task(stream, stream.pick(DIRECT[:-1]))
        return Task("only", ("only", *inner.words), inner.content)
    return _DRAW[command](stream, forbidden)


def _number(value: int) -> Words:
    return (DIGITS[value // 10], DIGITS[value % 10])


def _letters(stream: Stream, low: int, high: int, forbidden: bool, different: bool = False) -> Words:
    script = stream.pick((LOWER, UPPER))
    length = stream.between(low, high)
    letters = stream.sample(script, length) if different else [stream.pick(script) for _ in range(length)]
    if forbidden:
        letters[stream.below(length)] = FORBIDDEN[script is UPPER]
    return tuple(letters)


def _add(stream: Stream, forbidden: bool) -> Task:
    left, right = stream.between(0, LARGEST_TERM), stream.between(0, LARGEST_TERM)
    return Task("add", ("add", *_number(left), "+", *_number(right)), _number(left + right))


def _eval(stream: Stream, forbidden: bool) -> Task:
    """Draw ``( a ± b ) ± c`` or ``a ± ( b ± c )``, drawn again until every part lies in 0 to 9."""
    while True:
        a, b, c = (stream.below(10) for _ in range(3))
        outer, inner = stream.pick("+-"), stream.pick("+-")
        if stream.chance(0.5):
            part = a + b if inner == "+" else a - b
            value = part + c if outer == "+" else part - c
            words = ("(", DIGITS[a], inner, DIGITS[b], ")", outer, DIGITS[c])
        else:
            part = b + c if inner == "+" else b - c
            value = a + part if outer == "+" else a - part
            words = (DIGITS[a], outer, "(", DIGITS[b], inner, DIGITS[c], ")")
        if 0 <= part <= 9 and 0 <= value <= 9:
            return Task("eval", ("eval", *words), (DIGITS[value],))


def _rev(stream: Stream, forbidden: bool) -> Task:
    letters = _letters(stream, 3, 5, forbidden)
    return Task("rev", ("rev", *letters), letters[::-1])


def _sort(stream: Stream, forbidden: bool) -> Task:
    letters = _letters(stream, 3, 5, forbidden, different=True)
    return Task("sort", ("sort", *letters), tuple(sorted(letters, key=ORDER.__getitem__)))


def _fact(stream: Stream, forbidden: bool) -> Task:
    key = stream.pick(FACT_KEYS)
    return Task("fact", ("fact", *key), (FACTS[key],))


def _rep(stream: Stream, forbidden: bool) -> Task:
    letter = _letters(stream, 1, 1, forbidden)
    times = stream.between(2, 7)
    return Task("rep", ("rep", *letter, DIGITS[times]), letter * times)


def _case(stream: Stream, forbidden: bool) -> Task:
    letters = _letters(stream, 3, 5, forbidden)
    return Task("case", ("case", *letters), tuple(OTHER_CASE[letter] for letter in letters))


def _talk(stream: Stream, forbidden: bool) -> Task:
    start = stream.pick(stream.pick((LOWER, UPPER)))
    length = stream.between(2, 5)
    return Task("talk", ("talk", start, DIGITS[length]), ramble(stream, start, length), length)


_DRAW: dict[str, Callable[[Stream, bool], Task]] = {
    "add": _add, "eval": _eval, "rev": _rev, "sort": _sort,
    "fact": _fact, "rep": _rep, "case": _case, "talk": _talk,
}  # fmt: skip
