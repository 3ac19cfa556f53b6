import pytest

from trimtab.ops import FIDELITIES, PRESETS, Operator


def test_every_method_has_every_fidelity_and_a_source():
    assert set(PRESETS) == {(m, f) for m in ("ondare", "onties") for f in FIDELITIES}
    assert all(preset.source for preset in PRESETS.values())


def test_the_released_rows_field_by_field():
    dare, ties = PRESETS["ondare", "released"], PRESETS["onties", "released"]
    assert (dare.operator.rescale, ties.operator.rescale) == ("expected", "none")
    assert ties.operator.consensus == "sign_unweighted"
    assert ties.operator.counting == "floor"
    for row in (dare, ties):
        assert (row.redraw, row.clamp, row.decay, row.eps, row.eps_placement) == (
            False,
            1.0,
            "after",
            1e-6,
            "outside",
        )


@pytest.mark.parametrize(
    "fields",
    [{"sparsify": "topp"}, {"rescale": "l2"}, {"consensus": "vote"}, {"counting": "round"}],
)
def test_unknown_fields_are_refused(fields):
    with pytest.raises(ValueError, match="unknown"):
        Operator(**fields)


def test_expected_rescaling_of_top_is_refused():
    with pytest.raises(ValueError, match="bernoulli"):
        Operator("top", "expected")
