"""Rows of preference data as pairs: ``prompt``, ``chosen``, ``rejected`` and, where there are any, ``tools``.

The three are all text or all lists of messages, as TRL's DPOTrainer wants them. A prompt that a file leaves
inside both answers is taken out of them here, so that it is the same for every row.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from trimtab.data.messages import (
    Message,
    assistant,
    conversation,
    is_conversation,
    system,
    tool_schemas,
    user,
)
from trimtab.data.outcome import BadRow, Dropped, describe
from trimtab.data.transcripts import is_transcript, opening, turns

Row = dict[str, Any]

_TEXT_KEYS = ("output", "response", "text", "content")
_SCORE_KEYS = ("score", "preference", "reward", "rating")


def text_of(row: Row, column: str, *, optional: bool = False) -> str:
    """Return the text in a column; null counts as no text where the column is optional.

    Raises:
        BadRow: if the column holds anything else.
    """
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} holds {describe(value)}; text is needed")
    return value


def with_tools(made: Row, row: Row) -> Row:
    """Return ``made`` with the row's tool definitions, where it has any."""
    tools = tool_schemas(row.get("tools"))
    return {**made, "tools": tools} if tools else made


def trl_pair(row: Row) -> Row:
    """Convert TRL's preference rows: text or messages, the prompt in a column or inside both answers."""
    sides = [_either(row, "chosen"), _either(row, "rejected")]
    kinds = [is_conversation(value) for _, value in sides]
    if kinds[0] != kinds[1]:
        raise BadRow("columns 'chosen' and 'rejected' must both be text or both be lists of messages")
    prompt = row.get("prompt")
    if prompt is None and "prompt" in row and not kinds[0]:
        raise Dropped("null")
    if kinds[0]:
        made = _conversational(prompt, *(conversation(value, column) for column, value in sides))
    else:
        made = _textual(prompt, *(text_of({column: value}, column) for column, value in sides))
    return with_tools(made, row)


def _either(row: Row, column: str) -> tuple[str, Any]:
    """A column, under TRL's name or the one LLaMA-Factory's newer files give it."""
    longer = f"{column}_messages"
    return (
        (column, row[column]) if row.get(column) is not None or longer not in row else (longer, row[longer])
    )


def _conversational(prompt: Any, chosen: list[Message], rejected: list[Message]) -> Row:
    """Messages: the prompt may be messages, one question as text, or (also) the start of both answers."""
    repeats = bool(chosen and rejected) and chosen[0]["role"] == rejected[0]["role"] != "assistant"
    if prompt is None:
        return split_messages(chosen, rejected)
    asked = conversation(prompt, "prompt") if is_conversation(prompt) else [_question(prompt)]
    if not repeats:
        return {"prompt": asked, "chosen": chosen, "rejected": rejected}
    made = split_messages(chosen, rejected)
    if asked and asked[0]["role"] == "system" and asked[:1] != made["prompt"][:1]:
        made["prompt"] = asked[:1] + made["prompt"]
    return made


def _question(prompt: Any) -> Message:
    return user(text_of({"prompt": prompt}, "prompt"))


def _textual(prompt: Any, chosen: str, rejected: str) -> Row:
    if prompt is None:
        return split_text(chosen, rejected)
    if is_conversation(prompt):
        asked = conversation(prompt, "prompt")
        return {"prompt": asked, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return {"prompt": text_of({"prompt": prompt}, "prompt"), "chosen": chosen, "rejected": rejected}


def split_messages(chosen: list[Message], rejected: list[Message]) -> Row:
    """Take the prompt out of two conversations: the messages they share, never the last ones.

    Raises:
        Dropped: ``prompts_differ``, if one of them goes on with a user's turn after they part.

    Examples:
        >>> split_messages([user("hi"), assistant("yes")], [user("hi"), assistant("no")])["chosen"]
        [{'role': 'assistant', 'content': 'yes'}]
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    answers = chosen[shared:], rejected[shared:]
    if any(message["role"] not in ("assistant", "tool") for answer in answers for message in answer):
        raise Dropped("prompts_differ")
    return {"prompt": chosen[:shared], "chosen": answers[0], "rejected": answers[1]}


def split_text(chosen: str, rejected: str) -> Row:
    """Take the prompt out of two texts: what they share, up to the white space before they part.

    TRL cuts at the letter where they part, which can be in the middle of a word; the texts as a whole are
    equal.

    Examples:
        >>> split_text("The sky is green.", "The sky is grey.")
        {'prompt': 'The sky is', 'chosen': ' green.', 'rejected': ' grey.'}
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and not chosen[shared : shared + 1].isspace():
        shared -= 1
    while shared > 0 and chosen[shared - 1].isspace():
        shared -= 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def transcript_pair(row: Row) -> Row:
    """Convert Human / Assistant transcripts: the last turns are the answers, those before are the prompt.

    Raises:
        Dropped: if a transcript is malformed, or the two differ before their last turns.
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if row.get("prompt") is not None and not is_transcript(chosen):
        prompt = opening(text_of(row, "prompt"))
        return {
            "prompt": prompt,
            "chosen": [assistant(chosen.strip())],
            "rejected": [assistant(rejected.strip())],
        }
    first, second = turns(chosen), turns(rejected)
    if first[:-1] != second[:-1]:
        raise Dropped("prompts_differ")
    if not first[-1]["role"] == second[-1]["role"] == "assistant":
        raise Dropped("empty_response")
    return {"prompt": first[:-1], "chosen": first[-1:], "rejected": second[-1:]}


def sharegpt_pair(row: Row) -> Row:
    """Convert LLaMA-Factory's sharegpt preference rows: a conversation, and two ways to go on."""
    prompt = sharegpt_messages(row)
    answers = []
    for column in ("chosen", "rejected"):
        value = row[column]
        answers.append(
            conversation(value, column) if is_conversation(value) else [assistant(text_of(row, column))]
        )
    return with_tools({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}, row)


def sharegpt_messages(row: Row) -> list[Message]:
    """Return the ``conversations`` of a sharegpt row, its ``system`` column in front."""
    messages = conversation(row["conversations"], "conversations")
    instructions = text_of(row, "system", optional=True)
    starts = bool(messages) and messages[0]["role"] == "system"
    return messages if starts or not instructions.strip() else [system(instructions), *messages]


def alpaca_prompt(row: Row) -> list[Message]:
    r"""Return an alpaca row's prompt as LLaMA-Factory builds it: system, history, instruction and input.

    Examples:
        >>> alpaca_prompt({"instruction": "Translate.", "input": "Bonjour", "history": [["hi", "hello"]]})[-1]
        {'role': 'user', 'content': 'Translate.\nBonjour'}
    """
    instructions = text_of(row, "system", optional=True)
    messages = [system(instructions)] if instructions.strip() else []
    history = row.get("history") or []
    if not isinstance(history, list) or any(not _is_exchange(item) for item in history):
        raise BadRow(f"column 'history' holds {describe(history)}; a list of [question, answer] is needed")
    for question, answer in history:
        messages += [user(question), assistant(answer)]
    asked = [text_of(row, "instruction"), text_of(row, "input", optional=True)]
    return [*messages, user("\n".join(part for part in asked if part))]


def _is_exchange(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)


def alpaca_pair(row: Row) -> Row:
    """Convert alpaca rows with a chosen and a rejected answer."""
    answers = {column: [assistant(text_of(row, column))] for column in ("chosen", "rejected")}
    return {"prompt": alpaca_prompt(row), **answers}


def chat_pair(row: Row) -> Row:
    """Convert prompt, chosen and rejected that are text, as a user's message and an assistant's answers."""
    answers = {column: [assistant(text_of(row, column))] for column in ("chosen", "rejected")}
    return {"prompt": chat_prompt(row), **answers}


def chat_prompt(row: Row) -> list[Message]:
    """Return a prompt that is text as a user's message, after the ``system`` column where there is one."""
    instructions = text_of(row, "system", optional=True)
    return [*([system(instructions)] if instructions.strip() else []), user(text_of(row, "prompt"))]


def ranked_pair(row: Row) -> Row:
    """Convert ranked responses: the best against the worst, the first of several with the same score.

    The prompt is ``prompt`` (text or messages), RRHF's ``query`` (a transcript becomes messages), or
    AlpacaEval's ``instruction`` (a user's message). Responses are texts beside a list of ``scores``, or
    objects that hold both.

    Raises:
        Dropped: ``tie`` if all scores are equal, ``single_response`` if there is nothing to compare.
        BadRow: if there are not as many finite scores as responses.
    """
    ranked = ranked_responses(row)
    texts, scores = ranked["responses"], ranked["scores"]
    if max(scores) == min(scores):
        raise Dropped("tie")
    best, worst = texts[scores.index(max(scores))], texts[scores.index(min(scores))]
    prompt = ranked["prompt"]
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": best, "rejected": worst}
    return {"prompt": prompt, "chosen": [assistant(best)], "rejected": [assistant(worst)]}


def ranked_responses(row: Row) -> Row:
    """Convert ranked responses, all of them, to ``prompt`` (text or messages), ``responses`` and ``scores``.

    They are written as for :func:`ranked_pair`; equal scores are kept.

    Raises:
        Dropped: ``single_response`` if there is nothing to compare.
        BadRow: if there are not as many finite scores as responses.

    Examples:
        >>> ranked_responses({"query": "1 + 1 =", "responses": ["2", "3"], "scores": [1, 0]})
        {'prompt': '1 + 1 =', 'responses': ['2', '3'], 'scores': [1.0, 0.0]}
    """
    texts, scores = _responses(row)
    if len(texts) < 2:
        raise Dropped("single_response")
    if is_transcript(row[_prompt_column(row)]):
        texts = [text.strip() for text in texts]
    return {"prompt": prompt_of(row), "responses": texts, "scores": scores}


def prompt_of(row: Row) -> Any:
    """Return a row's prompt: ``prompt`` or ``query`` (a transcript becomes messages), or ``instruction``.

    Returns:
        Text or messages.

    Examples:
        >>> prompt_of({"instruction": "Count."})
        [{'role': 'user', 'content': 'Count.'}]
    """
    column = _prompt_column(row)
    asked = row[column]
    if is_conversation(asked):
        return conversation(asked, column)
    if is_transcript(asked):
        return opening(asked)
    return alpaca_prompt(row) if column == "instruction" else text_of(row, column)


def _prompt_column(row: Row) -> str:
    return next(name for name in ("prompt", "query", "instruction") if row.get(name) is not None)


def pair_as_ranked(pair: Row) -> Row:
    """Return a pair as two ranked responses, with the scores 1 and 0.

    Raises:
        Dropped: ``identical`` if the two are the same.
        BadRow: if it has tool definitions, which no layout of ranked responses has.
    """
    if "tools" in pair:
        raise BadRow("ranked responses cannot have tool definitions; take the tools out of the data")
    if pair["chosen"] == pair["rejected"]:
        raise Dropped("identical")
    return {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"]], "scores": [1.0, 0.0]}


def _responses(row: Row) -> tuple[list[str], list[float]]:
    responses, scores = responses_of(row)
    if scores is None:
        raise BadRow(f"{len(responses)} responses need a list of as many 'scores', not null")
    return responses, [finite_score(score) for score in scores]


def responses_of(row: Row) -> tuple[list[str], list[Any] | None]:
    """Return the texts in the column ``responses`` and what is written as their scores, unchecked.

    Responses are texts beside a list of ``scores``, or objects that hold both; None where there are no
    scores.

    Raises:
        BadRow: if a response is no text, or there are not as many scores as responses.

    Examples:
        >>> responses_of({"responses": [{"text": "yes", "score": 1}, {"text": "no", "score": 0}]})
        (['yes', 'no'], [1, 0])
    """
    responses, scores = row["responses"], row.get("scores")
    if not isinstance(responses, list):
        raise BadRow(f"column 'responses' holds {describe(responses)}; a list of responses is needed")
    if any(isinstance(response, dict) for response in responses):
        scores = [_one_of(response, _SCORE_KEYS) for response in responses] if scores is None else scores
        responses = [_one_of(response, _TEXT_KEYS) for response in responses]
    for response in responses:
        if not isinstance(response, str):
            raise BadRow(f"column 'responses' holds {describe(response)}; every response must be text")
    if scores is not None and (not isinstance(scores, list) or len(scores) != len(responses)):
        raise BadRow(f"{len(responses)} responses need a list of as many 'scores', not {describe(scores)}")
    return responses, scores


def _one_of(response: Any, keys: tuple[str, ...]) -> Any:
    """The first of several keys that a response in object form has."""
    return next((response[key] for key in keys if isinstance(response, dict) and key in response), None)


def finite_score(score: Any) -> float:
    """Return a score as a finite float.

    Raises:
        BadRow: if it is anything else.
    """
    number = None
    if isinstance(score, int | float) and not isinstance(score, bool):
        with suppress(OverflowError):  # a whole number beyond what a float holds
            number = float(score)
    if number is None or not math.isfinite(number):
        raise BadRow(f"column 'scores' holds {describe(score)}; every score must be a finite number")
    return number
