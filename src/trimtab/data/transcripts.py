r"""Transcripts as Anthropic's helpful-and-harmless data writes them: ``\n\nHuman: … \n\nAssistant: …``."""

from __future__ import annotations

import re
from typing import Any

from trimtab.data.messages import Message
from trimtab.data.outcome import Dropped

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_START = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    r"""Return whether a value is text that starts as a transcript does.

    Examples:
        >>> is_transcript("\n\nHuman: hi\n\nAssistant: hello"), is_transcript("Humans are apes.")
        (True, False)
    """
    return isinstance(value, str) and _START.match(value) is not None


def turns(text: str) -> list[Message]:
    r"""Return the turns of a transcript as messages, without the white space around them.

    A speaker who is announced twice in a row gets one message, the two parts a blank line apart: chat
    templates want speakers to take turns, and in the data such a second part continues the first.

    Raises:
        Dropped: ``malformed``, if the text does not start with a Human turn.

    Examples:
        >>> turns("\n\nHuman: hi\n\nAssistant: hello\n\nAssistant: there")
        [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello\n\nthere'}]
    """
    if not is_transcript(text):
        raise Dropped("malformed")
    _, *parts = _TURN.split(text.strip())
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _ROLES[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            said = f"{messages.pop()['content']}\n\n{said}".strip()
        messages.append({"role": role, "content": said})
    return messages


def opening(text: str) -> list[Message]:
    r"""Return the messages of a transcript that ends with an open Assistant turn: a prompt.

    Examples:
        >>> opening("\n\nHuman: hi\n\nAssistant:")
        [{'role': 'user', 'content': 'hi'}]
    """
    messages = turns(text)
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages
