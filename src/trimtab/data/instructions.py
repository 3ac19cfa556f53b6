"""Rows of instruction data in the columns of TRL's SFTTrainer: messages, prompt and completion, or text."""

from __future__ import annotations

from trimtab.data.messages import assistant, conversation, is_conversation, user
from trimtab.data.outcome import BadRow, Dropped
from trimtab.data.pairs import Row, alpaca_prompt, chat_prompt, sharegpt_messages, text_of, with_tools


def trl_messages(row: Row) -> Row:
    """Convert rows with a ``messages`` column; one that is labelled false is left out."""
    _check_label(row)
    return with_tools({"messages": conversation(row["messages"], "messages")}, row)


def trl_completion(row: Row) -> Row:
    """Convert rows with ``prompt`` and ``completion``: text, messages, or one of each."""
    _check_label(row)
    prompt, completion = row["prompt"], row["completion"]
    if not is_conversation(prompt) and not is_conversation(completion):
        return {"prompt": text_of(row, "prompt"), "completion": text_of(row, "completion")}
    asked = conversation(prompt, "prompt") if is_conversation(prompt) else [user(text_of(row, "prompt"))]
    if is_conversation(completion):
        answer = conversation(completion, "completion")
    else:
        answer = [assistant(text_of(row, "completion"))]
    return with_tools({"prompt": asked, "completion": answer}, row)


def trl_text(row: Row) -> Row:
    """Convert rows of plain text."""
    return {"text": text_of(row, "text")}


def sharegpt_conversation(row: Row) -> Row:
    """Convert LLaMA-Factory's sharegpt rows."""
    return with_tools({"messages": sharegpt_messages(row)}, row)


def alpaca_completion(row: Row) -> Row:
    """Convert alpaca rows; earlier answers in ``history`` are context, only ``output`` is the completion."""
    return {"prompt": alpaca_prompt(row), "completion": [assistant(text_of(row, "output"))]}


def chat_completion(row: Row) -> Row:
    """Convert prompt and completion that are text, as a user's and an assistant's message."""
    return {"prompt": chat_prompt(row), "completion": [assistant(text_of(row, "completion"))]}


def preferred(pair: Row) -> Row:
    """Return the chosen side of a pair as a prompt and its completion."""
    made = {"prompt": pair["prompt"], "completion": pair["chosen"]}
    return {**made, "tools": pair["tools"]} if "tools" in pair else made


def asked(row: Row) -> Row:
    """Return the prompt of a converted row of any kind; its answers go.

    Raises:
        BadRow: if it has tool definitions: nothing would carry out the calls.

    Examples:
        >>> asked({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})
        {'prompt': '1 + 1 ='}
    """
    if "tools" in row:
        raise BadRow("a prompt that is answered while training cannot have tool definitions; take them out")
    if "prompt" in row:
        return {"prompt": row["prompt"]}
    messages = row["messages"]
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return {"prompt": messages[:-1] if answered else messages}


def _check_label(row: Row) -> None:
    """Leave out what unpaired preference data (KTO's) marks as bad with ``label: false``."""
    if row.get("label") is False:
        raise Dropped("labelled_bad")


def reshaped(row: Row, columns: tuple[str, ...]) -> Row:
    """Return an instruction row in the columns that a mixture of sources shares.

    ``prompt`` and ``completion`` can be joined into ``messages`` or ``text``; the tokens stay the same.

    Raises:
        BadRow: if there is no way from this row to these columns.

    Examples:
        >>> reshaped({"prompt": "1 + 1 =", "completion": " 2"}, ("text",))
        {'text': '1 + 1 = 2'}
    """
    if tuple(column for column in row if column != "tools") == columns:
        return row
    if "completion" not in row or len(columns) != 1:
        raise BadRow(f"holds {', '.join(row)} where {', '.join(columns)} is needed")
    made = {columns[0]: row["prompt"] + row["completion"]}
    return {**made, "tools": row["tools"]} if "tools" in row else made
