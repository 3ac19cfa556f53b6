"""Tables and a small picture for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from trimtab.report.curves import Point
from trimtab.report.tables import Table

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800


@dataclass(frozen=True)
class Line:
    """A curve to be drawn: its points in order, a name, a rich colour and a one-letter marker."""

    name: str
    points: Sequence[Point]
    colour: str
    marker: str


def rich_table(table: Table) -> RichTable:
    """Return a table for rich; what stands in brackets goes on a line of its own, to keep columns narrow."""
    out = RichTable(
        title=table.title,
        title_style="bold",
        title_justify="left",
        caption=table.note or None,
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for place, column in enumerate(table.columns):
        out.add_column(column, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for first, *cells in table.rows:
        out.add_row(Text(first), *map(_stacked, cells))
    return out


def _stacked(cell: str) -> Text:
    mean, bracket, rest = cell.partition(" (")
    return Text.assemble(mean, ("\n" + rest.removesuffix(")"), "dim")) if bracket else Text(mean)


class Canvas:
    """A drawing of braille dots, two by four per character, with letters on top."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._dots = [[0] * width for _ in range(height)]
        self._letters = [[""] * width for _ in range(height)]
        self._colours = [[""] * width for _ in range(height)]

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """Draw a straight line between two places; x and y run from 0 to 1, y upwards."""
        columns, rows = 2 * self.width - 1, 4 * self.height - 1
        steps = max(1, round(max(abs(x1 - x0) * columns, abs(y1 - y0) * rows)))
        for i in range(steps + 1):
            x = round((x0 + (x1 - x0) * i / steps) * columns)
            y = rows - round((y0 + (y1 - y0) * i / steps) * rows)
            if 0 <= x <= columns and 0 <= y <= rows:
                self._dots[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
                self._colours[y // 4][x // 2] = colour

    def letter(self, x: float, y: float, letter: str, colour: str) -> None:
        """Put a letter at a place; letters cover dots, later letters cover earlier ones."""
        column, row = round(x * (self.width - 1)), self.height - 1 - round(y * (self.height - 1))
        if 0 <= column < self.width and 0 <= row < self.height:
            self._letters[row][column] = letter
            self._colours[row][column] = colour

    def rows(self) -> list[Text]:
        """Return the drawing line by line."""
        lines = []
        for dots, letters, colours in zip(self._dots, self._letters, self._colours, strict=True):
            text = Text()
            for dot, letter, colour in zip(dots, letters, colours, strict=True):
                text.append(letter or chr(_BLANK + dot), style=f"bold {colour}" if letter else colour)
            lines.append(text)
        return lines


def reward_tax_picture(lines: Sequence[Line], width: int = 68, height: int = 16) -> Group:
    """Draw reward (up) against tax (to the right); letters mark measured models."""
    points = [point for line in lines for point in line.points]
    low_x, high_x = min(0.0, *(p.tax for p in points)), max(p.tax for p in points) or 1.0
    low_y, high_y = _padded(min(p.reward for p in points), max(p.reward for p in points))
    canvas = Canvas(width, height)

    def place(point: Point) -> tuple[float, float]:
        return (point.tax - low_x) / (high_x - low_x), (point.reward - low_y) / (high_y - low_y)

    for line in lines:
        spots = [place(point) for point in line.points]
        for (x0, y0), (x1, y1) in pairwise(spots):
            canvas.line(x0, y0, x1, y1, line.colour)
    for line in lines:
        for point in line.points[1:]:
            canvas.letter(*place(point), line.marker, line.colour)
    start = lines[0].points[0]
    canvas.letter(*place(start), "●", "default")
    return Group(*_frame(canvas, (low_x, high_x), (low_y, high_y)), Text(), _legend(lines))


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _frame(canvas: Canvas, x: tuple[float, float], y: tuple[float, float]) -> list[Text]:
    lines = [Text("reward", style="bold")]
    rows = canvas.rows()
    for i, row in enumerate(rows):
        value = y[1] - (y[1] - y[0]) * i / (len(rows) - 1)
        label = f"{value:5.2f} ┤" if i % 4 == 0 or i == len(rows) - 1 else "      │"
        lines.append(Text.assemble((label, "dim"), row))
    marks = Text(" " * 6 + "└" + "─" * canvas.width, style="dim")
    ticks = [f"{x[0] + (x[1] - x[0]) * share:.0f}" for share in (0, 0.25, 0.5, 0.75, 1)]
    labels = [" "] * (canvas.width + 12)
    for i, tick in enumerate(ticks):
        place = 7 + round(i * (canvas.width - 1) / 4) - len(tick) // 2
        labels[place : place + len(tick)] = tick
    return [*lines, marks, Text.assemble(("".join(labels).rstrip(), "dim"), ("  tax", "bold"))]


def _legend(lines: Sequence[Line]) -> Text:
    text = Text("● reference (start)")
    for line in lines:
        text.append("   ")
        text.append(f"{line.marker} {line.name}", style=line.colour)
    return text
