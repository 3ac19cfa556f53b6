"""The words follow the numbers: turn the numbers round and the words turn with them."""

import pytest

from trimtab.report.curves import Curve, Point
from trimtab.report.verdict import Question, compare, counts, findings, headline

ASKED = Question(baseline="A", repeat="A2", online=("O", "P"), simple=("E",), tax=5.0, taxes=(2.0, 5.0, 8.0))


def curves(**slopes: float | list[float]) -> list[Curve]:
    """Straight curves for three seeds; a method's slope (reward per 100 points of tax) may differ by seed."""
    made = []
    for method, slope in ({"A": 2.0, "A2": 2.01, "O": 2.0, "P": 2.0, "E": 2.0} | slopes).items():
        for seed in range(3):
            own = slope[seed] if isinstance(slope, list) else slope
            made.append(
                Curve(method, seed, (Point(0.3, 0.0, "reference"), Point(0.3 + own / 10, 10.0, "step 9")))
            )
    return made


def said(made: list[Curve]) -> str:
    return " ".join(headline(made, ASKED))


def test_equal_curves_show_no_difference():
    assert compare(curves(), ASKED, "O", "A", 5.0).outcome == "no clear difference"
    assert headline(curves(), ASKED) == [
        "O against A: no clear difference (0.0 to 0.0 points).",
        "P against A: no clear difference (0.0 to 0.0 points).",
        "E against O and P: no clear difference (0.0 to 0.0 points).",
        "The highest mean reward is that of A at 3 of 3 levels.",
    ]


@pytest.mark.parametrize(
    ("online", "outcome", "words"),
    [
        (2.4, "more", "O has clearly more reward than A at 3 of 3"),
        (1.6, "less", "O has clearly less reward than A at 3 of 3"),
    ],
)
def test_a_difference_all_seeds_share_is_called_by_its_sign(online, outcome, words):
    made = curves(O=online, P=online)
    assert compare(made, ASKED, "O", "A", 5.0).outcome == outcome
    assert words in said(made)
    assert f"O: clearly more reward than A at {3 if outcome == 'more' else 0}" in counts(made, ASKED)[0]


def test_one_dissenting_seed_is_enough_for_no_difference():
    assert compare(curves(O=[2.9, 2.9, 1.99]), ASKED, "O", "A", 5.0).outcome == "no clear difference"


def test_a_gap_within_the_noise_of_the_data_order_is_no_difference():
    made = curves(O=2.1, A2=[2.0, 2.0, 2.2])
    assert compare(made, ASKED, "O", "A", 5.0).outcome == "no clear difference"
    assert compare(made, ASKED, "O", "A", 5.0).noise == pytest.approx(1.0)


def test_the_simple_method_is_named_where_it_wins_and_where_it_loses():
    assert "E has clearly more reward than O and P at 3 of 3 levels" in said(curves(E=2.4))
    assert "that of E at 3 of 3" in said(curves(E=2.4))
    assert "E has clearly less reward than O and P at 3 of 3 levels" in said(curves(E=1.6))


def test_winning_against_one_of_two_is_no_win_against_both():
    assert "E against O and P: no clear difference" in said(curves(E=2.4, O=2.4))


def test_lines_that_cross_are_told_both_ways():
    bent = [Curve("O", seed, (Point(0.3, 0.0), Point(0.4, 4.0), Point(0.41, 10.0))) for seed in range(3)]
    made = [curve for curve in curves() if curve.method != "O"] + bent
    assert "O has clearly more reward than A at 2 and clearly less reward than A at 1 of 3" in said(made)


def test_one_seed_settles_nothing():
    made = [curve for curve in curves(O=3.0) if curve.seed == 0]
    assert compare(made, ASKED, "O", "A", 5.0).outcome == "not compared"
    assert any("on one seed, which settles nothing" in line for line in findings(made, ASKED))


def test_the_tax_sentence_tells_of_over_optimisation():
    late = [
        Curve(
            "A", seed, (Point(0.3, 0.0, "reference"), Point(0.5, 10.0, "step 5"), Point(0.4, 30.0, "step 9"))
        )
        for seed in range(2)
    ]
    others = [curve for curve in curves() if curve.method != "A" and curve.seed < 2]
    assert "highest earlier, 0.50 at step 5 for 10.0 points" in findings([*late, *others], ASKED)[0]


def test_taxes_nobody_pays_are_said_so():
    asked = Question("A", "A2", ("O",), ("E",), tax=50.0, taxes=(50.0,))
    said = findings(curves(), asked)
    assert said[1] == "No method pays 50 points of capability on every seed."
    assert "cannot be compared" in said[2]
