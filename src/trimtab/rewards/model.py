"""A reward model: the score that a sequence classification model with one label gives a conversation.

Shapes: R rows in a batch, L tokens, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.delta.checkpoint import open_checkpoint, read_json
from trimtab.delta.problems import first_line
from trimtab.errors import UserError
from trimtab.model_folder import ADAPTER_CONFIG, ModelFolder, read_tokenizer
from trimtab.rewards.ranked_batches import in_eval_mode
from trimtab.rewards.reward import Prompt, Rows, checked_scores, shown

_UNLIMITED = 10**9
"""Tokenizers without a limit of their own state one far beyond this."""


class RewardModel:
    """Scores by r(x, y) of a reward model, with its own tokenizer and chat template.

    A conversation is read under the chat template, the response as the assistant's message; a prompt that is
    a text is joined with the response and ends with the end-of-sequence token: as ``method: reward`` trains.
    Rows are batched by length, and what a row is batched with does not change its score but for rounding.

    An input beyond the model's positions loses its oldest tokens (a leading beginning-of-sequence token
    stays), since the score is about the response, which stands at the end.

    Args:
        model: for sequence classification, with one label; it is in eval mode while it scores.
        tokenizer: the model's own.
        name: what it is called.
        batch_size: rows in one forward pass.
        max_length: longest input in tokens; what the model and the tokenizer state when None.

    Attributes:
        truncated: how many inputs were too long so far.

    Examples:
        >>> reward = load_reward("runs/reward/model")                     # doctest: +SKIP
        >>> reward([[{"role": "user", "content": "Hi"}]], ["Hello!"])     # doctest: +SKIP
        [1.73]
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "reward model",
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self.max_length = max_length or longest_input(model, tokenizer)
        self.truncated = 0

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: Rows | None = None
    ) -> list[float]:
        """Score responses.

        Raises:
            UserError: if the tokenizer has no chat template for a prompt of messages, or the template
                refuses them; if a score is not finite.
        """
        encoded = [self._encoded(*pair) for pair in zip(prompts, responses, strict=True)]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        scores = [0.0] * len(encoded)
        with in_eval_mode(self.model):
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                for index, score in zip(batch, self._scores([encoded[i] for i in batch]), strict=True):
                    scores[index] = score
        return checked_scores(self.name, prompts, responses, scores)

    def _encoded(self, prompt: Prompt, response: str) -> list[int]:
        ids: list[int]
        if isinstance(prompt, str):
            end = self.tokenizer.eos_token or ""
            text = (prompt + response).removesuffix(end) + end
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        else:
            ids = self._templated([*prompt, {"role": "assistant", "content": response}])
        if not ids:
            raise UserError(f"{self.name} makes no token of {shown(prompt)} and {shown(response)}")
        return self._cut(ids)

    def _templated(self, messages: list[Any]) -> list[int]:
        import jinja2

        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self.name} has a tokenizer without a chat template, so it cannot score a conversation "
                f"({shown(messages[:-1])}); set tokenizer.chat_template and save it with the model, or give "
                "prompts that are plain text"
            )
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.name}: the chat template refuses the conversation {shown(messages[:-1])}: {error}"
            ) from error
        return ids

    def _cut(self, ids: list[int]) -> list[int]:
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        self.truncated += 1
        opens = ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        return [*ids[:opens], *ids[len(ids) - self.max_length + opens :]]

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        with _padding(self.model.config.get_text_config(), rows) as pad:
            length = max(map(len, rows))
            ids_RL = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
            mask_RL = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
            device = self.model.device
            logits = self.model(input_ids=ids_RL.to(device), attention_mask=mask_RL.to(device)).logits
        scores: list[float] = logits.squeeze(-1).float().tolist()
        return scores


@contextmanager
def _padding(config: Any, rows: list[list[int]]) -> Iterator[int]:
    """The token to pad with, which transformers finds the end of a row by: it looks for the last other one.

    Where a model states none, a token that is in none of the rows, so that each is read to its own end.
    """
    stated = config.pad_token_id
    if stated is not None and stated >= 0:  # some configurations say none as −1
        yield stated
        return
    used = {token for row in rows for token in row}
    config.pad_token_id = next(token for token in range(len(used) + 1) if token not in used)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = stated


def longest_input(model: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a model reads at most, as it and its tokenizer say; None if neither does."""
    stated = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        tokenizer.model_max_length,
    )
    limits = [limit for limit in stated if limit is not None and 0 < limit < _UNLIMITED]
    return min(limits, default=None)


def check_reward_model(model: ModelFolder) -> None:
    """Check, without loading it, that a model gives one score.

    Raises:
        UserError: if it is a language model, an adapter of one, or has several labels.
    """
    if model.is_adapter:
        kind = read_json(model.folder / ADAPTER_CONFIG).get("task_type")
        names = open_checkpoint(model.folder, adapter=True).keys()
        if kind != "SEQ_CLS" or not any(map(_is_head, names)):
            raise _no_reward_model(model, "is an adapter of another kind of model")
        return
    config = read_json(model.folder / "config.json")
    kinds = config.get("architectures") or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise _no_reward_model(model, f"is a {', '.join(kinds) or 'model of no known kind'}")
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if labels != 1:
        raise _no_reward_model(model, f"gives {labels} numbers instead of one")


def load_reward_model(
    model: ModelFolder, *, device: str | torch.device, dtype: Any, name: str, batch_size: int
) -> RewardModel:
    """Load a reward model: a folder that ``method: reward`` wrote, or any with one label.

    Raises:
        UserError: if transformers cannot load it, or its file has no weights for the head.
    """
    tokenizer = read_tokenizer(model)
    loaded = _load(model, dtype).to(device)
    config = loaded.config.get_text_config()
    config.use_cache = False
    if model.is_adapter and tokenizer.pad_token_id is not None:  # PEFT does not keep what was trained with
        config.pad_token_id = tokenizer.pad_token_id
    return RewardModel(loaded, tokenizer, name=name, batch_size=batch_size)


def _load(model: ModelFolder, dtype: Any) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    arguments = {"dtype": dtype, "num_labels": 1, "trust_remote_code": False, "use_safetensors": True}
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # of a head that is drawn, and then replaced by the adapter's
    try:
        if model.is_adapter:
            from peft import AutoPeftModelForSequenceClassification

            return AutoPeftModelForSequenceClassification.from_pretrained(model.folder, **arguments)
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            model.folder, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{model.label!r} cannot be loaded as a reward model: {first_line(error)}") from error
    finally:
        logging.set_verbosity(before)
    if report["missing_keys"]:
        raise _no_reward_model(model, f"lacks weights ({', '.join(sorted(report['missing_keys'])[:3])})")
    return loaded


def _is_head(name: str) -> bool:
    return any(part in ("score", "classifier") for part in name.split("."))


def _no_reward_model(model: ModelFolder, why: str) -> UserError:
    return UserError(
        f"{model.label!r} {why}, so it gives no score; name a reward model (method reward trains one), or "
        "use a language model as a likelihood scorer"
    )
