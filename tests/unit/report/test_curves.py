"""Reading curves: first crossings, pairs, means."""

import pytest

from trimtab.report.curves import (
    Curve,
    Point,
    Spread,
    mean_curve,
    paired,
    reward_at_tax,
    rewards_at_tax,
    tax_at_reward,
)

DIP = Curve("m", 0, (Point(0.3, 0.0), Point(0.5, 4.0), Point(0.45, 2.0), Point(0.7, 10.0)))


@pytest.mark.parametrize(
    ("tax", "reward"),
    [(0.0, 0.3), (1.0, 0.35), (4.0, 0.5), (7.0, 0.45 + 0.25 * 5 / 8), (10.0, 0.7), (10.1, None)],
)
def test_reward_at_tax_reads_the_first_crossing(tax, reward):
    assert reward_at_tax(DIP, tax) == (reward if reward is None else pytest.approx(reward))


@pytest.mark.parametrize(
    ("reward", "tax"), [(0.3, 0.0), (0.4, 2.0), (0.5, 4.0), (0.6, 2 + 8 * 0.15 / 0.25), (0.8, None)]
)
def test_tax_at_reward_reads_the_first_crossing(reward, tax):
    assert tax_at_reward(DIP, reward) == (tax if tax is None else pytest.approx(tax))


def test_a_method_that_gains_capability_first_crosses_on_its_way_back():
    curve = Curve("m", 0, (Point(0.3, 0.0), Point(0.4, -2.0), Point(0.6, 2.0)))
    assert reward_at_tax(curve, 1.0) == pytest.approx(0.55)


def test_seeds_that_never_get_there_are_left_out():
    short = Curve("m", 1, (Point(0.3, 0.0), Point(0.4, 1.0)))
    assert rewards_at_tax([DIP, short], 4.0) == {0: 0.5}


def test_pairs_need_both_sides():
    assert paired({0: 0.5, 1: 0.25}, {1: 0.125, 2: 9.0}) == {1: 0.125}


def test_spread_of_nothing_is_none():
    assert Spread.of([]) is None
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_mean_curve_stops_where_the_shortest_does():
    other = Curve("m", 1, (Point(0.1, 0.0), Point(0.3, 2.0, "step 5")))
    mean = mean_curve([DIP, other])
    assert [(point.reward, point.tax) for point in mean] == [
        pytest.approx((0.2, 0.0)),
        pytest.approx((0.4, 3.0)),
    ]
