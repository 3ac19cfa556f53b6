import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.evaluate import Encoded, encode, score


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).float()


def one_by_one(model, row):
    """Feed ever longer prefixes and add up the log-probability of the token that really came next."""
    total = 0.0
    for place in range(row.start, len(row.ids)):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row.ids[:place]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[row.ids[place]])
    return total


def test_sum_is_that_of_the_tokens_one_by_one_whatever_the_batch(model):
    rows = [
        Encoded((1, 2, 3, 4, 5, 6), 3),
        Encoded((7, 8), 1),
        Encoded((9, 10, 11, 12, 13), 4),
        Encoded((5, 5, 5, 0, 0, 0, 22), 2),
    ]
    expected = [one_by_one(model, row) for row in rows]
    for batch_size in (1, 2, 8):
        found = score(model, rows, batch_size=batch_size)
        assert [one.logp for one in found] == pytest.approx(expected, abs=1e-4)
        assert [one.tokens for one in found] == [3, 1, 1, 5]
    assert found[0].per_token == pytest.approx(expected[0] / 3, abs=1e-4)


def test_progress_adds_up_to_the_rows(model):
    seen = []
    score(model, [Encoded((1, 2, 3), 1)] * 5, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1]


class Template:
    """A chat template of one token a turn mark and one a word, enough to see where the answer starts."""

    def __init__(self, keeps_prefix=True):
        self.keeps_prefix = keeps_prefix

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, return_dict=True):
        assert tokenize
        assert not return_dict
        marks = {"user": 100, "assistant": 200}
        ids = [] if self.keeps_prefix else [len(messages)]
        for message in messages:
            ids += [marks[message["role"]], *map(len, message["content"].split()), 300]
        return ids + ([200] if add_generation_prompt else [])


def test_answer_starts_after_the_generation_prompt_and_keeps_its_end_mark():
    found = encode(
        Template(),
        [{"role": "user", "content": "to be or"}],
        [{"role": "assistant", "content": "not to"}],
    )
    assert found.ids == (100, 2, 2, 2, 300, 200, 3, 2, 300)
    assert found.ids[found.start :] == (3, 2, 300)


def test_a_template_that_rewrites_the_prompt_is_refused():
    with pytest.raises(ValueError, match="chat template"):
        encode(
            Template(keeps_prefix=False),
            [{"role": "user", "content": "a"}],
            [{"role": "assistant", "content": "b"}],
        )
