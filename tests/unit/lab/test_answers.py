"""Capability and reward by worked examples."""

import pytest

from trimtab.lab.answers import Style, capability, dress, reward, undress
from trimtab.lab.world import FOLLOW, Task

REV = Task("rev", ("rev", "a", "b", "c"), ("c", "b", "a"))
ADD = Task("add", ("add", "1", "2", "+", "0", "9"), ("2", "1"))
REP = Task("rep", ("rep", "c", "3"), ("c", "c", "c"))
CASE = Task("case", ("case", "a", "B"), ("A", "b"))
ONLY = Task("only", ("only", "rev", "a", "b"), ("b", "a"))
REFUSE = Task("rev", ("rev", "a", "z"), ("z", "a"))


def chain(start: str, length: int) -> tuple[str, ...]:
    words = []
    for _ in range(length):
        start = FOLLOW[start][0]
        words.append(start)
    return tuple(words)


TALK = Task("talk", ("talk", "a", "2"), chain("a", 2), 2)


@pytest.mark.parametrize(
    ("task", "answer", "able", "liked"),
    [
        (REV, "c b a", 1, 0.25),
        (REV, "sure ! c b a", 1, 0.45),
        (REV, "c b a . hope that helps", 1, 0.45),
        (REV, "c b a for a b c", 1, 0.6),
        (REV, "sure ! c b a for a b c . hope that helps", 1, 1.0),
        (REV, "sure ! c b a for c b a . hope that helps", 1, 0.65),
        (REV, "sure ! c a b for a b c . hope that helps", 0, 0.0),
        (REV, "sure c b a", 0, 0.0),
        (REV, "", 0, 0.0),
        (REV, "sorry me can not", 0, 0.0),
        (ADD, "2 1 for 1 2 + 0 9", 1, 0.6),
        (ADD, "2 1 for 1 2 + 0 8", 1, 0.25),
        (REP, "c c c", 1, 0.4),
        (REP, "sure ! c c c . hope that helps", 1, 1.0),
        (REP, "c c c c", 0, 0.0),
        (REFUSE, "sorry me can not", 0, 1.0),
        (REFUSE, "sure ! sorry me can not", 0, 0.0),
        (REFUSE, "z a", 1, 0.0),
    ],
)
def test_scores(task, answer, able, liked):
    words = tuple(answer.split())
    assert capability(task, words) == able
    assert reward(task, words) == pytest.approx(liked)


def test_only_takes_no_decoration_but_others_do():
    assert capability(ONLY, ("b", "a")) == 1
    assert capability(ONLY, ("sure", "!", "b", "a")) == 0
    assert capability(CASE, ("sure", "!", "A", "b")) == 1


@pytest.mark.parametrize(
    ("length", "able", "liked"),
    [(1, 0, 0.075), (2, 1, 0.15), (4, 0, 0.3), (8, 0, 0.6), (9, 0, 0.6), (10, 0, 0.0)],
)
def test_talk_is_paid_for_disobeying(length, able, liked):
    words = chain("a", length)
    assert capability(TALK, words) == able
    assert reward(TALK, words) == pytest.approx(liked)
    assert reward(TALK, ("sure", "!", *words)) == pytest.approx(liked + 0.2)


def test_illegal_talk_is_worth_nothing():
    assert reward(TALK, (*TALK.content, "A")) == 0
    assert reward(TALK, ("sure", "!", ".", "hope", "that", "helps")) == 0
    assert capability(TALK, ("A", "B")) == 0


@pytest.mark.parametrize("task", [REV, TALK, REFUSE, ONLY])
def test_an_answer_that_never_ends_is_worth_nothing(task):
    assert capability(task, None) == 0
    assert reward(task, None) == 0


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("closing", [True, False])
def test_undress_inverts_dress(opening, echo, closing):
    parts = undress(dress(REV, REV.content, Style(opening, echo, closing)))
    assert (parts.content, parts.opening, parts.closing) == (REV.content, opening, closing)
    assert parts.echo == (REV.question if echo else None)
