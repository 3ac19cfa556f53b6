"""Conversations in one shape: lists of ``{"role", "content"}``, whatever names and tags a file uses for them.

What is understood: TRL's and OpenAI's ``role``/``content`` (text, or a list of text parts), sharegpt's
``from``/``value`` with its ``function_call`` and ``observation`` turns, and the typed parts of
LLaMA-Factory's newer files (``text``, ``reasoning``, ``tool_call``). Keys that no chat template reads (loss
weights, ids) go.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from trimtab.data.outcome import BadRow, describe, quoted
from trimtab.errors import nearest

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""The names files give to who speaks, and the role that chat templates know."""

_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")
_LARGEST = 2**63


def user(text: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an assistant's message."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """Return a system message."""
    return {"role": "system", "content": text}


def is_conversation(value: Any) -> bool:
    """Return whether a column's value is one message or a list of messages, rather than text."""
    return isinstance(value, dict) or (isinstance(value, list) and (not value or isinstance(value[0], dict)))


def conversation(value: Any, column: str) -> list[Message]:
    """Return the messages of a column, each with a role that chat templates know.

    Args:
        value: one message or a list of messages.
        column: the column's name, for the error.

    Raises:
        BadRow: if it is neither, or a message has no role, an unknown role, or content that is not text.

    Examples:
        >>> conversation([{"from": "human", "value": "hi"}], "conversations")
        [{'role': 'user', 'content': 'hi'}]
    """
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadRow(f"column {column!r} holds {describe(value)}; a list of messages is needed")
    return [_message(item, f"message {place} of column {column!r}") for place, item in enumerate(items, 1)]


def _message(item: dict[str, Any], where: str) -> Message:
    tag = item.get("role", item.get("from"))
    content = item["content"] if "content" in item else item.get("value")
    role = _role(tag, item, where)
    message: Message = {"role": role, "content": ""}
    if tag == "function_call":
        message["tool_calls"] = _tool_calls(_parsed(content, where), where)
    elif isinstance(content, list):
        _add_parts(message, content, where)
    elif isinstance(content, str):
        message["content"] = content
    elif content is not None or not item.get("tool_calls"):
        raise BadRow(f"{where} has {describe(content)} as its content; text is needed")
    if item.get("tool_calls"):
        message["tool_calls"] = _tool_calls(item["tool_calls"], where)
    message.update({key: item[key] for key in _KEPT if isinstance(item.get(key), str)})
    return message


def _role(tag: Any, item: dict[str, Any], where: str) -> str:
    if isinstance(tag, str) and tag.lower() in ROLES:
        return ROLES[tag.lower()]
    if tag is None:
        raise BadRow(f"{where} has neither 'role' nor 'from'; it has {quoted(item)}")
    close = nearest(str(tag), ROLES)
    hint = f" (did you mean {close!r}?)" if close else ""
    raise BadRow(f"{where} has the unknown role {tag!r}{hint}; known roles: {', '.join(ROLES)}")


def _add_parts(message: Message, parts: list[Any], where: str) -> None:
    """Add typed parts: ``{"type": "text", "text" | "value": …}``, and reasoning and tool calls."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get("text") if kind == "text" and part.get("text") is not None else None
        value = part.get("value") if value is None and isinstance(part, dict) else value
        if kind not in ("text", "reasoning", "tool_call"):
            raise BadRow(
                f"{where} has a part that is {describe(part if kind is None else kind)}; only text is read"
            )
        if not isinstance(value, str):
            raise BadRow(f"{where} has a {kind} part with {describe(value)}; text is needed")
        if kind == "text":
            message["content"] += value
        elif kind == "reasoning":
            message["reasoning_content"] = message.get("reasoning_content", "") + value
        else:
            message.setdefault("tool_calls", []).extend(_tool_calls(_parsed(value, where), where))


def _parsed(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{where} is a function call that is not JSON ({error.msg}): {describe(text)}") from None


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls as OpenAI writes them, their arguments as an object, which is what templates expect."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{where} has a function call without a name: {describe(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(json.JSONDecodeError):  # else it is left as it is: some tools take plain text
                arguments = json.loads(arguments)
        _check_numbers(arguments, where)
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append(
            {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return made


def _check_numbers(value: Any, where: str) -> None:
    """Refuse whole numbers beyond 64 bits: JSON columns of ``datasets`` hand such objects back as text."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item, where)
    elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise BadRow(
            f"{where} has a function call with the number {value}, which does not fit 64 bits; quote it"
        )


def tool_schemas(value: Any) -> str | None:
    """Return tool definitions as the JSON text that TRL's trainers read, or None where there are none.

    Bare ``{"name", "parameters"}`` definitions are put in OpenAI's envelope, as LLaMA-Factory does.

    Raises:
        BadRow: if they are not a list of objects, or text that is not the JSON of one.

    Examples:
        >>> tool_schemas('[{"name": "now", "parameters": {}}]')
        '[{"type": "function", "function": {"name": "now", "parameters": {}}}]'
        >>> tool_schemas("[]") is None
        True
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise BadRow(f"column 'tools' is not JSON ({error.msg}): {describe(value)}") from None
    if not value:
        return None
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in items):
        raise BadRow(f"column 'tools' holds {describe(value)}; a list of tool definitions is needed")
    return json.dumps([_enveloped(item) for item in items], ensure_ascii=False)


def _enveloped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "type" in tool else {"type": "function", "function": tool}


def is_blank(message: Message) -> bool:
    """Return whether a message says nothing and calls nothing."""
    return not message["content"].strip() and not message.get("tool_calls")


def is_plain(message: Message) -> bool:
    """Return whether a message is a role and its text, and nothing else."""
    return len(message) == 2
