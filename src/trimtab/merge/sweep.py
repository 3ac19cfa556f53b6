"""A grid of densities and weights in one pass over the inputs; each point a model, or the best one kept."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from trimtab.delta.checkpoint import read_json
from trimtab.errors import UserError
from trimtab.files import write_json
from trimtab.merge.config import MergeConfig, load_config
from trimtab.merge.folder import check_inputs_apart, check_out, check_place, folder_named, growing
from trimtab.merge.methods import taken_by
from trimtab.merge.plan import Plan, make_plan
from trimtab.merge.run import SHARD_SIZE, check_plan, write_models
from trimtab.merge.writer import sharded

DENSITIES = (0.2, 0.5, 0.8)
WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""The grid where none is given: three densities by five weights."""

RESULT = "sweep.json"

Score = Callable[[Path], float]
"""What a model is worth, given its folder; more is better."""


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Args:
        density: of every model; None where the method drops nothing.
        weight: what every model's weight is multiplied by.
    """

    density: float | None
    weight: float

    @property
    def name(self) -> str:
        """The name of its folder.

        Examples:
            >>> Point(0.5, 0.2).name, Point(None, 1.0).name
            ('density-0.5-weight-0.2', 'weight-1')
        """
        weight = f"weight-{self.weight:g}"
        return weight if self.density is None else f"density-{self.density:g}-{weight}"


def sweep(
    config: MergeConfig | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    densities: Sequence[float] | None = None,
    weights: Sequence[float] = WEIGHTS,
    score: Score | None = None,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
) -> dict[str, Any]:
    """Merge at every point of a grid, reading the inputs and selecting in them once.

    A point's density takes the place of every model's; its weight multiplies every model's weight. Without
    ``score`` OUT gets a folder for each point. With it, each model is scored, and OUT becomes the best one
    (of equals, the first); the grid, and the scores, are in ``sweep.json``.

    Args:
        config: a configuration of a method that adds deltas to a base, or the path of its YAML file.
        out: the folder to write.
        densities: those of the grid; default :data:`DENSITIES` where the method has densities.
        weights: those of the grid.
        score: called with each model's folder.
        overwrite: replace what is there.
        shard_size: as for :func:`trimtab.merge.merge`.
        progress: as for :func:`trimtab.merge.merge`.

    Returns:
        What ``sweep.json`` holds: the points, their scores, and the best one's name.

    Raises:
        UserError: as for :func:`trimtab.merge.merge`, or the grid or a score is unusable.
    """
    target = folder_named(out)
    _check_target(target, overwrite=overwrite)
    asked = config if isinstance(config, MergeConfig) else load_config(config)
    points = grid(asked, densities, weights)
    plan = make_plan(asked)
    check_inputs_apart(target, plan)
    check_plan(plan, target, copies=len(points))
    shards = sharded([output.entry for output in plan.outputs], shard_size)
    with growing(target, "sweep", (), partial(_check_target, target, overwrite=overwrite)) as folder:
        grown = folder / "points" if score else folder
        folders = {point.name: grown / point.name for point in points}
        for one in folders.values():
            one.mkdir(parents=True)
        plans = [at_point(plan, point) for point in points]
        write_models(plans, folders, shards, progress=progress)
        scores = {name: _scored(score, one) for name, one in folders.items()} if score else {}
        result = _result(asked, points, scores)
        if scores:
            _keep(folders[result["best"]], folder, grown)
        write_json(folder / RESULT, result)
    return result


def grid(config: MergeConfig, densities: Sequence[float] | None, weights: Sequence[float]) -> list[Point]:
    """The points, densities outside.

    Raises:
        UserError: the method cannot be swept, or a value is out of range or given twice.

    Examples:
        >>> from trimtab.merge.config import read_config
        >>> models = [{"model": "org/chat", "parameters": {"weight": 1.0}}]
        >>> config = read_config({"merge_method": "ties", "base_model": "org/base", "models": models})
        >>> [point.name for point in grid(config, [0.5], [0.5, 1.0])]
        ['density-0.5-weight-0.5', 'density-0.5-weight-1']
    """
    known = taken_by(config.method)
    if "weight" not in known or config.method == "linear":
        raise UserError(
            f"a sweep varies the weights of deltas, and {config.method} has none; sweep task_arithmetic, "
            "ties, dare_linear or dare_ties"
        )
    if "density" not in known and densities is not None:
        raise UserError(f"{config.method} drops nothing, so it has no density to sweep; give weights alone")
    shares: Sequence[float | None] = (densities or DENSITIES) if "density" in known else (None,)
    for what, values, most in (
        ("density", [s for s in shares if s is not None], 1.0),
        ("weight", weights, 1e6),
    ):
        for value in values:
            if not 0 < value <= most:
                raise UserError(f"a sweep's {what} must be above 0 and at most {most:g}, got {value:g}")
        if len({f"{value:g}" for value in values}) < len(values):
            raise UserError(f"a sweep's {what} is given twice: {', '.join(f'{v:g}' for v in values)}")
    if not weights:
        raise UserError("a sweep needs at least one weight")
    return [Point(share, weight) for share, weight in product(shares, weights)]


def at_point(plan: Plan, point: Point) -> Plan:
    """The plan with a point's density and weights."""
    outputs = tuple(
        output
        if output.base is None  # the base's own tensor, where no other model has it
        else replace(
            output,
            parts=tuple(
                replace(
                    part,
                    weight=part.weight * point.weight,
                    rate=part.rate if point.density is None else point.density,
                )
                for part in output.parts
            ),
        )
        for output in plan.outputs
    )
    density = "" if point.density is None else f"density {point.density:g}, "
    comment = f"# A point of a sweep: {density}every weight × {point.weight:g}.\n"
    return replace(plan, outputs=outputs, config=replace(plan.config, text=comment + plan.config.text))


def _check_target(out: Path, *, overwrite: bool) -> None:
    check_place(out)
    if not (overwrite and (out / RESULT).is_file()):
        check_out(out, overwrite=overwrite)
        return
    points = {str(point["name"]) for point in read_json(out / RESULT).get("points", [])}
    others = [path.name for path in out.iterdir() if path.is_dir() and path.name not in points]
    if others:
        raise UserError(f"{out} holds more than a sweep ({others[0]}), so --overwrite does not replace it")


def _scored(score: Score, folder: Path) -> float:
    given = score(folder)
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"the score of {folder.name} is {given!r}; a score has to be a finite number, and more is better"
        )
    return value


def _result(config: MergeConfig, points: Sequence[Point], scores: Mapping[str, float]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "method": config.method,
        "fidelity": config.fidelity,
        "points": [
            {"name": point.name, "density": point.density, "weight": point.weight}
            | ({"score": scores[point.name]} if scores else {})
            for point in points
        ],
    }
    if scores:
        found["best"] = max(scores, key=scores.__getitem__)
    return found


def _keep(best: Path, folder: Path, grown: Path) -> None:
    """Move the best model's files up, and remove the others."""
    for file in best.iterdir():
        os.replace(file, folder / file.name)
    shutil.rmtree(grown)
