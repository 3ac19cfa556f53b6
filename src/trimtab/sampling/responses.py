"""What a sampler returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Response:
    """One response to one prompt.

    Args:
        prompt_ids: the tokens it follows.
        ids: its tokens, with the end mark where it has one; never padding.
        log_probabilities: log π(token | what is before it) of each, in nats, of the **model itself**: at
            temperature 1 and before ``top_p`` and ``top_k``, whatever it was sampled with.
        text: its tokens as text, without marks.
        end: ``eos`` where the model ended it, ``length`` where ``max_new_tokens`` did.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    text: str
    end: Literal["eos", "length"]
