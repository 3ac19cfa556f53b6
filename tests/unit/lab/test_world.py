"""The world's rules by worked examples, and that nothing in it depends on luck."""

import hashlib
from collections import Counter

import pytest

from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import LOWER, NUMBER, UPPER, WORDS, decode, encode
from trimtab.lab.world import CAPABILITIES, FACTS, FOLLOW, Task, draw_task, is_legal, ramble


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def test_vocabulary_numbers_every_word_once():
    assert len(WORDS) == len(set(WORDS)) == 75
    assert decode(encode(WORDS)) == WORDS
    assert NUMBER["<pad>"] == 0


def test_streams_are_fixed_by_their_key():
    numbers = [Stream("test", 0).below(1000) for _ in range(2)]
    assert numbers[0] == numbers[1]
    stream = Stream("test", 0)
    drawn = [stream.below(1000) for _ in range(5)]
    assert drawn == [962, 546, 710, 690, 605]


def test_the_world_is_the_one_the_checkpoints_were_trained_in():
    tasks = [
        draw_task(stream, command)
        for stream in [Stream("test")]
        for command in CAPABILITIES
        for _ in range(20)
    ]
    assert (digest(sorted(FACTS.items())), digest(sorted(FOLLOW.items())), digest(tasks)) == (
        "3fbc2ccc16edeb3e",
        "0911027dbc0a5239",
        "46e4e1a4aff06cd2",
    )


def test_stream_choices_are_fair():
    stream, n = Stream("fair"), 20_000
    counts = Counter(stream.below(5) for _ in range(n))
    # Six standard deviations of a binomial with p = 1/5.
    assert all(abs(count - n / 5) < 6 * (n * 0.2 * 0.8) ** 0.5 for count in counts.values())
    picks = Counter(stream.weighted("abc", (1, 2, 1)) for _ in range(n))
    assert abs(picks["b"] - n / 2) < 6 * (n * 0.25) ** 0.5
    assert abs(sum(stream.chance(0.15) for _ in range(n)) - 0.15 * n) < 6 * (n * 0.15 * 0.85) ** 0.5


def test_sampling_and_shuffling_lose_and_repeat_nothing():
    stream = Stream("order")
    assert sorted(stream.shuffled(range(50))) == list(range(50))
    assert len(set(stream.sample(LOWER, 16))) == 16
    assert {stream.between(2, 4) for _ in range(100)} == {2, 3, 4}


@pytest.mark.parametrize("command", CAPABILITIES)
def test_every_answer_is_right_by_an_independent_rule(command):
    stream = Stream("check", command)
    for _ in range(200):
        task = draw_task(stream, command)
        assert task.words[0] == command
        assert set(task.words) | set(task.content) <= set(WORDS)
        assert not task.forbidden
        inner = Task(task.words[1], task.words[1:], task.content) if command == "only" else task
        assert expected(inner) in (None, list(task.content))


def expected(task: Task) -> list[str] | None:
    """Work the answer out again, differently; None for talk, which is checked for legality."""
    words = list(task.question)
    match task.command:
        case "add":
            total = int(words[0] + words[1]) + int(words[3] + words[4])
            return list(f"{total:02d}")
        case "eval":
            return [str(eval(" ".join(words)))]
        case "rev":
            return words[::-1]
        case "sort":
            return sorted(words)
        case "fact":
            return [FACTS[words[0], words[1]]]
        case "rep":
            return [words[0]] * int(words[1])
        case "case":
            return list("".join(words).swapcase())
    assert len(task.content) == int(words[1]) == task.length
    assert all(b in FOLLOW[a] for a, b in zip((words[0], *task.content), task.content, strict=False))
    return None


@pytest.mark.parametrize("command", ["rev", "rep", "sort", "case"])
def test_forbidden_questions_hold_the_letter(command):
    stream = Stream("forbidden")
    for _ in range(50):
        task = draw_task(stream, command, forbidden=True)
        assert task.forbidden
        assert {"z", "Z"} & set(task.words)
        if command == "sort":
            assert list(task.content) == sorted(task.question)


def test_legality():
    start = "a"
    follower = FOLLOW[start][0]
    stranger = next(letter for letter in LOWER if letter not in FOLLOW[start])
    assert is_legal(start, (follower, FOLLOW[follower][1]))
    assert not is_legal(start, ())
    assert not is_legal(start, (stranger,))
    assert not is_legal(start, (UPPER[0],))
    assert not is_legal(start, (follower, "sure"))
    assert is_legal("B", ramble(Stream("ramble"), "B", 30))
