"""Responses of models to the prompts that are there, as candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder, load_model, load_tokenizer
from trimtab.ranking.candidates import Candidate, Candidates, Question, Tally
from trimtab.rewards.reward import shown
from trimtab.sampling import Response, Sampling, TransformersSampler, encode_prompt
from trimtab.terminal import progress_bar

CHUNK = 32
"""Prompts between two moves of the progress bar."""


@dataclass(frozen=True)
class _Asked:
    """A prompt on its way to the model: its place among all, its key, its tokens."""

    stream: int
    key: bytes
    question: Question
    ids: list[int]


def generate(
    model: ModelFolder,
    name: str,
    candidates: Candidates,
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    batch_size: int,
) -> Tally:
    """Let a model answer every prompt, and add its responses to ``candidates``.

    Args:
        model: a causal language model, or an adapter of one.
        name: what its responses are marked with.
        candidates: have the prompts.
        sampling: how tokens are drawn.
        samples: responses to each prompt.
        seed: of the sampling; a prompt's responses do not depend on the others.
        batch_size: responses generated at once.

    Returns:
        What became of its responses.

    Raises:
        UserError: if the model cannot be loaded, or its chat template is missing or refuses a prompt.
    """
    tokenizer = load_tokenizer(model)
    loaded: Any = load_model(model, {}, trainable=False)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    sampler = TransformersSampler(loaded, tokenizer, batch_size)
    tally = Tally(name)
    candidates.tallies.append(tally)
    entries = list(enumerate(candidates.questions.items()))
    room = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    with progress_bar(f"answering with {name}", len(entries)) as advance:
        for first in range(0, len(entries), CHUNK):
            asked = [
                _Asked(stream, key, question, _encoded(tokenizer, question.prompt, name))
                for stream, (key, question) in entries[first : first + CHUNK]
            ]
            fits = [one for one in asked if room is None or len(one.ids) + sampling.max_new_tokens <= room]
            tally.without_room += len(asked) - len(fits)
            streams = [one.stream for one in fits]
            found = sampler.sample(
                [one.ids for one in fits], sampling, seed=seed, samples=samples, streams=streams
            )
            for one, responses in zip(fits, found, strict=True):
                tally.prompts.add(one.key)
                _add(one.question, responses, candidates, tally)
            advance(len(asked))
    return tally


def _encoded(tokenizer: Any, prompt: Any, name: str) -> list[int]:
    import jinja2

    try:
        return encode_prompt(tokenizer, prompt)
    except UserError as error:
        raise UserError(f"{name}, on the prompt {shown(prompt)}: {error}") from error
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(f"{name}: the chat template refuses the prompt {shown(prompt)}: {error}") from error


def _add(question: Question, responses: Sequence[Response], candidates: Candidates, tally: Tally) -> None:
    for response in responses:
        tally.cut += response.end == "length"
        candidates.add(question, Candidate(response.text, tally.name, tally, question.row, tally.name))
