"""A real 135M model merged with a fine-tuned copy of itself, by every method, still answers a question."""

import pytest
import yaml

from tests.slow.test_smollm2 import greedy, published, reference, trimtab  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WEIGHTED = {"weight": 0.7, "density": 0.5}
METHODS = {
    "linear": ({"weight": 0.5}, {}),
    "task_arithmetic": ({"weight": 0.7}, {}),
    "ties": (WEIGHTED, {}),
    "dare_linear": (WEIGHTED, {}),
    "dare_ties": (WEIGHTED, {}),
    "slerp": ({}, {"t": [0.3, 0.7]}),
    "hma": ({}, {"ratio": [0.3, 0.6, 0.9]}),
}


@pytest.mark.parametrize("fidelity", ["paper", "mergekit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_answers(method, fidelity, published, reference, tmp_path):  # noqa: F811
    own, shared = METHODS[method]
    values = {"merge_method": method, "fidelity": fidelity, "parameters": shared}
    models = [str(published), str(reference)]
    if method == "linear":
        values["models"] = [{"model": model, "parameters": own} for model in models]
    else:
        values |= {"base_model": models[0], "models": [{"model": models[1], "parameters": own}]}
    config = tmp_path / "merge.yaml"
    config.write_text(yaml.safe_dump(values))
    trimtab("merge", config, tmp_path / "merged")
    assert "5" in greedy(tmp_path / "merged", "What is 2 + 3?")
