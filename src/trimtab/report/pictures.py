"""Pictures of reward against tax as SVG text, drawn with matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from trimtab.report.curves import Curve, by_method, mean_curve, rewards_at_tax

INK = "#1b2430"
_FAINT = "#8a94a3"
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trimtab",
    "font.family": ["sans-serif"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn."""

    colour: str
    marker: str = "o"
    dashed: bool = False


def trade_picture(
    curves: Sequence[Curve], looks: Mapping[str, Look], *, tax_limit: float | None = None
) -> str:
    """Draw every method's mean over seeds, reward upwards and tax to the right, and return SVG text.

    Args:
        curves: All curves.
        looks: How each method is drawn; methods without a look are left out.
        tax_limit: Where the tax axis ends; default the largest mean tax.
    """
    with rc_context(_SETTINGS):
        figure = _figure(4.7)
        axes = figure.add_subplot()
        for method, own in by_method(curves).items():
            if method in looks:
                _draw_mean(axes, own, looks[method], label=method)
        start = mean_curve(curves)[0]
        axes.plot(start.tax, start.reward, "o", ms=9, color=INK, zorder=5)
        axes.annotate(
            "reference (SFT)", (start.tax, start.reward), (11, 0), textcoords="offset points", va="center"
        )
        _finish(axes, tax_limit)
        axes.set_xlabel("tax: points of capability lost →")
        axes.set_ylabel("reward →")
        axes.legend(frameon=False, loc="lower right", labelcolor=INK)
        return _svg(figure)


def seeds_picture(
    curves: Sequence[Curve], looks: Mapping[str, Look], baseline: str, *, tax_limit: float | None = None
) -> str:
    """Draw one panel per method: its seeds, their mean at equal tax with the range, the baseline's mean."""
    groups = by_method(curves)
    methods = [method for method in groups if method in looks and method != baseline]
    with rc_context(_SETTINGS):
        columns = 2 if len(methods) in (2, 4) else min(3, len(methods))
        rows = -(-len(methods) // columns)
        figure = _figure(0.5 + 2.7 * rows)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel, method in zip(panels.flat, methods, strict=False):
            _draw_panel(panel, groups[method], groups[baseline], looks[method], baseline, tax_limit)
            panel.set_title(method, loc="left", fontsize=11, fontweight="bold", color=INK)
        for panel in panels.flat[len(methods) :]:
            panel.set_axis_off()
        panels.flat[0].legend(frameon=False, fontsize=9, loc="lower right", labelcolor=INK)
        figure.supxlabel("tax →", fontsize=11, color=INK)
        figure.supylabel("reward →", fontsize=11, color=INK)
        return _svg(figure)


def _figure(height: float) -> Figure:
    return Figure(figsize=(8.4, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def _draw_mean(axes: Axes, curves: Sequence[Curve], look: Look, label: str | None) -> None:
    points = mean_curve(curves)
    axes.plot(
        [point.tax for point in points],
        [point.reward for point in points],
        color=look.colour,
        marker=look.marker,
        ms=5,
        lw=2,
        ls="--" if look.dashed else "-",
        zorder=4 if look.dashed else 3,  # a dashed line lets what it covers show
        label=label,
    )


def _draw_panel(
    axes: Axes,
    own: Sequence[Curve],
    base: Sequence[Curve],
    look: Look,
    baseline: str,
    tax_limit: float | None,
) -> None:
    for curve in own:
        axes.plot(
            [p.tax for p in curve.points],
            [p.reward for p in curve.points],
            color=look.colour,
            lw=0.8,
            alpha=0.5,
        )
    taxes, means, lows, highs = _band(own)
    axes.fill_between(taxes, lows, highs, color=look.colour, alpha=0.18, lw=0)
    axes.plot(taxes, means, color=look.colour, lw=2.2)
    taxes, means, _, _ = _band(base)
    axes.plot(taxes, means, color=_FAINT, lw=1.6, ls="--", label=f"{baseline}, mean")
    _finish(axes, tax_limit)


def _band(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return taxes with mean, lowest and highest reward there, as far as every seed goes."""
    taxes, means, lows, highs = [], [], [], []
    level, step = 0.0, 0.25
    while level <= 100:
        rewards = rewards_at_tax(curves, level)
        if len(rewards) == len(curves):
            taxes.append(level)
            means.append(fmean(rewards.values()))
            lows.append(min(rewards.values()))
            highs.append(max(rewards.values()))
        level += step
    return taxes, means, lows, highs


def _finish(axes: Axes, tax_limit: float | None) -> None:
    axes.patch.set_alpha(0)
    axes.grid(color=_FAINT, alpha=0.25, lw=0.7)
    axes.set_axisbelow(True)
    if tax_limit is not None:
        axes.set_xlim(min(-0.5, -0.02 * tax_limit), tax_limit)


def _svg(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def inline(svg: str, title: str) -> str:
    """Return the SVG fit for a page that may be light or dark: it takes the page's ink and scales."""
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{title}"', svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def standalone(svg: str) -> str:
    """Return the SVG as a file of its own, on a light card, so that it reads on any page."""
    card = '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>'
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{card}{rest}'
