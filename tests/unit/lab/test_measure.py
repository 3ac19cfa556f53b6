"""Measuring: greedy answers equal a plain loop, scores are averages of the rules."""

import pytest
import torch

from trimtab.lab import measure as measuring
from trimtab.lab.answers import capability, reward
from trimtab.lab.documents import prompt_words
from trimtab.lab.measure import SIZES, capability_tasks, greedy_answers, measure, reward_tasks
from trimtab.lab.model import new_model
from trimtab.lab.vocabulary import END_ID, decode, encode
from trimtab.lab.world import CAPABILITIES


@torch.inference_mode()
def plain_answer(model, task):
    """One prompt, one token at a time, nothing cached."""
    ids = encode(prompt_words(task))
    written = []
    for _ in range(24):
        token = model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == END_ID:
            return decode(written)
        written.append(token)
    return None


def test_greedy_answers_equal_a_plain_loop(shipped_sft):
    tasks = [*capability_tasks("dev")[::60], *reward_tasks("dev")[:12]]
    assert len({len(task.words) for task in tasks}) > 3
    assert greedy_answers(shipped_sft, tasks) == [plain_answer(shipped_sft, task) for task in tasks]


def test_a_model_that_never_ends_has_no_answer():
    model = new_model(0).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[END_ID] = 0
        model.model.embed_tokens.weight[END_ID + 3] *= 3
    task = capability_tasks("dev")[0]
    assert plain_answer(model, task) is None
    assert greedy_answers(model, [task]) == [None]


def test_scores_are_means_of_the_rules(shipped_sft):
    score = measure(shipped_sft, "dev")
    able, liked = capability_tasks("dev"), reward_tasks("dev")
    right = [capability(t, a) for t, a in zip(able, greedy_answers(shipped_sft, able), strict=True)]
    rewards = [reward(t, a) for t, a in zip(liked, greedy_answers(shipped_sft, liked), strict=True)]
    assert score.capability == pytest.approx(sum(right) / len(right))
    assert score.reward == pytest.approx(sum(rewards) / len(rewards))
    for place, name in enumerate(CAPABILITIES):
        assert score.per_capability[name] == pytest.approx(sum(right[60 * place : 60 * place + 60]) / 60)


def test_questions_are_fixed_and_test_differs_from_dev():
    assert {part: (len(capability_tasks(part)), len(reward_tasks(part))) for part in SIZES} == {
        "test": (1620, 500),
        "dev": (540, 200),
    }
    assert measuring.capability_tasks.__wrapped__("dev") == capability_tasks("dev")
    assert set(capability_tasks("dev")) != set(capability_tasks("test")[:540])
    assert sum(task.forbidden for task in capability_tasks()) == 0
    assert 0.13 < sum(task.forbidden for task in reward_tasks()) / 500 < 0.23


def test_measuring_leaves_the_model_as_it_was():
    model = new_model(0).train()
    weights = [p.clone() for p in model.parameters()]
    measure(model, "dev")
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_tax_is_in_points(shipped_sft):
    low = measuring.Score(0.0, 0.5, {})
    high = measuring.Score(0.0, 0.75, {})
    assert low.tax(high) == pytest.approx(25)
    assert high.tax(low) == pytest.approx(-25)
