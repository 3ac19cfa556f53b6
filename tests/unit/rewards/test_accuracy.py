"""Pairwise accuracy: which pairs count, and an interval that takes prompts for what is independent."""

from __future__ import annotations

from trimtab.evaluate import wilson
from trimtab.rewards import pairwise_accuracy, unequal_pairs


def test_every_pair_of_unequal_scores_counts_the_better_first() -> None:
    values = [10.0, 20.0, 30.0, 40.0]
    assert sorted(unequal_pairs([2, 0, 2, 1], values)) == sorted(
        [(10.0, 20.0), (10.0, 40.0), (30.0, 20.0), (30.0, 40.0), (40.0, 20.0)]
    )
    assert unequal_pairs([1, 1, 1], values[:3]) == []


def test_ties_of_the_values_count_as_wrong() -> None:
    found = pairwise_accuracy([(1.0, 1.0), (1.0, 0.0)])
    assert (found["correct"], found["ties"], found["accuracy"]) == (1, 1, 0.5)


def test_pairs_of_one_prompt_are_no_more_evidence_than_one() -> None:
    pairs = [(1.0, 0.0)] * 9 + [(0.0, 1.0)] * 3
    found = pairwise_accuracy(pairs, prompts=4)
    known = wilson(3, 4)
    assert found["accuracy"] == 0.75
    assert [found["interval"]["low"], found["interval"]["high"]] == [known.low, known.high]
    assert "9 of 12 held-out pairs of 4 prompts: accuracy 75.0 % (95 % interval" in found["summary"]
    assert pairwise_accuracy(pairs)["interval"]["low"] > known.low
