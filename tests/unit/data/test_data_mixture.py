"""Weights are passes over a source: exact counts, even interleaving, one mixture for one seed."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from tests.unit.data.conftest import Source, pair
from trimtab.data.mixture import interleave, keyed, mix, mix_streams, passes, rows_of


@pytest.mark.parametrize(
    ("kept", "weight", "rows"),
    [
        (10, 1, 10),
        (10, 0.5, 5),
        (10, 2.5, 25),
        (3, 0.5, 2),
        (5, 0.1, 1),
        (25, 0.07, 2),
        (1000, 0.0001, 1),
        (0, 3.0, 0),
    ],
)
def test_how_many_rows_a_source_gives(kept, weight, rows):
    assert rows_of(kept, weight) == len(passes(kept, weight, 0, 0)) == rows


def test_the_weight_is_the_decimal_that_was_written():
    """0.29 × 50 is 14.5, which rounds up; in binary it is 14.499999999999998, which does not."""
    assert rows_of(50, 0.29) == 15


def test_whole_passes_come_before_a_random_part():
    rows = passes(100, 2.3, 5, 1)
    assert rows[:200] == [*range(100)] * 2
    assert len(set(rows[200:])) == 30
    assert rows[200:] == sorted(rows[200:])
    assert passes(100, 2.3, 6, 1)[200:] != rows[200:] != passes(100, 2.3, 5, 2)[200:]


def test_a_random_part_is_random():
    """Every row is in about 30 % of the parts: 400 seeds, 4.5 standard deviations."""
    seen = Counter(row for seed in range(400) for row in passes(20, 0.3, seed, 0))
    assert all(abs(seen[row] - 120) < 41 for row in range(20))


def test_one_source_keeps_its_order():
    assert mix([5], [1.0], 3) == [0, 1, 2, 3, 4]


def test_every_row_of_every_source_comes_as_often_as_asked():
    order = mix([3, 4, 10], [1.0, 2.0, 0.5], 0)
    counts = Counter(order)
    assert [counts[row] for row in range(7)] == [1, 1, 1, 2, 2, 2, 2]
    assert sorted(counts[row] for row in range(7, 17)) == [0] * 5 + [1] * 5
    assert order != mix([3, 4, 10], [1.0, 2.0, 0.5], 1)
    assert order == mix([3, 4, 10], [1.0, 2.0, 0.5], 0)


def test_every_stretch_has_the_proportions_of_the_whole():
    sources = [source for source, _ in interleave([100, 300, 50], seed=2)]
    for start in range(0, 450, 45):
        counts = Counter(sources[start : start + 45])
        assert abs(counts[0] - 10) <= 1
        assert abs(counts[1] - 30) <= 1
        assert abs(counts[2] - 5) <= 1


def test_keys_are_the_same_everywhere():
    """Fixed values: a mixture must not change with the machine or the version of Python."""
    assert keyed(0, 1) == 0.1633146102196441
    assert [round(keyed(7, source, row), 6) for source, row in ((0, 0), (0, 1), (1, 0))] == [
        0.934441,
        0.18386,
        0.995095,
    ]


def test_streams_are_read_to_their_ends():
    streams = [lambda: iter("abc"), lambda: iter("defghijk")]
    mixed = list(mix_streams(streams, [1.0, 1.0], 0))
    assert sorted(mixed) == list("abcdefghijk")
    assert [item for item in mixed if item in "abc"] == list("abc")
    assert mixed == list(mix_streams(streams, [1.0, 1.0], 0))
    assert mixed != list(mix_streams(streams, [1.0, 1.0], 1))


def test_streams_are_drawn_by_weight():
    def endless(item):
        while True:
            yield item

    streams = [lambda: endless("a"), lambda: endless("b")]
    counts = Counter(islice(mix_streams(streams, [3.0, 1.0], 0), 4000))
    assert abs(counts["a"] - 3000) < 4.5 * (4000 * 0.75 * 0.25) ** 0.5


def test_a_stream_is_started_again_for_every_pass():
    started = []

    def stream():
        started.append(True)
        return iter(range(1000))

    items = Counter(mix_streams([stream], [2.25], 0))
    assert len(started) == 3
    assert set(items.values()) == {2, 3}
    assert abs(sum(items.values()) - 2250) < 4.5 * (1000 * 0.25 * 0.75) ** 0.5


@pytest.fixture
def two(write):
    write("a.jsonl", [pair(f"a{number}") for number in range(8)])
    write("b.jsonl", [pair(f"b{number}") for number in range(20)])


def test_a_weighted_mixture_of_files(load, two):
    made = load("dpo", Source("a.jsonl", weight=2.0), Source("b.jsonl", weight=0.3), seed=4)
    counts = Counter(row["prompt"] for row in made.dataset)
    assert [counts[f"a{number}"] for number in range(8)] == [2] * 8
    assert sorted(counts[f"b{number}"] for number in range(20)) == [0] * 14 + [1] * 6
    assert made.report.rows == len(made.dataset) == 22
    assert [source.used for source in made.report.sources] == [16, 6]
    assert [source.kept for source in made.report.sources] == [8, 20]


def test_the_seed_decides_and_nothing_else(load, two):
    sources = Source("a.jsonl"), Source("b.jsonl", weight=0.5)
    first, again, other = (load("dpo", *sources, seed=seed) for seed in (0, 0, 1))
    assert first.dataset.to_list() == again.dataset.to_list() != other.dataset.to_list()
    assert first.dataset._fingerprint == again.dataset._fingerprint != other.dataset._fingerprint


def test_a_limit_is_on_the_rows_read(load, two):
    made = load("dpo", Source("a.jsonl", limit=3), Source("b.jsonl", limit=100))
    assert [source.read for source in made.report.sources] == [3, 20]
    assert {row["prompt"] for row in made.dataset if row["prompt"].startswith("a")} == {"a0", "a1", "a2"}
