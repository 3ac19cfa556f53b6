"""Responses of models to the prompts that are there, as candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.model_folder import ModelFolder, load_model, load_tokenizer
from trimtab.ranking.candidates import Candidate, Candidates, Question, Tally
from trimtab.sampling import Response, Sampling, TransformersSampler, encode_prompt
from trimtab.terminal import progress_bar

CHUNK = 32
"""Prompts between two moves of the progress bar."""


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
        UserError: if the model cannot be loaded, or has no chat template for messages.
    """
    tokenizer = load_tokenizer(model)
    loaded: Any = load_model(model, {}, trainable=False)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    sampler = TransformersSampler(loaded, tokenizer, batch_size)
    tally = Tally(name)
    candidates.tallies.append(tally)
    asked = list(enumerate(candidates.questions.items()))
    room = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    with progress_bar(f"answering with {name}", len(asked)) as advance:
        for first in range(0, len(asked), CHUNK):
            chunk = asked[first : first + CHUNK]
            fits = [one for one in chunk if _fits(tokenizer, one[1][1].prompt, sampling.max_new_tokens, room)]
            tally.without_room += len(chunk) - len(fits)
            found = sampler.sample(
                [question.prompt for _, (_, question) in fits],
                sampling,
                seed=seed,
                samples=samples,
                streams=[stream for stream, _ in fits],
            )
            for (_, (key, question)), responses in zip(fits, found, strict=True):
                tally.prompts.add(key)
                _add(question, responses, candidates, tally)
            advance(len(chunk))
    return tally


def _fits(tokenizer: Any, prompt: Any, new: int, room: int | None) -> bool:
    return room is None or len(encode_prompt(tokenizer, prompt)) + new <= room


def _add(question: Question, responses: Sequence[Response], candidates: Candidates, tally: Tally) -> None:
    for response in responses:
        tally.cut += response.end == "length"
        candidates.add(question, Candidate(response.text, tally.name, tally, question.row, tally.name))
