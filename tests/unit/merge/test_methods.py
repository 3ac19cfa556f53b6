"""The parameters that methods take, beside the table of what methods do."""

from __future__ import annotations

import pytest

from trimtab.merge.methods import (
    FIDELITIES,
    METHODS,
    NEEDS_BASE,
    idle_in,
    parameters_of,
    required_by,
    taken_by,
)


def test_the_methods_are_those_of_the_table():
    from trimtab.ops.presets import MERGES

    assert {(method, fidelity) for method in METHODS for fidelity in FIDELITIES} == set(MERGES)
    anchored = {method for method, _ in MERGES if MERGES[method, "paper"].anchored}
    assert anchored | {"slerp", "hma"} == set(NEEDS_BASE)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_a_method(method, fidelity):
    parameters = parameters_of(method, fidelity)
    assert set(parameters) == set(taken_by(method))
    assert {name for name, parameter in parameters.items() if parameter.default is None} == set(
        required_by(method)
    )
    assert not set(idle_in(method)) & set(parameters)
    for name, parameter in parameters.items():
        assert parameter.name == name


@pytest.mark.parametrize(
    ("method", "fidelity", "normalize", "rescale"),
    [
        ("linear", "mergekit", True, None),
        ("task_arithmetic", "mergekit", False, None),
        ("ties", "mergekit", True, False),
        ("dare_linear", "mergekit", False, True),
        ("dare_ties", "mergekit", False, True),
        ("ties", "paper", True, False),
        ("dare_linear", "paper", False, True),
        ("dare_ties", "paper", True, True),
    ],
)
def test_defaults_of_a_method(method, fidelity, normalize, rescale):
    parameters = parameters_of(method, fidelity)
    assert parameters["normalize"].default is normalize
    assert (parameters["rescale"].default if rescale is not None else None) is rescale
    assert parameters["weight"].scope == ("input" if method == "linear" else "non_base")
