"""The quickstart's report: the words, tables and pictures that tell what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from trimtab.lab.methods import ADAMW, AVERAGE, EMA, EXAMPLE_WEIGHT, ONDARE, ONTIES, REPEAT, Plan
from trimtab.lab.world import CAPABILITIES
from trimtab.report import page as html
from trimtab.report import verdict
from trimtab.report.curves import Curve, Spread, by_method, mean_curve
from trimtab.report.pictures import Look, inline, seeds_picture, trade_picture
from trimtab.report.tables import Table, differences, equal_reward, equal_tax, number, spread_text
from trimtab.report.terminal import Line, reward_tax_picture, rich_table

ORDER = (ADAMW, ONDARE, ONTIES, EMA, AVERAGE, REPEAT)
TAXES = (1.0, 3.0, 6.0, 12.0)
MAIN_TAX = 6.0
READING = (
    "Points are hundredths of reward, the mean over seeds; from … to … is over taxes of "
    f"{', '.join(f'{tax:g}' for tax in TAXES)} points of capability."
)
ASKED = "Which way of training gets more reward at the same tax?"
LOOKS = {
    ADAMW: Look("#5b6b7f", "o", dashed=True),
    ONDARE: Look("#d55e00", "s"),
    ONTIES: Look("#c2369a", "D"),
    EMA: Look("#009e73", "^"),
    AVERAGE: Look("#0b79c4", "v"),
}
TERMINAL = {
    ADAMW: ("white", "A"),
    ONDARE: ("dark_orange3", "D"),
    ONTIES: ("magenta", "T"),
    EMA: ("green", "E"),
    AVERAGE: ("dodger_blue1", "w"),
}


@dataclass(frozen=True)
class Told:
    """The finished story: an HTML page, the picture as SVG, and what the terminal shows."""

    page: str
    picture: str
    terminal: RenderableType


def question() -> verdict.Question:
    """Return what the quickstart asks of its curves."""
    return verdict.Question(
        baseline=ADAMW,
        repeat=REPEAT,
        online=(ONDARE, ONTIES),
        simple=(EMA, AVERAGE),
        tax=MAIN_TAX,
        taxes=TAXES,
    )


def opening_words(plan: Plan, seeds: Sequence[int]) -> Panel:
    """Return what the terminal shows before the work begins."""
    many = f"{len(seeds)} SFT models" if len(seeds) > 1 else "one SFT model"
    text = (
        "A language model of 0.33 million parameters that can do nine things is tuned on preferences "
        f"(DPO, {plan.steps} steps), starting from {many}: with AdamW, OnDARE and OnTIES; a moving "
        "average (EMA) and averages with the start ride on the AdamW run. Along the way its reward and "
        "its tax, the points of capability it lost, are measured on 2,120 fixed questions."
    )
    return Panel(text, title="trimtab quickstart", title_align="left", border_style="dim")


def tell(results: dict[str, Any], curves: Sequence[Curve], plan: Plan, width: int = 100) -> Told:
    """Tell what was measured.

    Args:
        results: What ``results.json`` holds.
        curves: The same as curves.
        plan: The settings.
        width: Columns of the terminal.
    """
    limit = _tax_limit(curves)
    picture = trade_picture(curves, LOOKS, tax_limit=limit)
    seeds = seeds_picture(curves, LOOKS, ADAMW, tax_limit=limit)
    return Told(_page(results, curves, plan, picture, seeds), picture, _terminal(curves, limit, width))


def _tax_limit(curves: Sequence[Curve]) -> float:
    """Return where pictures end: a good deal beyond AdamW's best mean reward; the rest is ruin."""
    mean = mean_curve(by_method(curves)[ADAMW])
    best = max(mean, key=lambda point: point.reward)
    return max(20.0, min(max(point.tax for point in mean) * 1.05, 1.6 * best.tax))


def _terminal(curves: Sequence[Curve], limit: float, width: int) -> Group:
    lines = []
    for method, own in by_method(curves).items():
        if method in TERMINAL:
            colour, marker = TERMINAL[method]
            points = [point for point in mean_curve(own) if point.tax <= limit]
            lines.append(Line(method, points, colour, marker))
    asked = question()
    shown = [curve for curve in curves if curve.method != REPEAT]
    return Group(
        Padding(Text("Mean over seeds: up is better, left is better", style="bold"), (1, 0, 0, 0)),
        reward_tax_picture(lines, width=max(30, min(width, 90) - 16)),
        Padding(rich_table(equal_tax(shown, TAXES)), (1, 0, 0, 0)),
        Panel(_bulleted(verdict.headline(curves, asked)), title=ASKED, title_align="left"),
        _bulleted(verdict.findings(curves, asked)[:2]),
    )


def _bulleted(sentences: Sequence[str]) -> RichTable:
    grid = RichTable.grid(padding=(0, 1))
    for text in sentences:
        grid.add_row("•", Text(text))
    return grid


def _page(results: dict[str, Any], curves: Sequence[Curve], plan: Plan, picture: str, seeds: str) -> str:
    asked = question()
    opening = html.verdict_box(ASKED, verdict.headline(curves, asked), READING) + html.cards(
        _cards(results, curves)
    )
    sections = [
        html.Section("Reward against tax", _picture_section(picture, seeds)),
        html.Section("What the numbers say", _findings_section(curves, asked)),
        html.Section("The tables", _tables_section(results, curves)),
        html.Section("What the models say", _examples_section(results)),
        html.Section("What was done", _method_section(results, plan)),
        html.Section("What this does not show", _limits_section(results)),
    ]
    environment = results["environment"]
    footer = (
        f"trimtab {results['trimtab']} · torch {environment['torch']} · {environment['cpu_capability']} · "
        f"{results['wall_seconds']:g} s for {len(results['runs'])} training runs and "
        f"{len(results['points'])} measured models. Every number and sentence about the results was "
        "computed by this run; results.json has them all."
    )
    return html.page(
        "Reward and its price",
        "A tiny language model learns to please. What does it forget, and which way of training forgets "
        "least?",
        opening,
        sections,
        footer,
    )


def _cards(results: dict[str, Any], curves: Sequence[Curve]) -> list[tuple[str, str]]:
    mean = mean_curve(by_method(curves)[ADAMW])
    start, end = mean[0], mean[-1]
    lost = tax_per_capability(results, ADAMW)
    worst = max(lost, key=lost.__getitem__)
    return [
        (f"{start.reward:.2f}", "reward of the SFT models, before preference training"),
        (f"{end.reward:.2f}", f"reward after DPO with plain AdamW ({end.label})"),
        (f"{number(end.tax, 1)} points", "of capability lost on the way: the alignment tax"),
        (f"{number(lost[worst], 0)} points", f"lost in “{worst}”, the skill that suffered most"),
    ]


def tax_per_capability(results: dict[str, Any], method: str) -> dict[str, float]:
    """Return the points lost in each capability after the last step of a method, the mean over seeds."""
    last = {point["seed"]: point for point in results["points"] if point["method"] == method}
    reference = {seed: results["references"][str(seed)]["per_capability"] for seed in last}
    return {
        name: fmean(100 * (reference[seed][name] - last[seed]["per_capability"][name]) for seed in last)
        for name in CAPABILITIES
    }


def capability_table(results: dict[str, Any]) -> Table:
    """Tabulate what each method lost in each capability by the end."""
    rows = []
    for method in ORDER:
        if method != AVERAGE:  # its last model is AdamW's
            lost = tax_per_capability(results, method)
            rows.append([method, *(number(lost[name], 0) for name in CAPABILITIES)])
    return Table(
        "Points lost per capability after the last step, mean over seeds",
        ["method", *CAPABILITIES],
        rows,
        "rev, add, rep and talk are in the preference data; eval, sort, fact, case and only are not.",
    )


def _picture_section(picture: str, seeds: str) -> str:
    return html.figure(
        inline(picture, "Reward against tax, mean over seeds"),
        "Each line is one method; each mark on it is one measured model, the mean over seeds. Training "
        "moves a model away from the dot: up (more reward) and to the right (more lost). A method is "
        "better where its line lies higher at the same tax. Averaging is one trained model mixed with "
        "the SFT model in several proportions.",
    ) + html.figure(
        inline(seeds, "Reward against tax, per method and seed"),
        "The same per method: thin lines are single seeds, the band is the range over seeds at equal "
        "tax, the thick line its mean, the dashed line AdamW's mean. The bands are wide because the SFT "
        "models differ; methods are compared on the same seed, in the tables below.",
    )


def _findings_section(curves: Sequence[Curve], asked: verdict.Question) -> str:
    rule = (
        "A difference is called clear only if every seed agrees on its sign and its mean is larger than "
        "the largest difference that another order of the same data makes to AdamW at that tax. With "
        "three seeds that is a coarse rule: small true differences are missed, and of twenty comparisons of "
        "equal methods about one passes by luck."
    )
    return (
        html.bullets(verdict.findings(curves, asked))
        + html.paragraph(rule)
        + html.folded("Counted over all levels of tax", html.bullets(verdict.counts(curves, asked)))
    )


def _tables_section(results: dict[str, Any], curves: Sequence[Curve]) -> str:
    shown = [curve for curve in curves if curve.method != REPEAT]
    return (
        html.html_table(equal_tax(shown, TAXES))
        + html.html_table(equal_reward(shown, reward_levels(curves)))
        + html.html_table(differences(curves, ADAMW, TAXES))
        + html.html_table(capability_table(results))
        + html.folded("Seed by seed: the last model of each run", html.html_table(per_seed(curves)))
    )


def reward_levels(curves: Sequence[Curve]) -> list[float]:
    """Return three rewards, rounded to hundredths, which the baseline reaches on every seed."""
    own = by_method(curves)[ADAMW]
    low = max(curve.points[0].reward for curve in own)
    high = min(max(point.reward for point in curve.points) for curve in own)
    return sorted({round(low + share * (high - low), 2) for share in (0.3, 0.6, 0.9)})


def per_seed(curves: Sequence[Curve]) -> Table:
    """Return reward and tax of the last model of each run, one column per seed."""
    seeds = sorted({curve.seed for curve in curves})
    rows = []
    for method, own in by_method(curves).items():
        ends = {curve.seed: curve.points[-1] for curve in own}
        tax = Spread.of(point.tax for point in ends.values())
        cells = [f"{ends[s].reward:.3f} / {number(ends[s].tax, 1)}" if s in ends else "" for s in seeds]
        if method != AVERAGE:  # its last model is AdamW's
            rows.append([method, *cells, spread_text(tax, 1, len(seeds))])
    return Table("Reward / tax after the last step", ["method", *(f"seed {s}" for s in seeds), "tax"], rows)


def _examples_section(results: dict[str, Any]) -> str:
    examples = results["examples"]
    asked = [f"“{words}”" for words in examples["questions"]]
    names = {AVERAGE: f"{AVERAGE}, w = {EXAMPLE_WEIGHT:g}"}
    rows = [
        [names.get(name, name), *(text or "(nothing)" for text in examples["answers"][name])]
        for name in ("SFT", *ORDER)
        if name in examples["answers"] and name != REPEAT
    ]
    explained = (
        "“rev” asks for the letters in reverse, “talk c 4” for exactly four letters each of which may "
        "follow the one before; “z” is the forbidden letter. Preferences like “sure !”, “for …” "
        "(repeating the question), “. hope that helps”, long talk, and a refusal where z is. Shown are "
        "the answers after the last step, where the tax is at its largest: look for right form around "
        "wrong content."
    )
    table = Table(f"Greedy answers, seed {examples['seed']}", ["model", *asked], rows)
    return html.paragraph(explained) + html.html_table(table, words=True)


def _method_section(results: dict[str, Any], plan: Plan) -> str:
    world = (
        "The world: a vocabulary of 75 words and nine capabilities with one right answer each (adding, "
        "bracket arithmetic, reversing, sorting, facts, repeating, upper and lower case, legal talk of a "
        "given length, and answering “only” what is asked). A base model learns them from plain "
        "documents, an SFT model from conversations with a mix of styles; both are shipped, for three "
        "seeds that share nothing but the world."
    )
    measures = (
        "Reward (0 to 1) is computed by rule on 500 questions of four kinds: right content first, then "
        "opening, closing and an echo of the question, length for talk, exact refusal for the forbidden "
        "letter. The pairs the model learns from say the same with 15 % of them the wrong way round. "
        "Capability is the share of right answers on 1,620 questions of nine kinds, five of which the "
        "pairs never touch; decoration is no mistake, except after “only”. Talk is a true conflict: its "
        "reward asks for more words than the question allows. Tax is capability lost against the same "
        "seed's SFT model, in points."
    )
    return (
        html.paragraph(world)
        + html.paragraph(measures)
        + html.html_table(_settings(results, plan), words=True)
    )


def _settings(results: dict[str, Any], plan: Plan) -> Table:
    dpo = (
        f"DPO, β {plan.beta:g}, {plan.steps} steps of 48 pairs, AdamW moments (0.9, 0.999), no decay, clip 1"
    )
    merge = f"p {plan.reserve_rate:g}, α {plan.merge_weight:g}, every step, paper's form"
    drift = {
        run["method"]: f"{'at most ' if run['method'] == ONTIES else ''}{run['drift']:.2f} τ"
        for run in results["runs"]
    }
    rows = [
        [ADAMW, f"{dpo}, lr {plan.lr:g}", "0"],
        [
            ONDARE,
            f"the same with lr {plan.ondare_lr:g}: keeping a random share p of the update without "
            f"rescaling makes steps p times as long, which lr / p undoes; {merge}",
            drift[ONDARE],
        ],
        [
            ONTIES,
            f"the same with lr {plan.lr:g}: the kept entries are the largest, so little is lost; {merge}",
            drift[ONTIES],
        ],
        [EMA, f"moving average of the AdamW run's weights, {plan.ema:g} of the current ones each step", "0"],
        [AVERAGE, "SFT + w·(AdamW after the last step − SFT), w from 0.125 to 1", "0"],
        [REPEAT, "AdamW once more, pairs in another order: how much luck is in one run", "0"],
    ]
    note = (
        "Drift is what the merged reference delta α·F(τ) adds up to over the run, in units of τ = SFT − "
        "base: it is no force back to the start, it accumulates. Learning rates, p and α come from "
        "experiments in an earlier version of this world; the difficulty of this one was settled on runs "
        "of AdamW."
    )
    return Table("Settings", ["method", "how", "drift"], rows, note)


def _limits_section(results: dict[str, Any]) -> str:
    count = len(results["references"])
    return html.bullets(
        [
            "This is a model of a third of a million parameters and a reward computed by rule. It shows "
            "how the measure works and what the trade looks like; it cannot say which optimizer is best "
            "for a real model.",
            f"{count} seed{'s' * (count > 1)}: small differences cannot be seen. How small, the second AdamW "
            "run shows: it differs from the first in nothing but the order of the data.",
            "One setting per method. Another p, α, learning rate or β moves a method along its line, and "
            "may move the line.",
            "At equal steps, whatever merely takes smaller steps looks cheaper; that is why everything "
            "here is compared at equal tax. Stopping earlier is itself a method, and often a good one.",
        ]
    )
