"""``trimtab merge``: merge models as a configuration says, or show what that would be."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.errors import UserError
from trimtab.merge.config import load_config
from trimtab.merge.estimate import Estimate, estimated
from trimtab.merge.folder import check_inputs_apart, check_out, check_space, folder_named
from trimtab.merge.plan import Plan, make_plan
from trimtab.merge.run import run_plan
from trimtab.named_function import function_named

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(
    config: str,
    out: str,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    shard_size: str = "5GB",
    sweep: bool = False,
    densities: str | None = None,
    weights: str | None = None,
    score: str | None = None,
    console: Console | None = None,
) -> None:
    """Merge models and say where the result is.

    Args:
        config: path of the YAML file.
        out: folder to write.
        overwrite: replace a model that lies there.
        dry_run: print the plan, the size and the time it would take, and write nothing.
        shard_size: bytes of a file of weights, at most.
        sweep: merge at every point of a grid.
        densities: the grid's densities, divided by commas.
        weights: what the grid multiplies weights by, divided by commas.
        score: ``module:function``, called with each model's folder.
        console: where to print; default stdout.

    Raises:
        UserError: something is wrong with the configuration, the models or ``out``.
    """
    console = console or Console()
    target, limit = folder_named(out), parse_size(shard_size)
    given = {"--densities": densities, "--weights": weights, "--score": score}
    if sweep:
        if dry_run:
            raise UserError("--dry-run shows one merge; give it without --sweep")
        _sweep(config, target, densities, weights, score, overwrite, limit, console)
        return
    alone = [name for name, value in given.items() if value is not None]
    if alone:
        raise UserError(f"{alone[0]} belongs to --sweep; give that too")
    check_out(target, overwrite=overwrite)
    plan = make_plan(load_config(config))
    for note in plan.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if dry_run:
        check_inputs_apart(target, plan)
        check_space(target, plan.size)
        show(plan, estimated(plan), console)
        return
    path = run_plan(plan, target, overwrite=overwrite, shard_size=limit, progress=True)
    written = f"{plan.size / 1e9:.3f} GB in {len(plan.outputs)} tensors"
    console.print(f"{written}: {escape(str(path))}", soft_wrap=True)


def _sweep(
    config: str,
    out: Path,
    densities: str | None,
    weights: str | None,
    score: str | None,
    overwrite: bool,
    shard_size: int,
    console: Console,
) -> None:
    from trimtab.merge import sweep

    result = sweep.sweep(
        config,
        out,
        densities=None if densities is None else parse_numbers("--densities", densities),
        weights=sweep.WEIGHTS if weights is None else parse_numbers("--weights", weights),
        score=None if score is None else function_named(score, "--score"),
        overwrite=overwrite,
        shard_size=shard_size,
        progress=True,
    )
    table = Table(title=f"{result['method']}, fidelity {result['fidelity']}", title_justify="left")
    for column in ("density", "weight", *(["score"] if score else [])):
        table.add_column(column, justify="right")
    for point in result["points"]:
        values = [point["density"], point["weight"], *([point["score"]] if score else [])]
        table.add_row(*("–" if value is None else f"{value:g}" for value in values))
    console.print(table)
    kept = f"the best, {result['best']}" if score else f"{len(result['points'])} models"
    console.print(f"{kept}: {escape(str(out))}", soft_wrap=True)


def parse_numbers(option: str, text: str) -> list[float]:
    """Read numbers that are divided by commas.

    Raises:
        UserError: one is none.

    Examples:
        >>> parse_numbers("--weights", "0.2, 1")
        [0.2, 1.0]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} is no list of numbers; write them as 0.2,0.5,0.8") from None


def parse_size(text: str) -> int:
    """Read a number of bytes, such as ``5GB``, ``500MB`` or ``2GiB``.

    Raises:
        UserError: it is none, or none above 0.

    Examples:
        >>> parse_size("5GB"), parse_size("1.5 GiB")
        (5000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"--shard-size {text!r} is no size; write a number of bytes such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show(plan: Plan, estimate: Estimate, console: Console) -> None:
    """Print what a merge would read, do and write."""
    config = plan.config
    title = f"{config.method}, fidelity {config.fidelity}: {plan.preset.source}"
    table = Table(title=title, title_justify="left")
    for column in ("model", "role"):
        table.add_column(column, overflow="fold")
    for column in ("tensors", "weight", "density"):
        table.add_column(column, justify="right")
    for place, model in enumerate(plan.inputs):
        parts = [part for output in plan.outputs for part in output.parts if part.origin.model == place]
        bases = sum(output.base is not None and output.base.model == place for output in plan.outputs)
        role = "base" if bases else "merged" if parts else "tokenizer"
        table.add_row(
            escape(model.label),
            role,
            str(bases or len(parts)),
            _range([part.weight for part in parts]),
            _range([part.rate for part in parts]),
        )
    console.print(table)
    dtypes = ", ".join(sorted({str(one.entry.dtype).removeprefix("torch.") for one in plan.outputs}))
    console.print(f"reads   {plan.reading / 1e9:.3f} GB")
    console.print(f"writes  {plan.size / 1e9:.3f} GB in {len(plan.outputs)} tensors ({dtypes})")
    console.print(
        f"takes   about {estimate.seconds:.0f} s on this machine ({estimate.rate / 1e6:.0f} million entries "
        "a second, measured on a sample; files that are not cached have to be read besides)",
        soft_wrap=True,
    )


def _range(values: list[float]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
