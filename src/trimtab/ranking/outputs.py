"""Outputs of models as rows: a prompt and one response or several, in whatever columns they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trimtab.data.messages import Message, conversation, is_conversation, is_plain, user
from trimtab.data.outcome import BadRow, Dropped, describe, quoted
from trimtab.data.pairs import Row, prompt_of, responses_of, sharegpt_messages
from trimtab.data.transcripts import is_transcript
from trimtab.errors import nearest

_PROMPT = ("prompt", "query", "instruction")
_RESPONSE = ("response", "completion", "output")
_GENERATOR = ("generator", "model")  # not "source": that is mostly where a row of data is from
_WHO = (*_GENERATOR, "source")


@dataclass(frozen=True)
class Output:
    """What one row holds.

    Args:
        prompt: text, or messages that end where an answer is due.
        responses: texts.
        scores: as the row has them, unchecked; None where it has none.
        sources: which model gave each; None where the row does not say.
    """

    prompt: str | list[Message]
    responses: tuple[str, ...]
    scores: tuple[Any, ...]
    sources: tuple[str | None, ...]

    def as_chat(self) -> Output:
        """Return this with a prompt that is text as a user's message."""
        return replace(self, prompt=[user(self.prompt)]) if isinstance(self.prompt, str) else self


def read_output(row: Row) -> Output:
    """Read a row of a model's outputs.

    These are read, the first that fits: a prompt with ``responses`` (and ``scores``, ``sources``; or
    responses as objects that hold all three); a prompt with ``response``, ``completion`` or ``output``;
    ``messages``, or sharegpt's ``conversations``, whose last message is the response. The latter may have
    ``score``, and ``generator`` or ``model``. The prompt is ``prompt``, ``query`` or ``instruction``, text
    or messages.

    Raises:
        BadRow: if it is none of these, or a column holds something else than it should.
        Dropped: ``null`` if a column that is needed is null; ``empty_response`` if messages do not end with
            the assistant's.

    Examples:
        >>> read_output({"prompt": "1 + 1 =", "completion": " 2", "score": 1}).responses
        (' 2',)
    """
    for needs, read in _WAYS:
        if all(any(name in row for name in names) for names in needs):
            if any(all(row.get(name) is None for name in names) for names in needs):
                raise Dropped("null")
            if row.get("tools"):
                raise BadRow("ranked responses cannot have tool definitions; take the tools out of the data")
            return read(row)
    raise BadRow(_nothing_fits(row))


def _several(row: Row) -> Output:
    texts, scores = responses_of(row)
    sources = row.get("sources")
    if sources is None:
        sources = [_named(response, _WHO) for response in row["responses"]]
    if not isinstance(sources, list) or len(sources) != len(texts):
        raise BadRow(f"{len(texts)} responses need a list of as many 'sources', not {describe(sources)}")
    named = [str(source) if source is not None else None for source in sources]
    return _output(row, texts, scores or [None] * len(texts), named)


def _single(row: Row) -> Output:
    column = next(name for name in _RESPONSE if row.get(name) is not None)
    said = row[column]
    if not is_conversation(said):
        if not isinstance(said, str):
            raise BadRow(f"column {column!r} holds {describe(said)}; text is needed")
        return _output(row, [said], [row.get("score")], [_named(row, _GENERATOR)])
    answer = _answer(conversation(said, column), column)
    return _output(row, [answer], [row.get("score")], [_named(row, _GENERATOR)]).as_chat()


def _spoken(row: Row) -> Output:
    column = "messages" if "messages" in row else "conversations"
    messages = conversation(row[column], column) if column == "messages" else sharegpt_messages(row)
    if not messages or messages[-1]["role"] != "assistant":
        raise Dropped("empty_response")
    answer = _answer(messages[-1:], column)
    return Output(messages[:-1], (answer,), (row.get("score"),), (_named(row, _GENERATOR),))


def _answer(messages: list[Message], column: str) -> str:
    """The text of the one message that a response is."""
    if len(messages) != 1 or messages[0]["role"] != "assistant" or not is_plain(messages[0]):
        raise BadRow(
            f"column {column!r} holds more than one message of the assistant's, or more than its text; a "
            "response is one text"
        )
    text: str = messages[0]["content"]
    return text


def _named(where: Any, keys: tuple[str, ...]) -> str | None:
    """Which model gave a response, where a row or a response in object form says so."""
    found = (where.get(key) for key in keys) if isinstance(where, dict) else ()
    return next((name for name in found if isinstance(name, str) and name), None)


def _output(row: Row, texts: list[str], scores: list[Any], sources: list[str | None]) -> Output:
    prompt = prompt_of(row)
    asked = next(row[name] for name in _PROMPT if row.get(name) is not None)
    if is_transcript(asked):
        texts = [text.strip() for text in texts]
    return Output(prompt, tuple(texts), tuple(scores), tuple(sources))


_WAYS: tuple[tuple[tuple[tuple[str, ...], ...], Callable[[Row], Output]], ...] = (
    ((_PROMPT, ("responses",)), _several),
    ((_PROMPT, _RESPONSE), _single),
    ((("messages",),), _spoken),
    ((("conversations",),), _spoken),
)


def _nothing_fits(row: Row) -> str:
    there = f"the columns are {quoted(row)}" if row else "there are no columns"
    known = ("prompt", "responses", *_RESPONSE, "messages")
    close = next((name for name in row if name not in known and nearest(name, known)), None)
    hint = f" (is {close!r} meant to be {nearest(close, known)!r}?)" if close else ""
    return f"{there}; outputs need prompt + response (or completion, or responses), or messages{hint}"
