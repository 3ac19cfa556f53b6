"""The two layouts of ranked responses: the same log-probabilities, gradients and loss, however padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from trimtab import UserError
from trimtab.losses import rrhf_loss, rrhf_terms
from trimtab.rewards.ranked_batches import (
    RRHFCollator,
    block_mask,
    check_shared_prefix,
    encode_ranked,
    plain_head,
    response_log_probabilities,
)

pytestmark = pytest.mark.xdist_group("train")

NEAR = {"rtol": 1e-5, "atol": 1e-5}
"""Sums of up to nine float32 log-probabilities of about −5, taken in another order."""


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """Three prompts with one, three and four responses of one to nine tokens; ties included."""
    draw = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        count = int(torch.randint(1, most + 1, (1,), generator=draw))
        return torch.randint(2, 104, (count,), generator=draw).tolist()

    scores = [[0.5], [1.0, 0.0, 1.0], [0.1, 0.7, 0.3, 0.2]]
    return [{"prompt_ids": ids(12), "response_ids": [ids(9) for _ in s], "scores": s} for s in scores]


def sharp(model: Any) -> Any:
    """Weights ten times larger: attention of a fresh model is nearly uniform and would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model.eval()


def llama(**config: Any) -> Any:
    return sharp(tiny.model(num_key_value_heads=1, **config))


def qwen(**config: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **config)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)  # a fresh model's are zero
    return sharp(model)


def naive(model: Any, data: list[dict[str, Any]]) -> torch.Tensor:
    """One response at a time, no padding, no mask."""
    sums = []
    for row in data:
        for response in row["response_ids"]:
            whole = torch.tensor([row["prompt_ids"] + response])
            logps = torch.log_softmax(model(input_ids=whole).logits[0].double(), -1)
            start = len(row["prompt_ids"])
            sums.append(sum(logps[start + t - 1, token] for t, token in enumerate(response)))
    return torch.stack(sums)


def gradients(model: Any, values: torch.Tensor, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = RRHFCollator(0)(data)
    terms = rrhf_terms(values, batch["lengths"], batch["ranks"], batch["groups"], prompts=len(data))
    model.zero_grad()
    rrhf_loss(terms).backward()
    return {name: parameter.grad.double().clone() for name, parameter in model.named_parameters()}


PADDING: list[dict[str, Any]] = [
    {},
    {"padding_side": "left"},
    {"pad_to_multiple_of": 16},
    {"padding_side": "left", "pad_to_multiple_of": 64},
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, qwen])
def test_both_layouts_give_what_one_response_at_a_time_gives(make: Any, attention: str) -> None:
    model = make(attn_implementation=attention)
    data = rows()
    expected = naive(model, data)
    slopes = gradients(model, expected.float(), data)
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    for layout in ("shared_prefix", "repeated"):
        for padding in PADDING:
            batch = RRHFCollator(0, layout, **padding)(data)
            for head in (plain_head(model), None):
                values = response_log_probabilities(model, batch, head=head)
                torch.testing.assert_close(values.double(), expected, **NEAR)
                for name, slope in gradients(model, values, data).items():
                    torch.testing.assert_close(slope, slopes[name], rtol=1e-4, atol=1e-5 * largest)


def test_in_float64_the_layouts_agree_to_the_last_digits() -> None:
    model = llama(attn_implementation="eager").double()
    expected = naive(model, rows())
    for layout in ("shared_prefix", "repeated"):
        batch = RRHFCollator(0, layout)(rows())
        values = response_log_probabilities(model, batch, head=plain_head(model))
        # Rotary positions and the norms are float32 in transformers whatever the model's dtype.
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


def test_the_shared_prefix_is_shorter_and_bfloat16_autocast_takes_it() -> None:
    model, data = tiny.model(), rows()
    shared, repeated = (RRHFCollator(0, layout)(data) for layout in ("shared_prefix", "repeated"))
    assert shared["input_ids"].shape[0] == len(data)
    assert repeated["input_ids"].shape[0] == sum(len(row["scores"]) for row in data)
    with torch.autocast("cpu", torch.bfloat16):
        values = [
            response_log_probabilities(model, batch, head=plain_head(model)) for batch in (shared, repeated)
        ]
    torch.testing.assert_close(*values, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(values[0].double(), naive(model, data), rtol=2e-2, atol=2e-2)


def test_what_a_batch_holds() -> None:
    data = [
        {"prompt_ids": [5, 6], "response_ids": [[7], [8, 9], [3]], "scores": [0.2, 0.9, 0.2]},
        {"prompt_ids": [4], "response_ids": [[2]], "scores": [-1]},
    ]
    batch = RRHFCollator(0, padding_side="left")(data)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "group_sizes": [3, 1],
        "groups": [0, 0, 0, 1],
        "ranks": [0, 1, 0, 0],
        "lengths": [1, 2, 1, 1],
        "targets": [[7, 0], [8, 9], [3, 0], [2, 0]],
        "slots": [0, 2, 3, 4, 6],
        "predictors": [1, 1, 3, 1, 6 + 4],
        "input_ids": [[5, 6, 7, 8, 9, 3], [0, 0, 0, 0, 4, 2]],
        "position_ids": [[0, 1, 2, 2, 3, 2], [0, 0, 0, 0, 0, 1]],
        "segments": [[0, 0, 1, 2, 2, 3], [-1, -1, -1, -1, 0, 1]],
    }
    assert next(iter(batch)) == "group_sizes"
    mask = block_mask(batch["segments"], torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert bool((mask == 0).any(-1).all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt_ids": []}, "a prompt without tokens"),
        ({"response_ids": [[1], []]}, "response 1 of a row has no tokens"),
        ({"scores": [1.0]}, "2 responses and 1 scores"),
        ({"response_ids": [], "scores": []}, "0 responses and 0 scores"),
        ({"scores": [1.0, float("nan")]}, "each must be a number"),
    ],
)
def test_broken_rows_are_refused(change: dict[str, Any], sentence: str) -> None:
    row = {"prompt_ids": [1], "response_ids": [[1], [2]], "scores": [0.0, 1.0], **change}
    with pytest.raises(UserError, match=sentence):
        RRHFCollator(0)([row])


def gemma(**config: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**shape, **heads, **config)).float().eval()


def test_a_head_that_is_more_than_a_product_is_not_taken_for_one() -> None:
    model = sharp(gemma(attn_implementation="eager", final_logit_softcapping=1.0))
    assert plain_head(model) is None
    values = response_log_probabilities(model, RRHFCollator(0, "repeated")(rows()))
    torch.testing.assert_close(values.double(), naive(model, rows()), **NEAR)
    assert plain_head(gemma(attn_implementation="eager")) is None  # a cap of 30 is in the last digits only
    assert plain_head(tiny.model(tied=False)) is not None
    assert "forward" not in vars(tiny.model().lm_head)


def test_models_that_cannot_share_a_prefix_are_refused() -> None:
    check_shared_prefix(tiny.model())
    with pytest.raises(UserError, match="window of 4096"):
        check_shared_prefix(gemma(attn_implementation="eager"))
    model = tiny.model()
    inner = model.forward
    model.forward = lambda position_ids, **kwargs: inner(
        **{**kwargs, "attention_mask": None, "position_ids": position_ids}
    )
    with pytest.raises(UserError, match="does not follow the mask"):
        check_shared_prefix(model)
    model.forward = lambda **kwargs: inner(**kwargs)
    with pytest.raises(UserError, match="takes position_ids"):
        check_shared_prefix(model)
    model.config.attn_implementation = "flash_attention_2"
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="sdpa or eager"):
        check_shared_prefix(model)


def test_encoding() -> None:
    tokenizer = tiny.tokenizer()
    chat = encode_ranked(tokenizer, [{"role": "user", "content": "hi"}], ["a", "bc"])
    assert tokenizer.decode(chat["prompt_ids"]) == "<|user|>hi<|end|><|assistant|>"
    assert [tokenizer.decode(ids) for ids in chat["response_ids"]] == ["a<|end|>", "bc<|end|>"]
    text = encode_ranked(tokenizer, "hi ", ["a", "bc"])
    assert tokenizer.decode(text["prompt_ids"]) == "hi "
    assert [tokenizer.decode(ids) for ids in text["response_ids"]] == ["a<|end|>", "bc<|end|>"]
    with pytest.raises(UserError, match="chat template"):
        encode_ranked(tiny.tokenizer(chat_template=None), [{"role": "user", "content": "hi"}], ["a"])
