"""Heads that one model stores and another one has in its embedding: their rows, and their parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.merge import made
from tests.unit.merge.test_plan import Place, outputs, plan_of, ties
from tests.unit.merge.test_vocabulary import EMBEDDING, HEAD, SPECIAL, model, whole, words
from trimtab.errors import UserError
from trimtab.merge.layers import is_head, is_tied
from trimtab.merge.vocabulary import Aligned, build, vocabulary_keys


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_tied_model_is_given_the_others_head_where_it_stands_for_the_head(tmp_path: Path) -> None:
    """The token ``b`` is only in the untied model: its row in the head of both is that model's head's."""
    untied = model(tmp_path / "untied", 0, words([*SPECIAL, "a", "b"]))
    tied = model(tmp_path / "tied", 1, words([*SPECIAL, "a"]), tie_word_embeddings=True)
    each = [{"weight": 1.0}] * 2
    values = made.values_of("linear", untied.folder, [untied.folder, tied.folder], each)
    found = made.merged(tmp_path / "out", {**values, "tokenizer_source": "base"})
    head, embedding = whole(untied, HEAD), whole(untied, EMBEDDING)
    torch.testing.assert_close(found[HEAD][3], head[3], rtol=0, atol=0)
    torch.testing.assert_close(found[EMBEDDING][3], embedding[3], rtol=0, atol=0)
    torch.testing.assert_close(found[HEAD][:3], (head[:3] + whole(tied, EMBEDDING)) / 2)


def test_the_head_of_a_tied_model_by_its_key(tmp_path: Path) -> None:
    """It takes the missing rows from heads: of the only one, of the base, or the mean of all."""
    base = model(tmp_path / "base", 0, words([*SPECIAL, "a", "b"]))
    tied = model(tmp_path / "tied", 1, words(["a", *SPECIAL]), tie_word_embeddings=True)
    third = model(tmp_path / "third", 2, words([*SPECIAL, "c", "b", "d"]))
    fourth = model(tmp_path / "fourth", 3, words([*SPECIAL, "d"]), tie_word_embeddings=True)
    inputs = [base, tied, third, fourth]
    vocabulary = build(inputs, base, "union")
    one = Aligned(inputs, 1, vocabulary, vocabulary_keys(tied))
    assert HEAD not in one.keys()  # noqa: SIM118 (an input is no dict)
    tokens = vocabulary.tokenizer.get_vocab()
    head = whole(one, HEAD)
    assert head.shape == (6, 16)
    assert torch.equal(head[tokens["a"]], whole(tied, EMBEDDING)[0])
    assert torch.equal(head[tokens["b"]], whole(base, HEAD)[3])
    assert torch.equal(head[tokens["c"]], whole(third, HEAD)[2])
    assert torch.equal(head[tokens["d"]], (whole(third, HEAD)[4] + whole(fourth, EMBEDDING)[2]) / 2)
    assert torch.equal(whole(one, EMBEDDING)[tokens["b"]], whole(base, EMBEDDING)[3])
    assert torch.equal(one.read(HEAD, 5, 70), head.view(-1)[5:70])


def test_filters_see_the_name_that_was_asked_for(place: Place) -> None:
    tied = place.model("tied", without=[HEAD], tie_word_embeddings=True)
    weight = [{"filter": "lm_head", "value": 3.0}, {"filter": "embed_tokens", "value": 5.0}, {"value": 1.0}]
    each = [{"weight": weight, "density": 1.0}]
    found = outputs(plan_of(made.values_of("ties", place.model("base"), [tied], each)))
    assert (found[HEAD].parts[0].origin.key, found[HEAD].parts[0].weight) == (EMBEDDING, 3.0)
    assert found[EMBEDDING].parts[0].weight == 5.0


def test_a_family_that_ties_its_head_unless_it_says_otherwise(place: Place) -> None:
    gemma = place.model("one", without=[HEAD], model_type="gemma")
    base = place.model("base", model_type="gemma", tie_word_embeddings=False)
    assert outputs(ties(base, [gemma]))[HEAD].parts[0].origin.key == EMBEDDING
    llama = place.model("two", without=[HEAD])
    with pytest.raises(UserError, match=r"1 missing \(lm_head.weight in"):
        ties(place.model("other"), [llama])


def test_what_configurations_say_about_the_head() -> None:
    assert is_tied({"model_type": "gemma"})
    assert is_tied({"model_type": "t5"})
    assert is_tied({"model_type": "llama", "text_config": {"tie_word_embeddings": True}})
    assert not is_tied({"model_type": "gemma", "tie_word_embeddings": False})
    assert not is_tied({"model_type": "llama"})
    assert not is_tied({"model_type": "of-ones-own"})
    assert not is_tied({})


def test_the_output_of_an_attention_is_no_head() -> None:
    assert is_head("lm_head.weight")
    assert is_head("model.output.weight")
    assert not is_head("layers.0.attention.output.weight")
    assert not is_head("own_lm_head.weight")
