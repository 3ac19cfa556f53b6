"""Responses of models to prompts: what was said, token by token, how likely it was, and why it ended.

:class:`TransformersSampler` generates with a transformers model in this process. Nothing here knows of
training: any code that has a model and prompts can use it. Importing this package loads no transformers.
"""

from __future__ import annotations

from trimtab.sampling.draws import Sampling, draw, generator, sampled_probabilities, uniforms
from trimtab.sampling.prompts import encode_prompt
from trimtab.sampling.responses import Response
from trimtab.sampling.transformers_sampler import TransformersSampler

__all__ = [
    "Response",
    "Sampling",
    "TransformersSampler",
    "draw",
    "encode_prompt",
    "generator",
    "sampled_probabilities",
    "uniforms",
]
