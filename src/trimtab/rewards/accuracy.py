"""Pairwise accuracy: how often the response that people prefer is given the higher value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from trimtab.evaluate import wilson

CONFIDENCE = 0.95


def unequal_pairs(scores: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Return the values of every two responses to a prompt whose scores differ, the better response's first.

    Args:
        scores: of the responses, as people (or whoever ranked them) gave them; k of them.
        values: of the same responses, by what is to be measured.

    Returns:
        At most k · (k − 1) / 2 pairs.

    Examples:
        >>> unequal_pairs([0, 1, 1], [0.3, 0.7, 0.2])
        [(0.7, 0.3), (0.2, 0.3)]
    """
    scored = list(zip(scores, values, strict=True))
    return [
        (first[1], second[1]) if first[0] > second[0] else (second[1], first[1])
        for first, second in combinations(scored, 2)
        if first[0] != second[0]
    ]


def pairwise_accuracy(
    pairs: Sequence[tuple[float, float]],
    *,
    prompts: int | None = None,
    statement: str = "the chosen answer scores higher",
    kind: str = "held-out",
) -> dict[str, Any]:
    """Count the pairs whose better response has the higher value; a tie counts as wrong.

    The interval is Wilson's. Pairs of one prompt stand and fall together, so it counts prompts, not pairs,
    as trials: with one pair a prompt both are the same, with several it is wider than that of as many
    independent pairs.

    Args:
        pairs: values of the better and of the other response, at least one pair.
        prompts: that the pairs are of; as many as pairs when None.
        statement: what is counted, for the summary.
        kind: of the pairs, for the summary.

    Returns:
        Counts, the accuracy with its 95 % interval, and a summary in words.

    Examples:
        >>> found = pairwise_accuracy([(1.0, 0.0), (0.5, 0.2), (0.1, 0.3)])
        >>> found["summary"].partition(": ")[2]
        'accuracy 66.7 % (95 % interval 20.8 to 93.9 %)'
    """
    correct = sum(better > other for better, other in pairs)
    trials = len(pairs) if prompts is None else prompts
    found = wilson(correct * trials / len(pairs), trials, CONFIDENCE)
    accuracy = correct / len(pairs)
    of = f"{kind} pairs" + ("" if trials == len(pairs) else f" of {trials:,} prompt{'s' * (trials > 1)}")
    return {
        "pairs": len(pairs),
        "prompts": trials,
        "correct": correct,
        "ties": sum(better == other for better, other in pairs),
        "accuracy": accuracy,
        "interval": {"low": found.low, "high": found.high, "confidence": CONFIDENCE, "kind": "Wilson"},
        "summary": (
            f"{statement} in {correct:,} of {len(pairs):,} {of}: accuracy "
            f"{accuracy:.1%} ({CONFIDENCE:.0%} interval {found.low * 100:.1f} to {found.high:.1%})"
        ).replace("%", " %"),
    }
