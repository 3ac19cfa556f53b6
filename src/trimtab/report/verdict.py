"""What the numbers say, in plain words. Every sentence is computed; none is written beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from trimtab.report.curves import Curve, Spread, by_method, mean_curve, paired, rewards_at_tax
from trimtab.report.tables import number

Outcome = Literal["more", "less", "no clear difference", "not compared"]


@dataclass(frozen=True)
class Question:
    """What is to be compared.

    Attributes:
        baseline: The method all others are held against.
        repeat: The baseline run again with another order of the data; the gap between the two is the noise.
        online: The methods under test.
        simple: The cheap alternatives to them.
        tax: Points of capability at which the words are about.
        taxes: All levels at which methods are counted better or worse.
    """

    baseline: str
    repeat: str
    online: Sequence[str]
    simple: Sequence[str]
    tax: float
    taxes: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """One method against another at one tax.

    Attributes:
        method: The method.
        against: What it is compared with.
        tax: Points of capability at which both are read.
        gap: Reward of ``method`` minus reward of ``against``, in points (hundredths), over seeds.
        noise: Largest gap of any seed between two runs that differ in the order of the data only, in points.
        outcome: ``more`` or ``less`` only if every seed agrees and the mean gap is larger than the noise.
    """

    method: str
    against: str
    tax: float
    gap: Spread | None
    noise: float
    outcome: Outcome


def noise_at(curves: Sequence[Curve], question: Question, tax: float) -> float:
    """Return the largest gap, in points, between the baseline and its repeat at a tax; 0 without both."""
    groups = by_method(curves)
    first, second = (
        rewards_at_tax(groups.get(name, []), tax) for name in (question.baseline, question.repeat)
    )
    return max((abs(100 * gap) for gap in paired(first, second).values()), default=0.0)


def compare(curves: Sequence[Curve], question: Question, method: str, against: str, tax: float) -> Comparison:
    """Compare two methods at equal tax, seed by seed."""
    groups = by_method(curves)
    ours, theirs = (rewards_at_tax(groups[name], tax) for name in (method, against))
    gaps = [100 * gap for gap in paired(ours, theirs).values()]
    noise = noise_at(curves, question, tax)
    return Comparison(method, against, tax, Spread.of(gaps), noise, _outcome(gaps, noise))


def _outcome(gaps: Sequence[float], noise: float) -> Outcome:
    if len(gaps) < 2:
        return "not compared"
    if abs(fmean(gaps)) > noise:
        if all(gap > 0 for gap in gaps):
            return "more"
        if all(gap < 0 for gap in gaps):
            return "less"
    return "no clear difference"


def sentence(comparison: Comparison) -> str:
    """Say one comparison in words.

    Example:
        >>> gap = Spread(2.0, 1.0, 3.0, 3)
        >>> sentence(Comparison("EMA", "AdamW", 6.0, gap, 0.5, "more"))
        'EMA has more reward than AdamW: +2.0 points (+1.0 to +3.0 over 3 seeds).'
    """
    name, other, gap = comparison.method, comparison.against, comparison.gap
    if gap is None:
        return f"{name} cannot be compared with {other}: on no seed do both pay this tax."
    low, high = number(gap.low, 1, sign=True), number(gap.high, 1, sign=True)
    numbers = f"{number(gap.mean, 1, sign=True)} points ({low} to {high} over {gap.count} seeds)"
    if comparison.outcome == "not compared":
        mean = number(gap.mean, 1, sign=True)
        return f"{name} against {other}: {mean} points, on one seed, which settles nothing."
    if comparison.outcome == "no clear difference":
        return f"{name} and {other} show no clear difference: {numbers}."
    return f"{name} has {comparison.outcome} reward than {other}: {numbers}."


def headline(curves: Sequence[Curve], question: Question) -> list[str]:
    """Say how the methods under test did at equal tax, against the baseline and against the simple ones."""
    online = [_beside(curves, question, method, [question.baseline]) for method in question.online]
    simple = [_beside(curves, question, method, question.online) for method in question.simple]
    return [_capital(text) for text in (*online, *simple, *_highest(curves, question))]


def _highest(curves: Sequence[Curve], question: Question) -> list[str]:
    """Say which methods have the highest mean reward, and at how many levels of tax."""
    groups = {name: own for name, own in by_method(curves).items() if name != question.repeat}
    seeds = {curve.seed for curve in curves}
    wins: dict[str, int] = {}
    for tax in question.taxes:
        found = {name: rewards_at_tax(own, tax) for name, own in groups.items()}
        means = {name: fmean(own.values()) for name, own in found.items() if own.keys() == seeds}
        if means:
            best = max(means, key=means.__getitem__)
            wins[best] = wins.get(best, 0) + 1
    if not wins:
        return []
    parts = [f"{name} at {n}" for name, n in sorted(wins.items(), key=lambda item: -item[1])]
    return [f"The highest mean reward is that of {_listed(parts)} of {sum(wins.values())} levels."]


def _beside(curves: Sequence[Curve], question: Question, method: str, others: Sequence[str]) -> str:
    """Say at how many levels of tax ``method`` clearly has more or less reward than all of ``others``."""
    levels = [[compare(curves, question, method, other, tax) for other in others] for tax in question.taxes]
    levels = [level for level in levels if all(c.outcome != "not compared" for c in level)]
    names, of = _listed(others), len(levels)
    if not levels:
        return f"{method} and {names} cannot be compared."
    gaps = [c.gap.mean for level in levels for c in level if c.gap is not None]
    low, high = number(min(gaps), 1, sign=True), number(max(gaps), 1, sign=True)
    span = f"({low} to {high} points)"
    more, less = (sum(all(c.outcome == way for c in level) for level in levels) for way in ("more", "less"))
    if not more and not less:
        return f"{method} against {names}: no clear difference {span}."
    ways = [f"{way} reward than {names} at {n}" for way, n in (("more", more), ("less", less)) if n]
    return f"{method} has clearly {' and clearly '.join(ways)} of {of} levels {span}."


def _count(curves: Sequence[Curve], question: Question, method: str, against: str) -> tuple[int, int, int]:
    outcomes = [compare(curves, question, method, against, tax).outcome for tax in question.taxes]
    return outcomes.count("more"), outcomes.count("less"), len(outcomes) - outcomes.count("not compared")


def findings(curves: Sequence[Curve], question: Question) -> list[str]:
    """Say what was measured, one finding per entry: the tax itself, then every method at equal tax."""
    methods = [*question.online, *question.simple]
    lines = [_the_tax(by_method(curves)[question.baseline], question.baseline), _ranking(curves, question)]
    lines += [sentence(compare(curves, question, m, question.baseline, question.tax)) for m in methods]
    lines += [
        sentence(compare(curves, question, simple, online, question.tax))
        for simple in question.simple
        for online in question.online
    ]
    return [_capital(line) for line in lines]


def counts(curves: Sequence[Curve], question: Question) -> list[str]:
    """Say for each method at how many of the tax levels it is clearly above or below the baseline."""
    levels = ", ".join(f"{tax:g}" for tax in question.taxes)
    lines = []
    for method in [*question.online, *question.simple]:
        more, less, of = _count(curves, question, method, question.baseline)
        lines.append(
            f"{method}: clearly more reward than {question.baseline} at {more}, clearly less at {less} of "
            f"{of} levels of tax that could be compared ({levels} points)."
        )
    return [_capital(line) for line in lines]


def _the_tax(curves: Sequence[Curve], baseline: str) -> str:
    before = Spread.of(curve.points[0].reward for curve in curves)
    after = Spread.of(curve.points[-1].reward for curve in curves)
    tax = Spread.of(curve.points[-1].tax for curve in curves)
    assert before is not None
    assert after is not None
    assert tax is not None
    said = (
        f"{baseline} took the reward from {before.mean:.2f} to {after.mean:.2f} ({after.low:.2f} to "
        f"{after.high:.2f} over {after.count} seeds) and lost {number(tax.mean, 1)} points of capability "
        f"({number(tax.low, 1)} to {number(tax.high, 1)}): the alignment tax."
    )
    best = max(mean_curve(curves), key=lambda point: point.reward)
    if best.reward > after.mean + 0.005:
        said += (
            f" Its mean reward was highest earlier, {best.reward:.2f} at {best.label} for "
            f"{number(best.tax, 1)} points: from there on, training longer cost capability and reward."
        )
    return said


def _ranking(curves: Sequence[Curve], question: Question) -> str:
    groups = by_method(curves)
    seeds = {curve.seed for curve in curves}
    found = {name: rewards_at_tax(own, question.tax) for name, own in groups.items()}
    means = {name: fmean(own.values()) for name, own in found.items() if own.keys() == seeds}
    if not means:
        return f"No method pays {question.tax:g} points of capability on every seed."
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    noise = number(noise_at(curves, question, question.tax), 1)
    return (
        f"At a tax of {question.tax:g} points the mean reward is "
        + ", ".join(f"{means[name]:.3f} ({name})" for name in ranked)
        + f". Two orders of the same data differ by up to {noise} points on one seed: "
        "smaller gaps can be chance."
    )


def _listed(names: Sequence[str]) -> str:
    """Join names: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _capital(text: str) -> str:
    """Begin a sentence with a capital letter, whatever the method's name."""
    return text[:1].upper() + text[1:]
