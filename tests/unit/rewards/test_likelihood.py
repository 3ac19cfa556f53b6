"""A language model as a scorer: its values are the oracle's, whatever is scored together."""

from __future__ import annotations

from typing import Any

import pytest

from tests import tiny
from tests.oracle import losses
from trimtab import UserError
from trimtab.rewards import RRHFScorer
from trimtab.rewards.ranked_batches import encode_ranked

ASKED = [{"role": "user", "content": "say hi"}]
ANSWERS = ["hi", "hello there", "no"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def expected(model: Any, row: dict[str, Any], exponent: float = 1.0) -> list[float]:
    """p of each response, one by one in float64."""
    import copy

    exact = copy.deepcopy(model).double().eval()
    return [
        sum(losses.log_probabilities(exact, row["prompt_ids"], ids)) / len(ids) ** exponent
        for ids in row["response_ids"]
    ]


@pytest.mark.parametrize("layout", ["shared_prefix", "repeated"])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_it_gives_length_normalized_log_probabilities(
    layout: Any, exponent: float, model: Any, tokenizer: Any
) -> None:
    model.train()
    scorer = RRHFScorer(model, tokenizer, exponent, layout=layout, batch_size=1)
    found = scorer.score([(ASKED, ANSWERS), ("say", ["x"])])
    assert model.training
    assert found[0] == pytest.approx(
        expected(model, encode_ranked(tokenizer, ASKED, ANSWERS), exponent), rel=1e-5
    )
    assert found[1] == pytest.approx(
        expected(model, encode_ranked(tokenizer, "say", ["x"]), exponent), rel=1e-5
    )
    assert scorer.truncated == 0


def test_as_a_reward_it_reads_equal_prompts_once(model: Any, tokenizer: Any) -> None:
    scorer = RRHFScorer(model, tokenizer)
    read: list[int] = []
    score = scorer._score
    scorer._score = lambda rows: read.append(len(rows)) or score(rows)  # type: ignore[method-assign, func-returns-value]
    prompts = [ASKED, "say", ASKED, "say", ASKED]
    responses = ["hi", "x", "hello there", "yes", "no"]
    found = scorer(prompts, responses)
    assert read == [2]
    known = dict(zip(ANSWERS, scorer.score([(ASKED, ANSWERS)])[0], strict=True))
    assert [found[0], found[2], found[4]] == pytest.approx([known["hi"], known["hello there"], known["no"]])
    assert found[1] == pytest.approx(scorer.score([("say", ["x"])])[0][0])


def test_what_exceeds_the_positions_loses_the_start_of_its_prompt_and_is_counted(tokenizer: Any) -> None:
    model = tiny.model(max_position_embeddings=24)
    scorer = RRHFScorer(model, tokenizer)
    assert scorer.max_length == 24
    prompt, fits, long, longer = "a" * 10 + "b" * 10, "yes", "no" * 4, "x" * 30
    found = scorer.score([(prompt, [long, fits, longer])])[0]
    assert scorer.truncated == 2
    row = encode_ranked(tokenizer, prompt, [long, fits, longer])
    ids = row["response_ids"]
    cut = [
        {"prompt_ids": row["prompt_ids"][-(24 - 9) :], "response_ids": [ids[0]]},
        {"prompt_ids": row["prompt_ids"], "response_ids": [ids[1]]},
        {"prompt_ids": row["prompt_ids"][-1:], "response_ids": [ids[2][:23]]},
    ]
    assert found == pytest.approx([expected(model, one)[0] for one in cut], rel=1e-5)


def test_pairwise_accuracy_has_an_interval(model: Any, tokenizer: Any) -> None:
    scorer = RRHFScorer(model, tokenizer)
    pairs = tiny.preference_rows(7)
    scores = scorer.score([(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs])
    right = sum(chosen > rejected for chosen, rejected in scores)
    found = scorer.accuracy(pairs)
    assert (found["correct"], found["accuracy"]) == (right, right / 7)
    assert 0 <= found["interval"]["low"] < found["accuracy"] < found["interval"]["high"] <= 1
    same = [{**pair, "rejected": pair["chosen"]} for pair in pairs]
    assert scorer.accuracy(same)["accuracy"] == 0
    with pytest.raises(UserError, match="at least one held-out pair"):
        scorer.accuracy([])


def test_messages_that_the_template_refuses_are_said_with_the_prompt(model: Any) -> None:
    strict = tiny.tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(UserError, match=r"likelihood, on the prompt 'say hi': .* refuses .* no system here"):
        RRHFScorer(model, strict)([ASKED], ["hi"])
    with pytest.raises(UserError, match=r"on the prompt 'say hi': .* needs a tokenizer with a chat template"):
        RRHFScorer(model, tiny.tokenizer(chat_template=None))([ASKED], ["hi"])


def test_weights_that_are_not_finite_are_said_with_the_prompt(tokenizer: Any) -> None:
    model = tiny.model()
    model.model.norm.weight.data.fill_(float("nan"))
    scorer = RRHFScorer(model, tokenizer, layout="repeated")
    with pytest.raises(
        UserError, match="likelihood gives the score nan to the response 'yes' to the prompt 'say'"
    ):
        scorer(["say"], ["yes"])
