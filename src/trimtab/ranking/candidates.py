"""Responses of several models, brought together by their prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trimtab.data.collect import canonical
from trimtab.data.pipeline import check_prompt, is_empty
from trimtab.errors import UserError

Row = dict[str, Any]


@dataclass
class Candidate:
    """One response to a prompt.

    Args:
        text: the response.
        source: the model that gave it, as the file will name it.
        origin: whose tally it belongs to.
        row: what it was read from; a rule may look at it.
        place: where, for errors.
        score: as its row has it; later the score it is ranked by.
    """

    text: str
    source: str
    origin: Tally
    row: Row
    place: str
    score: Any = None


@dataclass
class Question:
    """A prompt and the different responses to it.

    Args:
        prompt: text or messages.
        row: the first row it was found in.
        candidates: no two with the same text.
    """

    prompt: Any
    row: Row
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def has_scores(self) -> bool:
        """Whether a row gave a score to one of them."""
        return any(candidate.score is not None for candidate in self.candidates)

    @property
    def is_tied(self) -> bool:
        """Whether all scores are equal."""
        return len({candidate.score for candidate in self.candidates}) == 1


@dataclass(eq=False)
class Tally:
    """What became of the responses of one file or model.

    Args:
        name: what its responses are marked with.
        rows: read.
        dropped: rows left out, by reason.
        prompts: that it answers, as keys.
        responses: read or generated.
        empty: of these, left out because nothing is in them.
        repeated: of these, left out because the same response to the same prompt was there before.
        without_room: prompts that a model has no room to answer.
        cut: generated responses that the limit ended.
    """

    name: str
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts: set[bytes] = field(default_factory=set)
    responses: int = 0
    empty: int = 0
    repeated: int = 0
    without_room: int = 0
    cut: int = 0


class Candidates:
    """The prompts of all files and models with their responses, in the order they were found.

    Examples:
        >>> candidates, tally = Candidates(), Tally("sft")
        >>> question = candidates.question("1 + 1 =", {}, tally)
        >>> for text in ("2", "3", "2", " "):
        ...     candidates.add(question, Candidate(text, "sft", tally, {}, "sft.jsonl:1"))
        >>> [one.text for one in question.candidates], tally.repeated, tally.empty
        (['2', '3'], 1, 1)
    """

    def __init__(self) -> None:
        self.questions: dict[bytes, Question] = {}
        self.tallies: list[Tally] = []

    def question(self, prompt: Any, row: Row, tally: Tally | None) -> Question:
        """Return the question of a prompt, new or known; prompts are the same if every character is.

        Raises:
            Dropped: if the prompt is empty, does not end where an answer is due, or is no valid Unicode.
        """
        check_prompt(prompt)
        key = canonical({"prompt": prompt})
        if tally is not None:
            tally.prompts.add(key)
        return self.questions.setdefault(key, Question(prompt, row))

    def add(self, question: Question, candidate: Candidate) -> None:
        """Add a response, unless it is empty or there already; either is counted."""
        candidate.origin.responses += 1
        if is_empty(candidate.text):
            candidate.origin.empty += 1
        elif any(candidate.text == known.text for known in question.candidates):
            candidate.origin.repeated += 1
        else:
            question.candidates.append(candidate)

    def missing(self, tally: Tally) -> int:
        """Return how many of all prompts a file or model does not answer."""
        return len(self.questions) - len(tally.prompts)

    def comparable(self) -> list[Question]:
        """Return the prompts with two different responses or more.

        Raises:
            UserError: if there is none.
        """
        found = [question for question in self.questions.values() if len(question.candidates) > 1]
        if not found:
            raise UserError(
                f"none of {len(self.questions):,} prompts has two different responses, so nothing can be "
                "ranked; give several models' outputs, or several responses of one, to the same prompts "
                "(they are joined where every character agrees)"
            )
        return found

    def require_one_form(self) -> None:
        """Check that all prompts are texts, or all are messages.

        Raises:
            UserError: if they are mixed, which no training takes.
        """
        kinds = {isinstance(question.prompt, str): question for question in self.questions.values()}
        if len(kinds) == 2:
            spoken = kinds[False].prompt[-1]["content"]
            raise UserError(
                f"the prompt {_short(kinds[True].prompt)} is text and {_short(spoken)} is messages, which "
                "cannot be mixed; --chat reads prompts that are text as a user's message"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
