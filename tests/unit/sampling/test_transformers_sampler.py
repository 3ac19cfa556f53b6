"""Responses of the tiny model: one row without padding, token by token, is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from tests.oracle.losses import log_probabilities
from trimtab import UserError
from trimtab.sampling import Sampling, TransformersSampler, encode_prompt, sampled_probabilities, uniforms

PROMPTS = ([20, 21, 22], [9], [30, 31, 32, 33, 34, 35, 36])
END = 1


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model(tied=False).double()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def expected_response(model: Any, prompt: list[int], sampling: Sampling, numbers: list[float]) -> list[int]:
    """Without cache, batch or padding: the whole sequence is read anew for every token."""
    ids = list(prompt)
    for number in numbers:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1].float()
        reached, token = 0.0, -1
        shares = sampled_probabilities(logits, sampling)[0].tolist()
        while reached <= number:
            token += 1
            reached += shares[token]
        ids.append(token)
        if token == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "sampling", [Sampling(12), Sampling(12, temperature=2.0, top_p=0.9, top_k=50)], ids=["plain", "warped"]
)
def test_responses_are_drawn_token_by_token(model: Any, tokenizer: Any, sampling: Sampling) -> None:
    found = TransformersSampler(model, tokenizer, batch_size=4).sample(PROMPTS, sampling, seed=3, samples=2)
    assert [len(responses) for responses in found] == [2, 2, 2]
    for place, (prompt, responses) in enumerate(zip(PROMPTS, found, strict=True)):
        for sample, response in enumerate(responses):
            numbers = uniforms(3, [(place, sample)], 12)[0].tolist()
            assert list(response.ids) == expected_response(model, prompt, sampling, numbers)
            assert response.prompt_ids == tuple(prompt)
            assert response.end == ("eos" if response.ids[-1] == END else "length")
            said = [token for token in response.ids if token != END]
            assert response.text == tokenizer.decode(said, skip_special_tokens=True)
            # Of the model itself, whatever it was sampled with; generate hands on float32 logits.
            plain = log_probabilities(model, prompt, list(response.ids))
            assert list(response.log_probabilities) == pytest.approx(plain, rel=1e-5)


def test_padding_and_company_change_nothing(model: Any, tokenizer: Any) -> None:
    together = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(10), seed=0)
    sampler = TransformersSampler(model, tokenizer, batch_size=1)
    for stream, prompt in enumerate(PROMPTS):
        ((alone,),) = sampler.sample([prompt], Sampling(10), seed=0, streams=[stream])
        assert alone.ids == together[stream][0].ids
        assert alone.log_probabilities == pytest.approx(together[stream][0].log_probabilities, rel=1e-5)


def test_what_is_drawn_hangs_on_the_seed_alone(model: Any, tokenizer: Any) -> None:
    sampler = TransformersSampler(model, tokenizer)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler.sample(PROMPTS, Sampling(8), seed=5)
    assert torch.equal(torch.get_rng_state(), before), "no global random number is drawn"
    torch.manual_seed(1)
    assert sampler.sample(PROMPTS, Sampling(8), seed=5) == first
    assert sampler.sample(PROMPTS, Sampling(8), seed=6) != first


def ending(tied: Any, chance: float) -> Any:
    """A model whose every token is the end mark with about that chance."""
    model = tiny.model(tied=tied)
    head = torch.nn.Linear(32, 104)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[END] = torch.logit(torch.tensor(chance)) + torch.log(torch.tensor(103.0))
    model.lm_head = head
    return model


def test_where_responses_end(tokenizer: Any) -> None:
    responses = TransformersSampler(ending(False, 0.3), tokenizer).sample(
        PROMPTS, Sampling(6), seed=0, samples=8
    )
    every = [response for one in responses for response in one]
    assert {response.end for response in every} == {"eos", "length"}
    for response in every:
        assert len(response.ids) == len(response.log_probabilities) <= 6
        assert (response.end == "eos") == (END in response.ids)
        assert END not in response.ids[:-1]
        assert response.end == "eos" or len(response.ids) == 6


def test_a_padding_token_that_is_the_end_mark_ends_once(tokenizer: Any) -> None:
    model, same = ending(False, 0.3), tiny.tokenizer(pad_token="<|end|>")
    expected = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(6), seed=0, samples=4)
    assert TransformersSampler(model, same).sample(PROMPTS, Sampling(6), seed=0, samples=4) == expected


def test_the_model_s_own_settings_play_no_part_but_its_end_marks_do(tokenizer: Any) -> None:
    model = tiny.model(tied=False)
    plain = TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(6), seed=0)
    settings = model.generation_config
    settings.repetition_penalty, settings.top_k, settings.temperature = 5.0, 1, 0.1
    settings.max_length = 3
    model.train()
    assert TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(6), seed=0) == plain
    assert model.generation_config is settings
    assert model.training
    stop = plain[0][0].ids[1]
    settings.eos_token_id = [END, stop]
    ((cut,),) = TransformersSampler(model, tokenizer).sample(PROMPTS[:1], Sampling(6), seed=0)
    assert cut.ids == plain[0][0].ids[:2]
    assert cut.end == "eos"


def test_greedy(model: Any, tokenizer: Any) -> None:
    ((response,),) = TransformersSampler(model, tokenizer).sample(
        PROMPTS[:1], Sampling(5, temperature=0), seed=0
    )
    ids = list(PROMPTS[0])
    for token in response.ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT
def test_under_an_adapter(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(tiny.model(tied=False), LoraConfig(r=2, target_modules="all-linear"))
    start = TransformersSampler(policy, tokenizer).sample(PROMPTS, Sampling(6), seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    moved = TransformersSampler(policy, tokenizer).sample(PROMPTS, Sampling(6), seed=0)
    assert moved != start
    with policy.disable_adapter():
        assert TransformersSampler(policy, tokenizer).sample(PROMPTS, Sampling(6), seed=0) == start


def test_prompts_as_tokens(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert encode_prompt(tokenizer, messages) == tokenizer(template)["input_ids"]
    assert encode_prompt(tokenizer, "hi") == tokenizer("hi")["input_ids"]
    assert encode_prompt(tokenizer, (4, 5)) == [4, 5]


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(prompt: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="has no tokens; a response needs at least one to follow"):
        encode_prompt(tokenizer, prompt)


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        encode_prompt(tiny.tokenizer(chat_template=None), [{"role": "user", "content": "hi"}])


def test_a_prompt_after_which_nothing_is_a_number_is_named(tokenizer: Any) -> None:
    model = tiny.model(tied=False)
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("%")] = float("nan")
    sampler = TransformersSampler(model, tokenizer)
    assert sampler.sample(["say 10", "say abc"], Sampling(2), seed=0)
    with pytest.raises(UserError, match="not finite in answering 'say 10 %'; its weights or this prompt"):
        sampler.sample(["say abc", "say 10 %"], Sampling(2), seed=0)


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    sampler = TransformersSampler(tiny.model(), tokenizer)
    with pytest.raises(UserError, match=r"a prompt of 250 tokens and 7 new ones do not fit .* 256 positions"):
        sampler.sample([[5] * 250], Sampling(7), seed=0)


def test_an_infinite_logit_is_said(tokenizer: Any) -> None:
    model = ending(False, 0.5)
    model.lm_head.bias.data[7] = torch.inf
    with pytest.raises(UserError, match="the model's probabilities are not finite"):
        TransformersSampler(model, tokenizer).sample(PROMPTS, Sampling(3), seed=0)
