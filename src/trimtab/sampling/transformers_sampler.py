"""Responses of a transformers model in this process.

Shapes: R rows of a batch, P tokens of its longest prompt, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.sampling.draws import Sampling, draw, sampled_probabilities, uniforms
from trimtab.sampling.prompts import Prompt, encode_prompt
from trimtab.sampling.responses import Response


class TransformersSampler:
    """Generates with ``model.generate``, in batches padded on the left, drawing the tokens itself.

    What the model's ``generation_config`` says of sampling (temperatures, penalties, forced tokens) plays no
    part; its end marks do. The model is in eval mode while it generates, with a cache, and is given back as
    it was. No global random number is drawn.

    Args:
        model: a causal language model, or PEFT's wrapper of one.
        tokenizer: its tokenizer.
        batch_size: responses generated at once; it changes speed and memory, and the rest to rounding.

    Examples:
        >>> sampler = TransformersSampler(model, tokenizer)                              # doctest: +SKIP
        >>> ((first, second),) = sampler.sample(["2 + 2 ="], Sampling(8), seed=0, samples=2)
        ...                                                                              # doctest: +SKIP
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @property
    def ends(self) -> list[int]:
        """The tokens that end a response: the tokenizer's and those of the model's ``generation_config``."""
        known = self.model.generation_config.eos_token_id
        found = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        return sorted(found - {None})

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        samples: int = 1,
        streams: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        """Generate responses to each prompt.

        Args:
            prompts: texts, messages or token ids.
            sampling: how tokens are drawn, and how many at most.
            seed: the same seed gives the same responses.
            samples: responses to each prompt, each from its own random numbers.
            streams: what each prompt's random numbers are told apart by; its place in ``prompts`` when None.
                With a number that stays with a prompt, its responses do not depend on the other prompts.

        Returns:
            ``samples`` responses for each prompt, in the order given.

        Raises:
            UserError: for a prompt without tokens, or one that leaves no room in the model's positions; if
                logits are not numbers.
        """
        streams = range(len(prompts)) if streams is None else streams
        rows = [
            (encode_prompt(self.tokenizer, prompt), (stream, sample))
            for prompt, stream in zip(prompts, streams, strict=True)
            for sample in range(samples)
        ]
        self._check_room(rows, sampling.max_new_tokens)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))  # less padding
        found: dict[int, Response] = {}
        with _generating(self.model):
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                made = self._batch([rows[place] for place in places], sampling, seed)
                found.update(zip(places, made, strict=True))
        return [[found[i * samples + k] for k in range(samples)] for i in range(len(prompts))]

    def _check_room(self, rows: list[tuple[list[int], tuple[int, int]]], new: int) -> None:
        room = getattr(self.model.config, "max_position_embeddings", None)
        longest = max((len(ids) for ids, _ in rows), default=0)
        if room is not None and longest + new > room:
            raise UserError(
                f"a prompt of {longest} tokens and {new} new ones do not fit into the model's {room} "
                "positions; lower max_new_tokens or leave out long prompts"
            )

    @torch.no_grad()
    def _batch(
        self, rows: list[tuple[list[int], tuple[int, int]]], sampling: Sampling, seed: int
    ) -> list[Response]:
        from transformers import GenerationConfig, LogitsProcessorList

        width, device = max(len(ids) for ids, _ in rows), self.model.device
        ends, pad = self.ends, self.tokenizer.pad_token_id
        pad = pad if pad is not None else (ends[0] if ends else 0)
        ids_RP = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in rows], device=device)
        mask_RP = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows], device=device)
        numbers_RT = uniforms(seed, [key for _, key in rows], sampling.max_new_tokens)
        drawing = _Drawing(sampling, numbers_RT, lambda row: self._named(rows[row][0]))
        whole = self.model.generate(
            input_ids=ids_RP,
            attention_mask=mask_RP,
            logits_processor=LogitsProcessorList([drawing]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # what is drawn is all that the processor leaves
                use_cache=True,
                eos_token_id=ends or None,
                pad_token_id=pad,
            ),
        )
        tokens = whole[:, width:].tolist()
        logps = torch.stack(drawing.log_probabilities, 1).tolist()
        return [self._response(*row) for row in zip((ids for ids, _ in rows), tokens, logps, strict=True)]

    def _named(self, prompt_ids: list[int]) -> str:
        """How a prompt ends, for a sentence."""
        text = " ".join(self.tokenizer.decode(prompt_ids, skip_special_tokens=True).split())
        return repr(text if len(text) <= 60 else f"…{text[-57:]}")

    def _response(self, prompt_ids: list[int], tokens: list[int], logps: list[float]) -> Response:
        ends = self.ends
        stop = next((place for place, token in enumerate(tokens) if token in ends), None)
        length = len(tokens) if stop is None else stop + 1
        said = tokens[:length] if stop is None else tokens[:stop]
        return Response(
            prompt_ids=tuple(prompt_ids),
            ids=tuple(tokens[:length]),
            log_probabilities=tuple(logps[:length]),
            text=self.tokenizer.decode(said, skip_special_tokens=True),
            end="length" if stop is None else "eos",
        )


class _Drawing:
    """A logits processor that draws each row's next token and leaves no other; it keeps what that costs."""

    def __init__(
        self, sampling: Sampling, uniforms_RT: torch.Tensor, prompt_of: Callable[[int], str]
    ) -> None:
        self.sampling, self.uniforms_RT, self.prompt_of = sampling, uniforms_RT, prompt_of
        self.log_probabilities: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, logits_RV: torch.Tensor) -> torch.Tensor:
        device = logits_RV.device
        if device.type == "mps":  # has no float64, in which tokens are drawn
            logits_RV = logits_RV.cpu()
        normalizer_R = logits_RV.logsumexp(-1)
        broken = (~normalizer_R.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"the model's probabilities are not finite in answering {self.prompt_of(broken[0])}; its "
                "weights or this prompt are broken"
            )
        place = min(len(self.log_probabilities), self.uniforms_RT.shape[1] - 1)
        uniform_R = self.uniforms_RT[:, place].to(logits_RV.device)
        tokens_R1 = draw(sampled_probabilities(logits_RV, self.sampling), uniform_R)[:, None]
        chosen_R = logits_RV.gather(-1, tokens_R1).squeeze(-1) - normalizer_R
        self.log_probabilities.append(chosen_R)
        return torch.full_like(logits_RV, -torch.inf).scatter(-1, tokens_R1, 0.0).to(device)


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """The model in eval mode and with a ``generation_config`` that says nothing."""
    from transformers import GenerationConfig

    training, settings = model.training, model.generation_config
    ends = GenerationConfig(eos_token_id=settings.eos_token_id)
    model.eval()
    model.generation_config = ends
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)
