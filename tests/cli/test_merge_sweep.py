"""``trimtab merge --sweep`` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cli.conftest import Place, Result
from tests.cli.test_merge import config

pytestmark = pytest.mark.xdist_group("cli")

Run = Callable[..., Result]


def test_a_grid_has_a_folder_for_each_point(place: Place, trimtab: Run) -> None:
    result = trimtab("merge", config(place), "grid", "--sweep", "--densities", "0.2,1", "--weights", "0.5")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("2 models: grid\n")
    found = {path.name for path in (place.folder / "grid").iterdir()}
    assert found == {"density-0.2-weight-0.5", "density-1-weight-0.5", "sweep.json"}


def test_the_best_by_a_function_of_ones_own_is_kept(place: Place, trimtab: Run) -> None:
    (place.folder / "my_scores.py").write_text("def last(folder):\n    return float(folder.name[-1])\n")
    options = ("--sweep", "--densities", "0.5", "--weights", "0.2,0.7,0.4", "--score", "my_scores:last")
    result = trimtab("merge", config(place), "best", *options)
    assert (result.code, result.err) == (0, "")
    assert "the best, density-0.5-weight-0.7: best" in result.out
    kept = json.loads((place.folder / "best" / "sweep.json").read_text())
    assert [point["score"] for point in kept["points"]] == [2.0, 7.0, 4.0]
    assert "weight × 0.7" in (place.folder / "best" / "merge.yaml").read_text()


REFUSED = [
    (
        ("--sweep", "--densities", "0.2,x"),
        "--densities '0.2,x' is no list of numbers; write them as 0.2,0.5,0.8",
    ),
    (("--weights", "0.5"), "--weights belongs to --sweep; give that too"),
    (("--sweep", "--dry-run"), "--dry-run shows one merge; give it without --sweep"),
    (("--sweep", "--score", "nothing"), "--score 'nothing' names no function; write module:function"),
    (
        ("--sweep", "--score", "no_such:f"),
        "--score 'no_such:f' cannot be imported: No module named 'no_such'",
    ),
    (("--sweep", "--score", "os:sep"), "--score 'os:sep' is no function"),
    (("--shard-size", "big"), "--shard-size 'big' is no size; write a number of bytes such as 5GB or 500MB"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_is_refused(options: tuple[str, ...], sentence: str, place: Place, trimtab: Run) -> None:
    written = config(place)
    before = place.files()
    result = trimtab("merge", written, "out", *options)
    assert result.code == 2
    assert result.sentence == sentence
    assert place.files() == before
