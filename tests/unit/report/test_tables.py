"""Tables: what stands in the cells, what is missing, what is emphasised."""

from trimtab.report.curves import Curve, Point, Spread
from trimtab.report.tables import MISSING, differences, equal_reward, equal_tax, number, spread_text


def straight(method: str, seed: int, slope: float, longest: float = 10.0) -> Curve:
    """A curve whose reward grows by ``slope`` per point of tax, from 0.3."""
    return Curve(method, seed, (Point(0.3, 0.0), Point(0.3 + slope * longest, longest)))


CURVES = [
    straight("A", 0, 0.02),
    straight("A", 1, 0.03),
    straight("B", 0, 0.04),
    straight("B", 1, 0.01, longest=4.0),
]


def test_equal_tax_gives_mean_range_and_missing_seeds():
    table = equal_tax(CURVES, [2.0, 5.0, 20.0])
    assert table.rows[0] == ["A", "0.350 (0.340 to 0.360)", "0.425 (0.400 to 0.450)", MISSING]
    assert table.rows[1] == ["B", "0.350 (0.320 to 0.380)", "– (1 of 2 seeds)", MISSING]


def test_equal_reward_reads_the_tax():
    curves = [straight("A", 0, 0.02), straight("B", 0, 0.04)]
    table = equal_reward(curves, [0.4])
    assert [row[1] for row in table.rows] == ["5.0", "2.5"]


def test_differences_are_paired_by_seed_and_in_points():
    table = differences(CURVES, "A", [2.0])
    assert list(table.rows) == [["B", "0.0 (−4.0 to +4.0)"]]


def test_numbers_have_real_minus_signs_and_no_negative_zero():
    assert number(-3.14159, 2) == "−3.14"
    assert number(-0.001, 2, sign=True) == "0.00"
    assert spread_text(Spread(1.0, 0.5, 1.5, 3), 1, 3) == "1.0 (0.5 to 1.5)"
    assert spread_text(None, 1, 3) == MISSING
    assert spread_text(Spread(1.0, 0.5, 1.5, 2), 1, 3) == "– (2 of 3 seeds)"
