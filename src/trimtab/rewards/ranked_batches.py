"""Prompts with ranked responses as batches, and log P of every response of a batch.

Shapes: B prompts, R responses of all of them, S sequences that the model reads, L their length, N tokens of
all responses, T tokens of the longest response.

Two layouts hold the same responses. ``repeated`` reads every response after its own copy of the prompt: S =
R. ``shared_prefix`` reads each prompt once, followed by all its responses in one row (S = B): a response sees
the prompt and itself, and its positions go on from the prompt's end, so that the model computes for it what
it would compute without the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch

from trimtab.errors import UserError
from trimtab.evaluate import encode
from trimtab.losses import head_log_probabilities, selective_log_softmax

Layout = Literal["shared_prefix", "repeated"]
Batch = dict[str, torch.Tensor]
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RRHFCollator:
    """Rows ``{prompt_ids, response_ids: [k lists], scores: [k]}`` to a batch; k may differ between rows.

    A batch has ``group_sizes`` (B,), and for each response ``groups``, ``ranks`` (the place of its score
    among the prompt's distinct scores, so that ties stay ties), ``lengths`` (R,) and ``targets`` (R, T); for
    each response token ``slots`` (its place in the flattened targets) and ``predictors`` (the place in the
    flattened S × L positions that predicts it) (N,); and what the model reads: ``input_ids``,
    ``position_ids`` and, for ``repeated``, ``attention_mask``, for ``shared_prefix``, ``segments`` (0 the
    prompt, 1 … k its responses, −1 padding), all (S, L). No key is called ``labels``: the Trainer would count
    its tokens.

    Args:
        pad_token_id: what padding is made of; it is never attended to.
        layout: see the module.
        padding_side: where shorter sequences are filled up.
        pad_to_multiple_of: round L up to a multiple.

    Examples:
        >>> row = {"prompt_ids": [5, 6], "response_ids": [[7], [8, 9]], "scores": [0.1, 0.7]}
        >>> batch = RRHFCollator(pad_token_id=0)([row])
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]])
        >>> batch["predictors"].tolist()  # the prompt's end predicts the first token of both responses
        [1, 1, 3]
    """

    pad_token_id: int
    layout: Layout = "shared_prefix"
    padding_side: Literal["left", "right"] = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Put rows together.

        Raises:
            UserError: for a row without prompt, responses or a finite score for each, or an empty response.
        """
        for row in rows:
            _check(row)
        responses = [ids for row in rows for ids in row["response_ids"]]
        sizes = [len(row["response_ids"]) for row in rows]
        lengths = torch.tensor([len(ids) for ids in responses])
        mask_RT = torch.arange(int(lengths.max())) < lengths[:, None]
        return {
            "group_sizes": torch.tensor(sizes),  # first: the Trainer takes the batch size from it
            "groups": torch.repeat_interleave(torch.tensor(sizes)),
            "ranks": torch.tensor([rank for row in rows for rank in _ranks(row["scores"])]),
            "lengths": lengths,
            "targets": _padded(responses, mask_RT.shape[1], 0, "right"),
            "slots": mask_RT.flatten().nonzero().squeeze(1),
            **self._sequences(rows),
        }

    def _sequences(self, rows: Sequence[dict[str, Any]]) -> Batch:
        parts = [(row["prompt_ids"], responses) for row in rows for responses in self._together(row)]
        sequences = [_Sequence.of(prompt, responses) for prompt, responses in parts]
        length = max(len(sequence.ids) for sequence in sequences)
        if self.pad_to_multiple_of:
            length = math.ceil(length / self.pad_to_multiple_of) * self.pad_to_multiple_of
        predictors = [
            number * length + (length - len(sequence.ids) if self.padding_side == "left" else 0) + place
            for number, sequence in enumerate(sequences)
            for place in sequence.predictors
        ]
        segments = self._table([sequence.segments for sequence in sequences], length, -1)
        shared = self.layout == "shared_prefix"
        return {
            "predictors": torch.tensor(predictors),
            "input_ids": self._table([sequence.ids for sequence in sequences], length, self.pad_token_id),
            "position_ids": self._table([sequence.positions for sequence in sequences], length, 0),
            **({"segments": segments} if shared else {"attention_mask": (segments >= 0).long()}),
        }

    def _together(self, row: dict[str, Any]) -> list[list[list[int]]]:
        """The responses of a row, by the sequence they are read in."""
        responses = row["response_ids"]
        return [responses] if self.layout == "shared_prefix" else [[ids] for ids in responses]

    def _table(self, lists: list[list[int]], length: int, fill: int) -> torch.Tensor:
        return _padded(lists, length, fill, self.padding_side)


@dataclass(frozen=True)
class _Sequence:
    """A prompt and responses to it in one row, not yet padded."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    predictors: list[int]

    @classmethod
    def of(cls, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> _Sequence:
        end = len(prompt)
        made = cls([*prompt], [*range(end)], [0] * end, [])
        for number, response in enumerate(responses, 1):
            start, length = len(made.ids), len(response)
            made.ids.extend(response)
            made.positions.extend(range(end, end + length))
            made.segments.extend([number] * length)
            made.predictors.extend([end - 1, *range(start, start + length - 1)])
        return made


def block_mask(segments_SL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive attention mask of the ``shared_prefix`` layout.

    A position sees those before it in its prompt and in its own response, and itself; 0 where it sees and
    the lowest finite number of the dtype elsewhere. Padding sees itself at least, so that no row is empty.

    Args:
        segments_SL: 0 for the prompt, 1 … k for its responses, −1 for padding, shape (S, L).
        dtype: the model's.

    Returns:
        Shape (S, 1, L, L), as transformers' ``sdpa`` and ``eager`` attention take it.

    Examples:
        >>> (block_mask(torch.tensor([[0, 1, 2]]), torch.float32) == 0).int().tolist()
        [[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]
    """
    length = segments_SL.shape[1]
    places_L = torch.arange(length, device=segments_SL.device)
    seen_S1L, sees_SL1 = segments_SL[:, None, :], segments_SL[:, :, None]
    visible_SLL = ((seen_S1L == 0) | (seen_S1L == sees_SL1)) & (seen_S1L >= 0)
    visible_SLL = visible_SLL & (places_L[:, None] >= places_L) | (places_L[:, None] == places_L)
    mask_SLL = torch.zeros(visible_SLL.shape, dtype=dtype, device=segments_SL.device)
    return mask_SLL.masked_fill_(~visible_SLL, torch.finfo(dtype).min)[:, None]


def response_log_probabilities(
    model: Any, batch: Batch, *, head: torch.nn.Linear | None = None, through: Any = None
) -> torch.Tensor:
    """Σ_t log P(y_t | prompt, y_<t) of every response of a batch.

    Args:
        model: a causal language model.
        batch: of :class:`RRHFCollator`, on the model's device.
        head: the model's output embedding (:func:`plain_head`): it is then applied to the positions that
            predict a response token only, in chunks. None lets the model make all its logits.
        through: the wrapper to call the model through, such as DDP's; the model itself when None.

    Returns:
        Log-probabilities in nats, float32 or wider, shape (R,), differentiable.
    """
    targets_N = batch["targets"].flatten()[batch["slots"]]
    mask = batch.get("attention_mask")
    if mask is None:
        mask = block_mask(batch["segments"], model.dtype)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}

    def predict(hidden_SLD: torch.Tensor) -> torch.Tensor:
        assert head is not None
        hidden_ND = hidden_SLD.flatten(0, 1)[batch["predictors"]]
        return head_log_probabilities(hidden_ND, head.weight, targets_N, head.bias)

    with _instead(head, predict):
        caller = model if through is None else through
        outputs = caller(**inputs, use_cache=False).logits
    if head is None:
        outputs = selective_log_softmax(outputs.flatten(0, 1)[batch["predictors"]], targets_N)
    table_RT = outputs.new_zeros(batch["targets"].numel()).scatter(0, batch["slots"], outputs)
    sums_R: torch.Tensor = table_RT.view(batch["targets"].shape).sum(1)
    return sums_R


@torch.no_grad()
def plain_head(model: Any) -> torch.nn.Linear | None:
    """The output embedding, if the model's logits are nothing but its product with the hidden states.

    Where a model caps or scales its logits, or an adapter sits on the output embedding, None. It is found
    out by trying on one token, where the same product must give the same bits.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or "forward" in vars(head):
        return None
    token = torch.ones(1, 1, dtype=torch.long, device=head.weight.device)
    with in_eval_mode(model):
        expected = model(input_ids=token, use_cache=False).logits
        with _instead(head, lambda hidden: hidden):
            hidden = model(input_ids=token, use_cache=False).logits
    if hidden.shape[-1] != head.in_features:
        return None
    same = torch.equal(head(hidden.to(head.weight.dtype)).to(expected.dtype), expected)
    return head if same else None


@torch.no_grad()
def check_shared_prefix(model: Any) -> None:
    """Make sure that the model keeps the responses of a shared prefix apart; found out by trying.

    Raises:
        UserError: if its attention takes no mask of its own, looks through a window, or lets one response
            change what another gets, or if it takes no positions.
    """
    kind, window = model.config._attn_implementation, _window(model.config)
    instead = "; the layout 'repeated' works with every model"
    if kind not in ("sdpa", "eager"):
        raise UserError(
            f"the layout 'shared_prefix' needs attn_implementation sdpa or eager, not {kind!r}{instead}"
        )
    if window is not None:
        raise UserError(
            f"the layout 'shared_prefix' does not go with attention through a window of {window}{instead}"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's wrapper
    if "position_ids" not in signature(inner.forward).parameters:
        raise UserError(f"the layout 'shared_prefix' needs a model that takes position_ids{instead}")
    if _leaks(model):
        raise UserError(
            f"the layout 'shared_prefix' changes what {type(inner).__name__} computes: its attention does "
            f"not follow the mask it is given{instead}"
        )


def _leaks(model: Any) -> bool:
    """Whether the second response gets another value when the first is another, or when it is alone."""
    device = model.get_input_embeddings().weight.device
    found = []
    with in_eval_mode(model):
        for layout, first in (("shared_prefix", [3, 1]), ("shared_prefix", [1, 2]), ("repeated", [3, 1])):
            row = {"prompt_ids": [1, 2], "response_ids": [first, [2, 3]], "scores": [0, 1]}
            batch = RRHFCollator(0, layout)([row])  # type: ignore[arg-type]
            batch = {key: value.to(device) for key, value in batch.items()}
            found.append(response_log_probabilities(model, batch)[1])
    near = min(100 * torch.finfo(model.dtype).eps, 2e-2)
    return bool(found[0] != found[1]) or not torch.allclose(found[0], found[2], rtol=near)


def encode_ranked(tokenizer: Any, prompt: Any, responses: Sequence[Any]) -> dict[str, Any]:
    """Token ids of a prompt and of responses to it, as :class:`RRHFCollator` reads them.

    A conversation goes through the chat template, and a response is what the template writes after the
    generation prompt, its end-of-turn mark included. A prompt that is a text is followed by the response as
    it stands and the end-of-sequence token; the two are cut into tokens apart, so that all responses follow
    the same prompt tokens.

    Args:
        tokenizer: the model's.
        prompt: a text, or messages ``{"role", "content"}`` without the answer.
        responses: texts; for a conversation also lists of messages.

    Returns:
        ``{"prompt_ids", "response_ids"}``.

    Raises:
        UserError: if the chat template is missing, refuses the messages, or does not write the response
            after the prompt.
    """
    if isinstance(prompt, str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses]
        return {"prompt_ids": tokenizer(prompt)["input_ids"], "response_ids": [ids + end for ids in texts]}
    import jinja2

    if tokenizer.chat_template is None:
        raise UserError("a prompt of messages needs a tokenizer with a chat template; this one has none")
    try:
        encoded = [encode(tokenizer, prompt, _answer(response)) for response in responses]
    except ValueError as error:
        raise UserError(str(error)) from error
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from error
    prompt_ids = list(encoded[0].ids[: encoded[0].start]) if encoded else []
    return {"prompt_ids": prompt_ids, "response_ids": [list(one.ids[one.start :]) for one in encoded]}


def padding_token(tokenizer: Any) -> int:
    """What to pad with; padding is never attended to, so any token will do where the tokenizer has none."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if token is not None), 0)


def _answer(response: Any) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _check(row: dict[str, Any]) -> None:
    responses, scores = row["response_ids"], row["scores"]
    if not row["prompt_ids"]:
        raise UserError("a row of ranked responses has a prompt without tokens; it needs at least one")
    if not responses or len(responses) != len(scores):
        raise UserError(
            f"a row of ranked responses has {len(responses)} responses and {len(scores)} scores; it needs at "
            "least one response and a score for each"
        )
    if any(not ids for ids in responses):
        empty = next(place for place, ids in enumerate(responses) if not ids)
        raise UserError(f"response {empty} of a row has no tokens; leave it out or give it its end mark")
    if not all(math.isfinite(score) for score in scores):
        raise UserError(f"a row of ranked responses has the scores {list(scores)}; each must be a number")


def _ranks(scores: Sequence[float]) -> list[int]:
    places = {score: place for place, score in enumerate(sorted(set(scores)))}
    return [places[score] for score in scores]


def _padded(lists: list[Any], length: int, fill: int, side: str) -> torch.Tensor:
    filled = [([fill] * (length - len(ids)), list(ids)) for ids in lists]
    return torch.tensor([pad + ids if side == "left" else ids + pad for pad, ids in filled])


def _window(config: Any) -> int | None:
    """How far the attention of some layer looks back; None where that is unlimited."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any(kind != "full_attention" for kind in kinds):
        return None
    return window


@contextmanager
def _instead(head: torch.nn.Linear | None, function: Function) -> Iterator[None]:
    """Let the model's forward pass end in ``function`` of its hidden states where it would make logits.

    Inside the forward pass, because DDP looks for the parameters in use in what that returns.
    """
    if head is None:
        yield
        return
    head.forward = function  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Put a model into eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
