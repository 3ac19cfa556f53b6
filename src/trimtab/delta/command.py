"""``trimtab delta``: compute a delta, save it, and show what it is like."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.delta.record import TensorStatistics, totals
from trimtab.delta.reference_delta import ReferenceDelta
from trimtab.delta.storage import check_target


def run(
    reference: str,
    base: str | None,
    out: str,
    *,
    overwrite: bool = False,
    reference_revision: str | None = None,
    base_revision: str | None = None,
    check_tokenizers: bool = True,
    top: int = 10,
    console: Console | None = None,
) -> None:
    """Compute the delta between two models, write it to a folder, and print a table.

    Args:
        reference: folder or hub id of the fine-tuned model.
        base: folder or hub id of what it was fine-tuned from; None for an adapter's own start.
        out: folder to write to.
        overwrite: replace a delta that lies there.
        reference_revision: branch, tag or commit, for hub ids.
        base_revision: the same for the base.
        check_tokenizers: refuse tokenizers that disagree on shared token ids.
        top: how many of the largest parameters to show.
        console: where to print; default stdout.

    Raises:
        UserError: something is wrong with the models or with ``out``.
    """
    console = console or Console()
    check_target(Path(out), overwrite=overwrite)  # before the long pass, not after
    delta = ReferenceDelta.between(
        reference=reference,
        base=base,
        reference_revision=reference_revision,
        base_revision=base_revision,
        check_tokenizers=check_tokenizers,
        progress=True,
    )
    if delta.assumption is not None:
        console.print(escape(delta.assumption), soft_wrap=True)
    path = delta.save(out, overwrite=overwrite)
    console.print(_table(delta.statistics, top))
    for line in _lines(delta, path):
        console.print(line, soft_wrap=True)


def _table(statistics: dict[str, TensorStatistics], top: int) -> Table:
    """The parameters with the largest ‖τ‖, and all of them together."""
    largest = sorted(statistics.items(), key=lambda item: -item[1].norm)[:top]
    rest = len(statistics) - len(largest)
    table = Table(title="Largest parameters of τ = reference − base", show_footer=True, title_justify="left")
    whole = totals(statistics.values())
    table.add_column("parameter", "all" + (f" ({rest} more not shown)" if rest else ""), overflow="fold")
    table.add_column("entries", f"{whole.numel:,}", justify="right")
    cells = _cells(whole)
    for header, cell in zip(("‖τ‖", "‖τ‖/‖θ_r‖", "mean |τ|", "zeros"), cells, strict=True):
        table.add_column(header, cell, justify="right")
    for name, one in largest:
        table.add_row(escape(name), f"{one.numel:,}", *_cells(one))
    return table


def _cells(one: TensorStatistics) -> tuple[str, str, str, str]:
    share = f"{one.norm / one.reference_norm:.2%}" if one.reference_norm else "–"
    return f"{one.norm:.4g}", share, f"{one.mean_abs:.3g}", f"{one.zeros:.1%}"


def _lines(delta: ReferenceDelta, path: Path) -> list[str]:
    lines = [
        f"reference {delta.reference.fingerprint}  {escape(delta.reference.source)}",
        f"base      {delta.base.fingerprint}  {escape(delta.base.source)}",
        f"delta     {delta.fingerprint}  {escape(str(path))}",
    ]
    for name, rows in delta.added_rows.items():
        lines.append(f"{rows} rows of {escape(name)} are new in the reference's vocabulary: τ is 0 there")
    return lines
