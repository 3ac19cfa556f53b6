"""Tables as plain data, and the tables that compare curves of reward and tax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.report.curves import Curve, Spread, by_method, paired, rewards_at_tax, taxes_at_reward

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Column heads; the first column is left-aligned, the others right-aligned.
        rows: Cells, one list per row, as long as ``columns``.
        note: A sentence under the table, or "".
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def spread_text(spread: Spread | None, decimals: int, seeds: int, sign: bool = False) -> str:
    """Return ``mean (low to high)``; no mean where seeds are missing, for it could not be compared.

    Example:
        >>> spread_text(Spread(0.42, 0.401, 0.44, 3), decimals=2, seeds=3)
        '0.42 (0.40 to 0.44)'
        >>> spread_text(Spread(0.42, 0.401, 0.44, 2), decimals=2, seeds=3)
        '– (2 of 3 seeds)'
    """
    if spread is None:
        return MISSING
    if spread.count < seeds:
        return f"{MISSING} ({spread.count} of {seeds} seeds)"
    mean, low, high = (number(value, decimals, sign) for value in (spread.mean, spread.low, spread.high))
    return f"{mean} ({low} to {high})" if seeds > 1 else mean


def number(value: float, decimals: int, sign: bool = False) -> str:
    """Format a number with a real minus sign; ``sign`` asks for a plus as well. Negative zero is zero.

    Example:
        >>> number(-1.25, 1), number(0.5, 1, sign=True), number(-0.01, 1)
        ('−1.2', '+0.5', '0.0')
    """
    value = round(value, decimals) + 0.0
    text = f"{value:+.{decimals}f}" if sign and value else f"{value:.{decimals}f}"
    return text.replace("-", "−")


def equal_tax(curves: Sequence[Curve], taxes: Sequence[float]) -> Table:
    """Tabulate the reward each method has where it first pays a given tax: mean and range over seeds."""
    return _levels(
        curves,
        taxes,
        rewards_at_tax,
        title="Reward at equal tax",
        head=lambda level: f"at a tax of {level:g}",
        decimals=3,
        note="Higher is better. Interpolated between measured models; – where not every seed pays that much.",
    )


def equal_reward(curves: Sequence[Curve], rewards: Sequence[float]) -> Table:
    """Tabulate the tax each method pays where it first reaches a given reward: mean and range over seeds."""
    return _levels(
        curves,
        rewards,
        taxes_at_reward,
        title="Tax at equal reward",
        head=lambda level: f"at a reward of {level:.2f}",
        decimals=1,
        note="In points of capability; lower is better. – where not every seed gets there.",
    )


def differences(curves: Sequence[Curve], baseline: str, taxes: Sequence[float]) -> Table:
    """Tabulate the paired difference in reward to ``baseline`` at equal tax, in points (hundredths)."""
    groups = by_method(curves)
    seeds = len({curve.seed for curve in curves})
    rows = []
    for method, own in groups.items():
        if method == baseline:
            continue
        cells = [method]
        for tax in taxes:
            gaps = paired(rewards_at_tax(own, tax), rewards_at_tax(groups[baseline], tax))
            cells.append(spread_text(Spread.of(100 * gap for gap in gaps.values()), 1, seeds, sign=True))
        rows.append(cells)
    return Table(
        f"Difference in reward to {baseline} at equal tax, same seed against same seed",
        ["method", *(f"at a tax of {tax:g}" for tax in taxes)],
        rows,
        "In points (hundredths of reward): mean, and the lowest and highest seed.",
    )


def _levels(
    curves: Sequence[Curve],
    levels: Sequence[float],
    read: Callable[[Sequence[Curve], float], dict[int, float]],
    *,
    title: str,
    head: Callable[[float], str],
    decimals: int,
    note: str,
) -> Table:
    groups, seeds = by_method(curves), len({curve.seed for curve in curves})
    rows = [
        [method, *(spread_text(Spread.of(read(own, level).values()), decimals, seeds) for level in levels)]
        for method, own in groups.items()
    ]
    return Table(title, ["method", *map(head, levels)], rows, note)
