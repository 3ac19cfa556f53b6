"""A grid in one pass: every point is the merge it stands for; what is scored, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.merge import made
from trimtab.errors import UserError
from trimtab.merge import run
from trimtab.merge.config import read_config
from trimtab.merge.sweep import DENSITIES, WEIGHTS, Point, grid, sweep

SHAPES = {"a.weight": (7, 9), "b.weight": (30,), "model.layers.0.c": (5, 4)}
SWEPT = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and two models that differ from it."""
    base = made.random_tensors(SHAPES, 0)
    folder = made.folder(tmp_path / "base", base)
    return folder, [made.folder(tmp_path / str(i), made.moved(base, i)) for i in (1, 2)]


def values(method: str, models: tuple[Path, list[Path]], **top: Any) -> dict[str, Any]:
    return made.values_of(method, models[0], models[1], [{"weight": 0.7}, {"weight": -0.4}], **top)


@pytest.mark.parametrize("fidelity", ["paper", "mergekit"])
@pytest.mark.parametrize("method", SWEPT)
def test_each_point_is_the_merge_it_stands_for(
    method: str, fidelity: str, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    asked = values(method, models, fidelity=fidelity)
    densities = None if method == "task_arithmetic" else [0.3, 0.8]
    result = sweep(read_config(asked), tmp_path / "grid", densities=densities, weights=[0.5, 2.0])
    assert len(result["points"]) == (2 if densities is None else 4)
    for point in result["points"]:
        alone = json.loads(json.dumps(asked))
        for model in alone["models"]:
            model["parameters"]["weight"] *= point["weight"]
            if point["density"] is not None:
                model["parameters"]["density"] = point["density"]
        expected = made.merged(tmp_path / f"alone-{point['name']}", alone)
        found = made.weights(tmp_path / "grid" / point["name"])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), point
        text = (tmp_path / "grid" / point["name"] / "merge.yaml").read_text()
        assert text.startswith("# A point of a sweep: ")


def test_the_grid_is_three_by_five_where_none_is_given(models: tuple[Path, list[Path]]) -> None:
    points = grid(read_config(values("ties", models)), None, WEIGHTS)
    assert len(points) == len(DENSITIES) * len(WEIGHTS) == 15
    assert points[0] == Point(DENSITIES[0], WEIGHTS[0])
    assert points[1].density == points[0].density


def test_the_inputs_are_selected_in_once(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    decided = run.decided

    def counted(tasks: Any, found: Any = None) -> Any:
        asked.append(len(tasks))
        return decided(tasks, found)

    monkeypatch.setattr(run, "decided", counted)
    sweep(read_config(values("ties", models)), tmp_path / "grid")
    assert asked == [15] * len(SHAPES), "each tensor is decided once, for all fifteen points"


def test_the_best_one_is_kept(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    seen: list[str] = []

    def score(folder: Path) -> float:
        seen.append(folder.name)
        assert (folder / "config.json").is_file()
        return -abs(float(made.weights(folder)["b.weight"].norm()) - 3.0)

    asked = read_config(values("dare_linear", models))
    result = sweep(asked, tmp_path / "best", densities=[0.5, 1.0], weights=[0.5, 1.0], score=score)
    scores = {point["name"]: point["score"] for point in result["points"]}
    assert seen == list(scores)
    assert result["best"] == max(scores, key=scores.__getitem__)
    assert json.loads((tmp_path / "best" / "sweep.json").read_text()) == result
    files = {file.name for file in (tmp_path / "best").iterdir()}
    assert files == {"README.md", "config.json", "merge.yaml", "model.safetensors", "sweep.json"}
    assert -abs(float(made.weights(tmp_path / "best")["b.weight"].norm()) - 3.0) == max(scores.values())


def test_of_equal_scores_the_first_is_kept(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    result = sweep(read_config(values("ties", models)), tmp_path / "out", score=lambda folder: 1.0)
    assert result["best"] == result["points"][0]["name"]


@pytest.mark.parametrize("given", [float("nan"), float("inf"), None, "many"])
def test_a_score_that_is_no_number_leaves_nothing(
    given: Any, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(
        UserError, match=rf"score of density-0\.2-weight-0\.2 is {given!r}; a score has to be"
    ):
        sweep(read_config(values("ties", models)), tmp_path / "out", score=lambda folder: given)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_earlier_sweep_is_replaced_only_when_asked(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    asked = read_config(values("ties", models))
    sweep(asked, tmp_path / "out", densities=[0.5], weights=[1.0])
    with pytest.raises(UserError, match="is there already"):
        sweep(asked, tmp_path / "out", densities=[0.5], weights=[1.0])
    sweep(asked, tmp_path / "out", densities=[0.25], weights=[1.0], overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"density-0.25-weight-1", "sweep.json"}


REFUSED = [
    ("linear", {}, "linear has none"),
    ("task_arithmetic", {"densities": [0.5]}, "task_arithmetic drops nothing"),
    ("ties", {"densities": [0.0]}, "density must be above 0 and at most 1, got 0"),
    ("ties", {"densities": [1.5]}, "density must be above 0 and at most 1, got 1.5"),
    ("ties", {"weights": [-1.0]}, "weight must be above 0"),
    ("ties", {"weights": [float("nan")]}, "weight must be above 0"),
    ("ties", {"weights": [0.5, 0.5]}, "weight is given twice: 0.5, 0.5"),
    ("ties", {"weights": []}, "at least one weight"),
]


@pytest.mark.parametrize(("method", "options", "sentence"), REFUSED)
def test_what_is_refused(
    method: str, options: dict[str, Any], sentence: str, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    asked = values(method, models)
    if method == "linear":
        del asked["base_model"]
    with pytest.raises(UserError, match=sentence):
        sweep(read_config(asked), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_sweep_does_not_replace_what_it_reads(models: tuple[Path, list[Path]]) -> None:
    for place in (models[0], models[1][0]):
        with pytest.raises(UserError, match="is, or holds, the model"):
            sweep(read_config(values("ties", models)), place, overwrite=True)
        assert (place / "model.safetensors").is_file()


def test_a_sweep_keeps_the_bases_own_tensors(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base = made.weights(models[0])
    made.folder(models[0], {**base, "own": torch.ones(4)})
    asked = read_config(values("task_arithmetic", models, allow_partial=True))
    sweep(asked, tmp_path / "grid", weights=[0.2])
    assert made.weights(tmp_path / "grid" / "weight-0.2")["own"].tolist() == [1.0] * 4


def test_an_interrupted_sweep_leaves_nothing_behind(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where files of its points are complete: a sweep begins anew, so none is said to be kept."""
    write, written = run.Runner.write, []

    def interrupted(runner: run.Runner, *given: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(write(runner, *given))

    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(run.Runner, "write", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            sweep(read_config(values("ties", models)), tmp_path / "grid", shard_size=100)
    assert written
    assert not getattr(caught.value, "__notes__", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_more_than_a_sweep_is_not_replaced(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    asked = read_config(values("ties", models))
    sweep(asked, tmp_path / "out", densities=[0.5], weights=[1.0])
    (tmp_path / "out" / "mine").mkdir()
    with pytest.raises(UserError, match=r"holds more than a sweep \(mine\)"):
        sweep(asked, tmp_path / "out", densities=[0.5], weights=[1.0], overwrite=True)
