"""Reward models: scores are those of the model on each conversation alone, in float64, without padding."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trimtab import UserError
from trimtab.rewards import RewardModel, load_reward
from trimtab.terminal import plain_libraries

ASKED = [{"role": "user", "content": "say hi"}]
RESPONSES = ["hi", "hello there, you", "no", "a"]
MIXED = [ASKED, ASKED, "say no:", ASKED]


def classifier(pad_token_id: int | None = 0, **config: Any) -> Any:
    """A tiny Llama with a head for one score, large enough that responses differ."""
    from transformers import LlamaForSequenceClassification

    settings = tiny.model(**config).config.to_dict()
    made = LlamaForSequenceClassification._from_config(
        type(tiny.model().config)(**{**settings, "num_labels": 1, "pad_token_id": pad_token_id})
    )
    made.score.weight.data.mul_(50)
    return made


def alone(model: Any, ids: list[int]) -> float:
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return float(exact(input_ids=torch.tensor([ids])).logits)


def ids_of(tokenizer: Any, prompt: Any, response: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt + response + "<|end|>")["input_ids"]
    return tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": response}], tokenize=True, return_dict=False
    )


@pytest.mark.parametrize("pad", [0, 1, None, -1], ids=["own token", "end of turn", "none", "-1"])
def test_scores_do_not_depend_on_padding_or_order(pad: int | None) -> None:
    model, tokenizer = classifier(None if pad == -1 else pad), tiny.tokenizer()
    model.train()
    known = [alone(model, ids_of(tokenizer, *pair)) for pair in zip(MIXED, RESPONSES, strict=True)]
    assert max(known) - min(known) > 0.1
    model.config.pad_token_id = pad
    for size in (1, 3, 8):
        reward = RewardModel(model, tokenizer, batch_size=size)
        assert reward(MIXED, RESPONSES) == pytest.approx(known, abs=1e-5)
        assert reward(MIXED[::-1], RESPONSES[::-1]) == pytest.approx(known[::-1], abs=1e-5)
        assert reward.truncated == 0
    assert model.training
    assert model.config.pad_token_id == pad


def test_an_input_that_is_too_long_loses_its_start_and_is_counted() -> None:
    model, tokenizer = classifier(max_position_embeddings=20), tiny.tokenizer()
    reward = RewardModel(model, tokenizer)
    long = "the very long prompt:"
    assert reward(["1 + 1 =", long], [" 2", " 3"]) == pytest.approx(
        [alone(model, ids_of(tokenizer, "1 + 1 =", " 2")), alone(model, ids_of(tokenizer, long, " 3")[-20:])],
        abs=1e-5,
    )
    assert reward.truncated == 1
    opened = tiny.tokenizer()
    opened.bos_token = "t"  # what the long prompt starts with
    ids = ids_of(tokenizer, long, " 3")
    assert RewardModel(model, opened)([long], [" 3"]) == pytest.approx(
        [alone(model, [ids[0], *ids[-19:]])], abs=1e-5
    )


def test_a_score_that_is_not_finite_is_said_with_its_prompt() -> None:
    model = classifier()
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(
        UserError,
        match=r"reward model gives the score nan to the response 'hi' to the prompt 'say hi'; every",
    ):
        RewardModel(model, tiny.tokenizer())([ASKED], ["hi"])


def test_a_tokenizer_without_a_chat_template_reads_text_only() -> None:
    model, plain = classifier(), tiny.tokenizer(chat_template=None)
    assert RewardModel(model, plain)(["say no:"], ["no"]) == pytest.approx(
        [alone(model, ids_of(plain, "say no:", "no"))], abs=1e-5
    )
    with pytest.raises(
        UserError, match=r"without a chat template, so it cannot score a conversation \('say hi'\)"
    ):
        RewardModel(model, plain)([ASKED], ["hi"])


def test_an_encoder_that_reads_its_score_at_the_start() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=104,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
    )
    model, tokenizer = BertForSequenceClassification(config), tiny.tokenizer()
    model.classifier.weight.data.mul_(50)
    known = [alone(model, ids_of(tokenizer, *pair)) for pair in zip(MIXED, RESPONSES, strict=True)]
    assert max(known) - min(known) > 0.1
    assert RewardModel(model, tokenizer)(MIXED, RESPONSES) == pytest.approx(known, abs=1e-5)


def test_a_conversation_that_the_template_refuses_is_said() -> None:
    strict = tiny.tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(
        UserError, match="the chat template refuses the conversation 'say hi': no system here"
    ):
        RewardModel(classifier(), strict)([ASKED], ["hi"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    classifier().save_pretrained(tmp_path / "rm")
    tiny.tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def test_a_folder_is_loaded_with_its_tokenizer(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    reward = load_reward(str(folder))
    assert reward.name == "rm"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert reward([ASKED], ["hi"]) == pytest.approx([alone(model, ids_of(tiny.tokenizer(), ASKED, "hi"))])
    assert next(reward.model.parameters()).dtype == torch.float32  # type: ignore[attr-defined]


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_no_reward_model_is_refused_unloaded(
    folder: Path, tiny_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(UserError, match=r"is a LlamaForCausalLM, so it gives no score; name a reward model"):
        load_reward(str(tiny_models[0]))
    edit(folder, id2label={"0": "bad", "1": "good"})
    with pytest.raises(UserError, match=r"rm' gives 2 numbers instead of one, so it gives no score"):
        load_reward(str(folder))
    with pytest.raises(UserError, match=r"^loss\.rewards: there is no folder '\./nothing'"):
        load_reward("./nothing", key="loss.rewards")


def test_a_head_without_weights_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"rm' lacks weights \(score\.weight\), so it gives no score"):
        load_reward(str(folder))


@pytest.fixture
def quiet() -> Iterator[None]:
    """As in a command: PEFT 0.21 uses a name that transformers has replaced."""
    with plain_libraries():
        yield


def adapter(folder: Path, base: Path, kind: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind == "SEQ_CLS" else AutoModelForCausalLM
    labels = {"num_labels": 1} if kind == "SEQ_CLS" else {}
    made = get_peft_model(
        auto.from_pretrained(base, **labels), LoraConfig(r=2, task_type=kind, target_modules=["q_proj"])
    )
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return made


@pytest.mark.usefixtures("quiet")
def test_an_adapter_brings_its_head(tmp_path: Path, tiny_models: tuple[Path, Path], caplog: Any) -> None:
    made = adapter(tmp_path / "adapter", tiny_models[0], "SEQ_CLS")
    assert "newly initialized" in caplog.text
    caplog.clear()
    reward = load_reward(str(tmp_path / "adapter"))
    known = [alone(made, ids_of(tiny.tokenizer(), *pair)) for pair in zip(MIXED, RESPONSES, strict=True)]
    assert reward(MIXED, RESPONSES) == pytest.approx(known, rel=1e-4)
    assert not caplog.text


@pytest.mark.usefixtures("quiet")
def test_an_adapter_is_read_to_where_it_was_trained_to_be(
    tmp_path: Path, tiny_models: tuple[Path, Path]
) -> None:
    """Trained with the end of the turn as padding, which PEFT does not keep and the tokenizer does."""
    made = adapter(tmp_path / "adapter", tiny_models[0], "SEQ_CLS")
    tiny.tokenizer(pad_token="<|end|>").save_pretrained(tmp_path / "adapter")
    assert made.config.pad_token_id == 0
    made.config.pad_token_id = 1
    known = [alone(made, ids_of(tiny.tokenizer(), *pair)) for pair in zip(MIXED, RESPONSES, strict=True)]
    made.config.pad_token_id = 0
    other = [alone(made, ids_of(tiny.tokenizer(), *pair)) for pair in zip(MIXED, RESPONSES, strict=True)]
    assert known != pytest.approx(other, rel=1e-2)
    assert load_reward(str(tmp_path / "adapter"))(MIXED, RESPONSES) == pytest.approx(known, rel=1e-4)


@pytest.mark.usefixtures("quiet")
def test_an_adapter_of_a_language_model_is_refused(tmp_path: Path, tiny_models: tuple[Path, Path]) -> None:
    adapter(tmp_path / "adapter", tiny_models[0], "CAUSAL_LM")
    with pytest.raises(UserError, match="is an adapter of another kind of model, so it gives no score"):
        load_reward(str(tmp_path / "adapter"))
