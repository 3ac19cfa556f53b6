import math

import numpy as np
import pytest

from trimtab.evaluate import Interval, paired_bootstrap, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 7), (7, 7), (1, 1), (120, 213)])
def test_wilson_ends_solve_its_defining_equation(successes, trials):
    # The ends are the shares q with |s/n - q| = z * sqrt(q(1-q)/n): not the formula the code uses.
    found = wilson(successes, trials)
    z = 1.959963984540054
    for end in (found.low, found.high):
        off = abs(successes / trials - end)
        assert off == pytest.approx(z * math.sqrt(end * (1 - end) / trials), abs=1e-9)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_wilson_covers_as_often_as_it_says():
    draws = np.random.default_rng(1).binomial(150, 0.55, size=2000)
    covered = sum(not wilson(int(s), 150).excludes(0.55) for s in draws) / len(draws)
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, trials)


def test_pairing_removes_what_both_models_share():
    noise = np.random.default_rng(2).normal(scale=10, size=200)
    found = paired_bootstrap(noise, noise + 0.5)
    assert found.estimate == pytest.approx(0.5)
    assert found.high - found.low < 1e-9


def test_bootstrap_width_agrees_with_the_standard_error():
    values = np.random.default_rng(3).normal(size=400)
    found = paired_bootstrap(np.zeros(400), values)
    standard_error = values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


def test_weights_make_a_weighted_mean():
    found = paired_bootstrap([0, 0], [1, 3], weights=[3, 1])
    assert found.estimate == pytest.approx(1.5)
    assert (found.low, found.high) == (1, 3)


def test_bootstrap_is_rebuilt_to_the_digit_and_follows_its_seed():
    values = np.random.default_rng(4).normal(size=50)
    assert paired_bootstrap(np.zeros(50), values) == paired_bootstrap(np.zeros(50), values)
    assert paired_bootstrap(np.zeros(50), values) != paired_bootstrap(np.zeros(50), values, seed=1)


@pytest.mark.parametrize(
    ("before", "after", "weights"),
    [([], [], None), ([1], [1, 2], None), ([1, 2], [1, 2], [1]), ([1], [1], [0])],
)
def test_bootstrap_refuses_what_is_not_paired(before, after, weights):
    with pytest.raises(ValueError, match="paired_bootstrap"):
        paired_bootstrap(before, after, weights=weights)


@pytest.mark.parametrize("confidence", [0, 1, -0.5])
def test_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence)


def test_interval_ends_belong_to_it():
    assert not Interval(0.5, 0.25, 0.75).excludes(0.25)
    assert Interval(0.5, 0.25, 0.75).excludes(0.76)
