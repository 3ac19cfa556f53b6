"""A policy with a value head: what it makes of tokens, in several architectures; put aside and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from tests.oracle import ppo as oracle
from tests.unit.sampling.test_transformers_sampler import expected_response
from trimtab import UserError
from trimtab.sampling import Sampling, TransformersSampler, uniforms
from trimtab.train.ppo_model import (
    ValueHead,
    add_value_head,
    read_tokens,
    sequences,
    switch_dropout_off,
    without_value_head,
)

PAIRS = [([20, 21, 22], [9, 30, 31, 1]), ([40], [8]), ([50, 51, 52, 53, 54, 55], [7, 7, 3])]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=104, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def bloom() -> Any:
    """Takes no positions."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=104, hidden_size=32, n_layer=2, n_head=2))


def gemma2() -> Any:
    """Caps its logits and looks through windows in every other layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 3}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=104, final_logit_softcapping=2.0, **sizes, **heads))


ARCHITECTURES = {"llama": lambda: tiny.model(tied=False), "gpt2": gpt2, "bloom": bloom, "gemma2": gemma2}


@pytest.fixture(params=ARCHITECTURES)
def policy(request: Any) -> Any:
    torch.manual_seed(0)
    model = ARCHITECTURES[request.param]()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = 1, 0, None
    add_value_head(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def test_tokens_are_read_as_one_row_without_padding_reads_them(policy: Any) -> None:
    policy.double()
    logps, values, logits = read_tokens(policy, sequences(PAIRS, 0), head=policy.value_head, temperature=0.7)
    head = (policy.value_head.weight[0], policy.value_head.bias[0])
    expected = [
        oracle.token_terms(policy, head, oracle.Episode(prompt, response, 0.0), 0.7)
        for prompt, response in PAIRS
    ]
    assert logits.shape == (8, 104)
    torch.testing.assert_close(logps, torch.cat([one for one, _ in expected]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values, torch.cat([one for _, one in expected]), rtol=1e-9, atol=1e-9)


def test_responses_are_drawn_from_it(policy: Any) -> None:
    prompts = [prompt for prompt, _ in PAIRS]
    found = TransformersSampler(policy, tiny.tokenizer(), batch_size=3).sample(prompts, Sampling(5), seed=0)
    for place, (prompt, (response,)) in enumerate(zip(prompts, found, strict=True)):
        numbers = uniforms(0, [(place, 0)], 5)[0].tolist()
        assert list(response.ids) == expected_response(policy, prompt, Sampling(5), numbers)


def test_a_value_head_starts_at_0_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    head = ValueHead(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert head.weight.dtype == torch.float32
    values = head(torch.randn(2, 3, 4, dtype=torch.bfloat16))
    assert values.shape == (2, 3)
    assert not values.any()


def test_it_is_put_aside_and_back(policy: Any) -> None:
    names = [name for name, _ in policy.named_parameters()]
    head = policy.value_head
    with without_value_head(policy) as aside:
        assert aside is head
        assert not any("value_head" in name for name in policy.state_dict())
    with pytest.raises(OSError, match="disk"), without_value_head(policy):
        raise OSError("disk")
    assert [name for name, _ in policy.named_parameters()] == names


def test_a_model_without_an_output_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="LlamaModel has no output embedding, so it can give no answers"):
        add_value_head(tiny.model().model)


def test_dropout_is_off_in_training_mode_too() -> None:
    model = tiny.model(dropout=0.5).train()
    batch = sequences(PAIRS, 0)
    torch.manual_seed(0)
    noisy = read_tokens(model, batch, head=ValueHead(32))[0]
    switch_dropout_off(model)
    first, second = (read_tokens(model, batch, head=ValueHead(32))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(noisy, first)
    assert model.config.attention_dropout == 0.5
