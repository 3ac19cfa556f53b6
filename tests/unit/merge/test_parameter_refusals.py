"""What is refused under ``parameters``: names, places, values; at which key, in which words."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.unit.merge.configurations import changed, config_of, refusals, sliced_of

CASES: list[tuple[str, dict[str, Any], str]] = [
    # Parameters: their names
    (
        "ties",
        {"parameters.wieght": 1},
        "parameters.wieght is not a parameter of method ties; did you mean parameters.weight?",
    ),
    (
        "ties",
        {"parameters.zzz": 1},
        "parameters.zzz is not a parameter of method ties; ties takes weight, density",
    ),
    (
        "linear",
        {"parameters.density": 1},
        "parameters.density belongs to method ties, dare_linear or dare_ties; linear takes weight",
    ),
    (
        "ties",
        {"parameters.t": 1},
        "parameters.t belongs to method slerp; ties takes weight, density, normalize",
    ),
    ("slerp", {"parameters.ratio": 1}, "parameters.ratio belongs to method hma; slerp takes t"),
    (
        "hma",
        {"parameters.weight": 1},
        "parameters.weight belongs to method linear, task_arithmetic, ties, dare_",
    ),
    (
        "linear",
        {"parameters.int8_mask": True},
        "parameters.int8_mask belongs to method task_arithmetic, ties, dare_linear or dare_ties; linear",
    ),
    (
        "ties",
        {"models.0.parameters": {"gamma": 0.1}},
        "models.0.parameters.gamma belongs to mergekit's breadcrumbs and breadcrumbs_ties, not supported",
    ),
    ("ties", {"parameters": [1]}, "parameters must be a mapping, not a list"),
    # Parameters: where they stand
    (
        "ties",
        {"models.0.parameters": {"normalize": True}},
        "models.0.parameters.normalize has one value for all inputs; write it under parameters",
    ),
    (
        "ties",
        {"models.1.parameters": {"lambda": 1}},
        "models.1.parameters.lambda has one value for all inputs; write it under parameters",
    ),
    (
        "sliced",
        {"slices.1.sources.0.parameters": {"lambda": 1}},
        "slices.1.sources.0.parameters.lambda has one value for all inputs; write it under "
        "slices.1.parameters or parameters",
    ),
    (
        "slerp",
        {"parameters": {}, "models.0.parameters": {"t": 1}},
        "models.0.parameters.t has one value for all inputs; write it under parameters",
    ),
    ("slerp", {"parameters": {}}, "parameters.t is missing: method slerp needs it; give it here"),
    ("hma", {"parameters": ...}, "parameters.ratio is missing: method hma needs it; give it here"),
    (
        "ties",
        {"parameters": {}},
        "models.0.parameters.weight is missing: method ties needs it for each model; give it here or under",
    ),
    (
        "linear",
        {"parameters": {}, "models.0.parameters": {"weight": 1}},
        "models.1.parameters.weight is missing: method linear needs it for each model",
    ),
    (
        "linear",
        {
            "parameters": {},
            "base_model": "org/c",
            "models": [{"model": "org/a", "parameters": {"weight": 1}}],
        },
        "base_model 'org/c' is an input of method linear as well, and has no weight; list it under models "
        "with its weight, or leave it out",
    ),
    # Parameters: their values
    ("ties", {"parameters.weight": "yes"}, "parameters.weight must be a number, not 'yes'"),
    ("ties", {"parameters.weight": True}, "parameters.weight must be a number, not true"),
    ("ties", {"parameters.weight": None}, "parameters.weight must be a number, not null"),
    ("ties", {"parameters.weight": float("inf")}, "parameters.weight must be a finite number, not inf"),
    ("ties", {"parameters.weight": ".nan"}, "parameters.weight must be a number, not '.nan'"),
    ("ties", {"parameters.weight": []}, "parameters.weight must not be empty"),
    ("ties", {"parameters.weight": [1, "x"]}, "parameters.weight.1 must be a number, not 'x'"),
    ("ties", {"parameters.weight": [[1]]}, "parameters.weight.0 must be a number, not a list"),
    ("ties", {"parameters.density": 1.5}, "parameters.density must be at most 1, not 1.5"),
    ("ties", {"parameters.density": [0, "-1e-1"]}, "parameters.density.1 must be at least 0, not '-1e-1'"),
    ("slerp", {"parameters.t": 2}, "parameters.t must be at most 1, not 2"),
    ("hma", {"parameters.ratio": [0, 1, 1.1]}, "parameters.ratio.2 must be at most 1, not 1.1"),
    ("ties", {"parameters.normalize": "yes"}, "parameters.normalize must be true or false, not 'yes'"),
    ("ties", {"parameters.normalize": 2}, "parameters.normalize must be true or false, not 2"),
    ("ties", {"parameters.int8_mask": "x"}, "parameters.int8_mask must be true or false, not 'x'"),
    ("task_arithmetic", {"parameters.density": 2}, "parameters.density must be at most 1, not 2"),
    # Parameters: conditions
    (
        "ties",
        {"parameters.weight": [{"filter": "a", "value": 1}, 2]},
        "parameters.weight.1 must be a mapping with value and filter, as its neighbours are, not 2",
    ),
    (
        "ties",
        {"parameters.weight": [{"filter": 3, "value": 1}]},
        "parameters.weight.0.filter must be text that a tensor's name holds, or '*' for all, not 3",
    ),
    (
        "ties",
        {"parameters.weight": [{"filter": "", "value": 1}]},
        "parameters.weight.0.filter must be text that",
    ),
    ("ties", {"parameters.weight": [{"filter": "a"}]}, "parameters.weight.0.value is missing"),
    ("ties", {"parameters.weight": {"value": []}}, "parameters.weight.value must not be empty"),
    ("ties", {"parameters.weight": {"value": "x"}}, "parameters.weight.value must be a number, not 'x'"),
    (
        "ties",
        {"parameters.weight": [{"value": 1, "filtr": "a"}]},
        "parameters.weight.0.filtr is not a key of a condition; known here: filter, value",
    ),
]


@pytest.mark.parametrize(("start", "changes", "message"), CASES, ids=[case[2][:60] for case in CASES])
def test_refused(start, changes, message):
    values = changed(sliced_of("ties") if start == "sliced" else config_of(start), changes)
    before = copy.deepcopy(values)
    (sentence,) = refusals(values)
    assert sentence.startswith(message)
    assert repr(values) == repr(before), "what was given is left as it was"
