"""`trimtab quickstart`: the whole story on a tiny model, measured afresh, told as the numbers tell it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import trimtab
from trimtab.errors import UserError
from trimtab.files import write_json, write_text
from trimtab.lab import checkpoints, story
from trimtab.lab.measure import Score, measure, reward_tasks
from trimtab.lab.methods import ADAMW, TRAINED, Plan, RunResult, answer_texts
from trimtab.lab.workers import Job, run_jobs
from trimtab.lab.world import Task
from trimtab.report.curves import Curve, Point
from trimtab.report.pictures import standalone

REPORT, RESULTS, PICTURE = "report.html", "results.json", "reward-tax.svg"
WIDEST = 100
OURS = frozenset((REPORT, RESULTS, PICTURE))


def run(
    out: str | Path = "quickstart",
    seeds: Sequence[int] | None = None,
    *,
    overwrite: bool = False,
    plan: Plan | None = None,
    workers: int = 2,
    console: Console | None = None,
) -> dict[str, Any]:
    """Tune the tiny model with every method, measure reward and tax, print the result and write a report.

    Args: out: Folder for ``report.html``, ``results.json`` and ``reward-tax.svg``. An earlier quickstart in
        it is
            replaced; other files in it are a mistake unless ``overwrite``, and are left alone in any case.
        seeds: Which of the shipped models, all three by default.
        overwrite: Write into a folder that holds other files.
        plan: Settings, see :class:`Plan`.
        workers: Worker processes of one thread each; 1 works in this process.
        console: Where to print; standard output by default.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: an unknown seed, or a folder that cannot be written to.

    Example:
        >>> from trimtab.lab import quickstart
        >>> # quickstart.run("quickstart")  # about two minutes; the same as `trimtab quickstart`
    """
    plan, console = plan or Plan(), console or Console()
    seeds = _checked_seeds(seeds)
    folder = _checked_folder(Path(out), overwrite)
    began = time.perf_counter()
    console.width = min(console.width, WIDEST)
    console.print(story.opening_words(plan, seeds))
    examples = example_tasks()
    with console.status("measuring the SFT models"):
        references, answers = reference_scores(seeds, examples)
    # The AdamW runs carry the riders, so they are the longest: first.
    others = [(method, seed) for seed in seeds for method in TRAINED if method != ADAMW]
    order = [*((ADAMW, seed) for seed in seeds), *others]
    jobs = [Job(method, seed, plan, examples) for method, seed in order]
    runs = run_jobs(jobs, console, workers)
    results = collect(runs, references, answers, examples, plan, seconds=time.perf_counter() - began)
    curves = curves_of(results)
    told = story.tell(results, curves, plan, console.width)
    write_json(folder / RESULTS, results)
    write_text(folder / PICTURE, standalone(told.picture))
    write_text(folder / REPORT, told.page)
    console.print(told.terminal)
    console.print(
        f"The whole report: [bold]{folder / REPORT}[/bold]  (numbers: {folder / RESULTS})", soft_wrap=True
    )
    return results


def _checked_seeds(seeds: Sequence[int] | None) -> tuple[int, ...]:
    seeds = tuple(dict.fromkeys(checkpoints.SEEDS if seeds is None else seeds))
    for seed in seeds:
        if seed not in checkpoints.SEEDS:
            raise UserError(
                f"there is no shipped model for seed {seed}; choose from "
                f"{', '.join(map(str, checkpoints.SEEDS))}"
            )
    if not seeds:
        raise UserError("no seed was given; choose from " + ", ".join(map(str, checkpoints.SEEDS)))
    return seeds


def _checked_folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but the report needs a folder there; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another --out"
        ) from error
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in OURS)
    if foreign and not overwrite:
        raise UserError(
            f"{folder} holds other files ({', '.join(foreign[:3])}{', …' * (len(foreign) > 3)}); "
            "choose another --out, or pass --overwrite to write the report beside them"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} is not writable; choose another --out")
    return folder


def example_tasks() -> tuple[Task, ...]:
    """Return the questions whose answers the report shows: a reversal, a talk and a forbidden one."""
    tasks = reward_tasks()
    return (
        next(task for task in tasks if task.command == "rev" and not task.forbidden),
        next(task for task in tasks if task.command == "talk"),
        next(task for task in tasks if task.forbidden),
    )


def reference_scores(seeds: Sequence[int], examples: Sequence[Task]) -> tuple[dict[int, Score], list[str]]:
    """Measure the SFT models afresh; return their scores and the first seed's answers to the examples."""
    scores, answers = {}, []
    for seed in seeds:
        model = checkpoints.load(seed, "sft")
        scores[seed] = measure(model)
        if seed == seeds[0]:
            answers = answer_texts(model, examples)
    return scores, answers


def collect(
    runs: Sequence[RunResult],
    references: dict[int, Score],
    reference_answers: Sequence[str],
    examples: Sequence[Task],
    plan: Plan,
    seconds: float,
) -> dict[str, Any]:
    """Return everything that was measured, ready for JSON."""
    points = [
        {
            "method": point.method,
            "seed": point.seed,
            "label": point.label,
            "tax": round(point.score.tax(references[point.seed]), 4),
            **checkpoints.score_record(point.score),
        }
        for run in runs
        for point in run.points
    ]
    first = next(iter(references))
    answers = {name: texts for run in runs if run.seed == first for name, texts in run.answers.items()}
    return {
        "trimtab": trimtab.__version__,
        "environment": checkpoints.environment(),
        "plan": asdict(plan),
        "references": {str(seed): checkpoints.score_record(score) for seed, score in references.items()},
        "points": points,
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "drift": plan.drift(run.method),
                "delta_arrived": run.arrived,
                "cpu_seconds": round(run.cpu_seconds, 2),
                "step_ms": round(1000 * run.step_seconds, 2),
            }
            for run in runs
        ],
        "examples": {
            "seed": first,
            "questions": [" ".join(task.words) for task in examples],
            "answers": {"SFT": list(reference_answers), **answers},
        },
        "wall_seconds": round(seconds, 1),
    }


def curves_of(results: dict[str, Any]) -> list[Curve]:
    """Return the measured points as curves, each beginning at its seed's reference."""
    grouped: dict[tuple[str, int], list[Point]] = {}
    for point in results["points"]:
        start = [Point(results["references"][str(point["seed"])]["reward"], 0.0, "reference")]
        grouped.setdefault((point["method"], point["seed"]), start).append(
            Point(point["reward"], point["tax"], point["label"])
        )
    order = {method: place for place, method in enumerate(story.ORDER)}
    keys = sorted(grouped, key=lambda key: (order[key[0]], key[1]))
    return [Curve(method, seed, tuple(grouped[method, seed])) for method, seed in keys]
