"""How a token is drawn from a model's logits, and where the randomness comes from.

Shapes: R rows, V vocabulary, T tokens.

Each row has its own stream of uniform numbers, one a token, and a token is where that number falls among the
cumulated probabilities. So a response depends on its own seed and on nothing else: not on the other rows of
the batch, not on padding, not on how many processes share the prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    The order is transformers': logits are divided by the temperature, then ``top_k``, then ``top_p``.

    Args:
        max_new_tokens: longest response, the end mark included; at least 1.
        temperature: above 0; 0 takes the likeliest token (of several, the one with the lowest id).
        top_p: smallest set of likeliest tokens whose probability reaches this share, in (0, 1]; 1 keeps all.
        top_k: this many likeliest tokens; 0 keeps all.

    Raises:
        UserError: for a value outside of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a number, 0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
        ):
            if not fits:
                raise UserError(f"{name} must be {range_}, not {getattr(self, name)}")


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose numbers hang on a key and on nothing else.

    Examples:
        >>> [int(torch.randint(100, (), generator=generator(0, "order", 3))) for _ in range(2)]
        [42, 42]
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniforms(seed: int, streams: Sequence[tuple[int, ...]], count: int) -> torch.Tensor:
    """Uniform numbers of several streams.

    Args:
        seed: of the call.
        streams: what tells one stream from another, such as (prompt, sample); equal ones give equal numbers.
        count: T, numbers of each.

    Returns:
        Numbers in [0, 1), float64, shape (R, T). The first numbers do not depend on ``count``.

    Examples:
        >>> long, short = uniforms(0, [(0, 0), (7, 1)], 5), uniforms(0, [(7, 1)], 2)
        >>> torch.equal(long[1:, :2], short)
        True
    """
    keyed = [generator(seed, *stream) for stream in streams]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=one) for one in keyed])


def sampled_probabilities(logits_RV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that tokens are drawn from.

    Args:
        logits_RV: the model's logits, shape (R, V).
        sampling: temperature, ``top_k`` and ``top_p``.

    Returns:
        Probabilities that add up to 1 in each row, float64, shape (R, V). Of tokens that are equally likely,
        those with lower ids are kept.

    Examples:
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> sampled_probabilities(logits, Sampling(top_p=0.6)).tolist()[0][2]
        0.0
    """
    logits_RV = logits_RV.double()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_RV.argmax(-1), logits_RV.shape[-1]).double()
    probabilities_RV = (logits_RV / sampling.temperature).softmax(-1)
    if not sampling.top_k and sampling.top_p == 1:
        return probabilities_RV
    sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        sorted_RV[:, sampling.top_k :] = 0
        sorted_RV = sorted_RV / sorted_RV.sum(-1, keepdim=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    sorted_RV = sorted_RV.where(before_RV < sampling.top_p, 0.0)
    kept_RV = torch.zeros_like(sorted_RV).scatter(-1, order_RV, sorted_RV)
    return kept_RV / kept_RV.sum(-1, keepdim=True)


def draw(probabilities_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The token of each row whose share of [0, 1) holds the row's number.

    Args:
        probabilities_RV: of :func:`sampled_probabilities`.
        uniform_R: numbers in [0, 1), shape (R,).

    Returns:
        Token ids, shape (R,); never one whose probability is 0.

    Examples:
        >>> draw(torch.tensor([[0.5, 0.0, 0.5]]).double(), torch.tensor([0.5]).double()).tolist()
        [2]
    """
    cumulated_RV = probabilities_RV.cumsum(-1)
    total_R = cumulated_RV[:, -1]
    # A number so close to 1 that it would round to the total must still fall below it.
    places_R = torch.minimum(uniform_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    return torch.searchsorted(cumulated_RV, places_R[:, None], right=True).squeeze(-1)
