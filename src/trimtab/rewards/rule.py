"""A function of the user's own as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UserError
from trimtab.rewards.reward import Prompt, Rows, checked_scores


@dataclass(frozen=True)
class Rule:
    """Scores by a function: a length, a format, a known answer, a request to a judge.

    Args:
        function: called with the prompts, the responses and the rows (or None) of a batch; gives one number
            for each response. True and False count as 1 and 0.
        name: what it is called.

    Examples:
        >>> shorter = Rule(lambda prompts, responses, rows: [-len(text) for text in responses], "shorter")
        >>> shorter(["Say hi.", "Say hi."], ["hi", "good day"])
        [-2.0, -8.0]
    """

    function: Callable[..., Any]
    name: str

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: Rows | None = None
    ) -> list[float]:
        """Score responses.

        Raises:
            UserError: if the function does not give a list of as many finite numbers.
        """
        scores = self.function(list(prompts), list(responses), None if rows is None else list(rows))
        try:
            given = list(scores)
        except TypeError:
            raise UserError(
                f"{self.name} gives {scores!r}; a list with a number for each response is needed"
            ) from None
        return checked_scores(self.name, prompts, responses, given)
