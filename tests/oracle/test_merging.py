"""The oracle of offline merging, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import merging as oracle


def test_the_oracle_by_hand() -> None:
    base = {"a": np.array([1.0, 1.0]), "b": np.array([0.0])}
    one = {"a": np.array([4.0, 0.0]), "b": np.array([2.0])}  # deltas 3, −1, 2
    two = {"a": np.array([2.0, 3.0]), "b": np.array([-4.0])}  # deltas 1, 2, −4
    assert oracle.linear([one, two], [3, 1])["a"].tolist() == [3.5, 0.75]
    assert oracle.task_arithmetic(base, [one, two], [1, 1], 0.5)["b"].tolist() == [-1.0]
    first, second = oracle.deltas(base, [one, two])
    assert {n: x.tolist() for n, x in oracle.trimmed_together(first, 0.34).items()} == {"a": [3, 0], "b": [2]}
    assert {n: x.tolist() for n, x in oracle.trimmed_apart(first, 0.5).items()} == {"a": [3, 0], "b": [2]}
    # a[0]: 3 and 1 agree; a[1]: −1 and 2·2; b: 2 and 2·−4
    voted = oracle.elected(base, [first, second], [1, 2], 1.0, True, "nothing")
    assert voted["a"].tolist() == [1 + 5 / 3, 1 + 2]
    assert voted["b"].tolist() == [-4.0]
    # a sum of 0: nothing, or plus
    assert oracle.vote([1.0, -1.0], [1, 1], True, "nothing") == (0, 0)
    assert oracle.vote([1.0, -1.0], [1, 1], True, "plus") == (1, 1)
    restored = oracle.norm_restored({"a": np.array([3.0, 0])}, {"a": np.array([3.0, -1.5])})
    assert restored["a"].tolist() == [4.5, 0]
    quarter = oracle.slerp_of_two(np.array([1.0, 0]), np.array([0, 2.0]), 1 / 3)
    assert quarter.tolist() == pytest.approx([np.sqrt(3) / 2, 1.0])
    assert [oracle.block_of(layer, 5, 2) for layer in range(5)] == [0, 0, 0, 1, 1]
