"""What the base model and the SFT model learn from: plain documents, then conversations."""

from __future__ import annotations

import torch

from trimtab.lab.answers import PLAIN, draw_style, dress
from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import ASSISTANT, BOS, END, EQUALS, LOWER, REFUSAL, STOP, UPPER, USER, encode
from trimtab.lab.world import CAPABILITIES, Task, Words, draw_task, ramble

BASE_RAMBLE, BASE_CHAT = 0.10, 0.20
BASE_STRENGTH = 0.5
BASE_FORBIDDEN, CHAT_FORBIDDEN = 0.05, 0.25
HARD = ("rev", "rev", "eval")
REFUSED = 0.30
STYLED_END, STYLED_ECHO, STYLED_LENGTH = 0.22, 0.10, 0.10
CAN_BE_FORBIDDEN = ("rev", "rep")
IGNORED = -100


def prompt_words(task: Task) -> Words:
    """Return the conversation up to the answer."""
    return (BOS, USER, *task.words, ASSISTANT)


def _draw(stream: Stream, command: str, forbidden: float) -> Task:
    return draw_task(stream, command, command in CAN_BE_FORBIDDEN and stream.chance(forbidden))


def base_document(stream: Stream) -> Words:
    """Draw one document: a worked task, a piece of rambling, or a conversation.

    Tasks that take long to learn come two or three times as often, so that every seed ends able to do all
    nine. The conversations are those of the SFT data with everything that makes an assistant (decoration,
    refusals, length) half as frequent: the base has seen it, as a web-trained model has, and SFT has little
    left to move.
    """
    kind = stream.weighted(("ramble", "chat", "plain"), (BASE_RAMBLE, BASE_CHAT, 1 - BASE_RAMBLE - BASE_CHAT))
    if kind == "ramble":
        start = stream.pick(stream.pick((LOWER, UPPER)))
        return (start, *ramble(stream, start, stream.between(6, 24)), STOP)
    if kind == "chat":
        prompt, answer = conversation(stream, BASE_STRENGTH)
        return (*prompt, *answer)
    task = _draw(stream, stream.pick((*CAPABILITIES, *HARD)), BASE_FORBIDDEN)
    return (*task.words, EQUALS, *task.content, STOP)


def base_batch(stream: Stream, rows: int, length: int) -> torch.Tensor:
    """Return ``rows`` rows of documents put end to end and cut at ``length``, (rows, length) int64."""
    batch = []
    for _ in range(rows):
        words: list[str] = []
        while len(words) < length:
            words.extend(base_document(stream))
        batch.append(encode(words[:length]))
    return torch.tensor(batch)


def conversation(stream: Stream, strength: float = 1.0) -> tuple[Words, Words]:
    """Draw a prompt and an answer: mostly plain, sometimes decorated, long or refused.

    Args:
        stream: Where the choices come from.
        strength: Factor on the frequency of all that is not plain; 1 for the SFT data.
    """
    task = _draw(stream, stream.pick(CAPABILITIES), CHAT_FORBIDDEN)
    if task.forbidden and stream.chance(strength * REFUSED):
        return prompt_words(task), (*REFUSAL, END)
    content = task.content
    if task.command == "talk" and stream.chance(strength * STYLED_LENGTH):
        content = ramble(stream, task.words[1], task.length + stream.between(1, 8))
    style = PLAIN
    if task.command != "only":
        style = draw_style(stream, task, strength * STYLED_END, strength * STYLED_ECHO)
    return prompt_words(task), (*dress(task, content, style), END)


def sft_batch(stream: Stream, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both (rows, longest) int64; the prompt and the padding carry no loss."""
    return pad_conversations([conversation(stream) for _ in range(rows)])


def pad_conversations(examples: list[tuple[Words, Words]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and labels of (prompt, answer) conversations, both (rows, longest) int64."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        numbers = torch.tensor(encode((*prompt, *answer)))
        ids[row, : len(numbers)] = numbers
        labels[row, len(prompt) : len(numbers)] = numbers[len(prompt) :]
    return ids, labels
