"""Reward models through TRL: the loss is the oracle's; accuracy with its interval; the saved model loads."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.equivalence.runs import assert_same_run
from tests.oracle import losses
from trimtab import UserError
from trimtab.evaluate import wilson
from trimtab.rewards import load_reward
from trimtab.terminal import plain_libraries
from trimtab.train.checkpoints import checkpoint_folders

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

ADAMW = {"method": "reward", "optimizer": tiny.ADAMW, "base": None}
MERGING = [
    {"name": "ondare"},
    {"name": "onties"},
    {"name": "online_merging", "sparsify": "top", "consensus": "linear"},
]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("center", [0.0, 0.25])
def test_the_loss_is_the_oracle_s(center: float, trainer_of: Any) -> None:
    trainer = trainer_of(**ADAMW, loss={"center_rewards": center})
    rows = [trainer.train_dataset[index] for index in range(5)]
    model = copy.deepcopy(trainer.model).double()
    model.score.weight.data.mul_(50)  # large enough that the scores of a pair differ
    trainer.model.score.weight.data.mul_(50)
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
        sides = [
            [float(model(torch.tensor([row[side]])).logits) for row in rows]  # one by one, without padding
            for side in ("chosen_ids", "rejected_ids")
        ]
    assert max(abs(a - b) for a, b in zip(*sides, strict=True)) > 0.1
    assert found == pytest.approx(losses.reward(*sides, center=center), rel=1e-5)


@pytest.fixture(scope="module")
def finished(tiny_models: Any, tiny_pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learned to tell small letters from capitals; do not write there."""
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path_factory.mktemp("reward") / "out",
        **{**ADAMW, "optimizer": {**tiny.ADAMW, "lr": 3e-3}},
        training={"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 12},
        evaluation={"every": 6},
    )
    return tiny.train(values)


def test_the_model_loads_for_sequence_classification_and_scores_as_it_did(
    finished: Path, tiny_pairs: Any
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(finished / "model")
    assert_scores_again(model, finished, tiny_pairs[1])


def test_without_a_pad_token_the_end_of_the_turn_pads_and_scores_stay_the_same(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    start = tmp_path / "start"
    shutil.copytree(tiny_models[1], start)
    tiny.tokenizer(pad_token=None).save_pretrained(start)
    folder = tiny.train(
        tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **ADAMW, reference=None, model=str(start))
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.pad_token_id == 1
    assert_scores_again(model, folder, tiny_pairs[1])


def assert_scores_again(model: Any, run: Path, file: Path) -> None:
    """A loaded model scores the held-out conversations, one by one, as the run did in padded batches.

    And ``trimtab.rewards`` loads the same folder as a reward that does too, in batches of its own.
    """
    from transformers import AutoTokenizer

    with plain_libraries():
        reward = load_reward(str(run / "model"), batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    result = json.loads((run / "results" / "rewards.json").read_text())
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(result["scores"]) == len(pairs) == result["pairs"]
    for side in ("chosen", "rejected"):
        found = reward([pair["prompt"] for pair in pairs], [pair[side][0]["content"] for pair in pairs])
        assert found == pytest.approx([scores[side] for scores in result["scores"]], abs=1e-5)
    for pair, scores in zip(pairs, result["scores"], strict=True):
        for side in ("chosen", "rejected"):
            encoded = tokenizer.apply_chat_template(
                pair["prompt"] + pair[side], return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                score = model(encoded["input_ids"], encoded["attention_mask"]).logits.item()
            assert score == pytest.approx(scores[side], abs=1e-5)


def test_the_accuracy_is_counted_with_its_interval_and_told(finished: Path) -> None:
    result = json.loads((finished / "results" / "rewards.json").read_text())
    correct = sum(scores["chosen"] > scores["rejected"] for scores in result["scores"])
    assert (result["correct"], result["ties"], result["accuracy"]) == (correct, 0, correct / 8)
    assert correct >= 7  # small letters against capitals
    z, share = 1.959963984540054, correct / 8
    centre = (share + z * z / 16) / (1 + z * z / 8)
    half = z / (1 + z * z / 8) * (share * (1 - share) / 8 + z * z / 256) ** 0.5
    interval = result["interval"]
    assert [interval["low"], interval["high"]] == pytest.approx([centre - half, min(1.0, centre + half)])
    assert (interval["confidence"], interval["kind"]) == (0.95, "Wilson")
    card = (finished / "README.md").read_text()
    assert result["summary"] in card
    assert f"{correct} of 8 held-out pairs" in card
    assert "A reward model of" in card
    assert [line["step"] for line in lines_of(finished) if "eval_accuracy" in line] == [0, 6, 12]


def test_pairs_of_one_prompt_are_no_more_evidence_than_one(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    first, second, other = tiny.preference_rows(3, seed=1)
    rows = [first, {**second, "prompt": first["prompt"]}, other]
    data = (tiny_pairs[0], tiny.write_rows(tmp_path / "eval.jsonl", rows))
    folder = tiny.train(tiny.recipe(tiny_models, data, tmp_path / "o", **ADAMW, training={"max_steps": 1}))
    result = json.loads((folder / "results" / "rewards.json").read_text())
    known = wilson(result["correct"] * 2 / 3, 2)
    assert (result["pairs"], result["prompts"]) == (3, 2)
    assert [result["interval"][end] for end in ("low", "high")] == pytest.approx([known.low, known.high])


@pytest.mark.parametrize("optimizer", MERGING, ids=lambda section: section["name"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_online_merging_leaves_the_head_to_the_plain_step(
    optimizer: dict[str, Any], tied: bool, tiny_pairs: Any, tmp_path: Path
) -> None:
    models = tiny.write_models(tmp_path, tied=tied)
    values = tiny.recipe(
        models, tiny_pairs, tmp_path / "o", method="reward", optimizer=optimizer, training={"max_steps": 2}
    )
    before = {name: value.clone() for name, value in tiny.weights(models[1]).items()}
    folder = tiny.train(values)
    assert r"^(score|classifier)\." in (folder / "recipe.yaml").read_text()
    first = next(line for line in lines_of(folder) if "loss" in line)
    assert first["merge/weight"] == 1e-3
    after = tiny.weights(folder / "model")
    assert after.keys() == {name for name in before if name != "lm_head.weight"} | {"score.weight"}
    assert all(torch.equal(value, tiny.weights(models[1])[name]) for name, value in before.items())


def test_a_head_that_is_given_a_delta_is_refused(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    section = {"name": "ondare", "without_delta": []}
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", method="reward", optimizer=section)
    with pytest.raises(UserError, match=r"score\.weight.*without_delta"):
        tiny.train(values)


def test_a_resumed_run_is_the_uninterrupted_one(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "whole", method="reward", evaluation={"every": 2}
    )
    whole = tiny.train(values)
    for step in (2, 4):  # in the middle, and after the last checkpoint
        folder = tmp_path / f"copy{step}"
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "results")
        for number, checkpoint in checkpoint_folders(folder).items():
            if number > step:
                shutil.rmtree(checkpoint)
        tiny.train({**values, "output": str(folder)}, resume=True)
        assert_same_run(folder, whole)
        results = [json.loads((one / "results" / "rewards.json").read_text()) for one in (whole, folder)]
        assert results[0] == results[1]


def test_an_adapter_is_trained_and_saved_with_its_head(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForSequenceClassification

    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **ADAMW, adapter={"r": 2})
    folder = tiny.train(values)
    with plain_libraries():
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    model.config.pad_token_id = 0
    assert_scores_again(model.eval(), folder, tiny_pairs[1])


def test_without_held_out_pairs_there_is_no_accuracy(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **ADAMW, training={"max_steps": 1})
    del values["data"]["eval"]
    assert not (tiny.train(values) / "results" / "rewards.json").exists()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"evaluation": {"samples": 2}}, r"evaluation\.samples is not for method reward"),
        ({"evaluation": {"prompts": ["hi"]}}, r"evaluation\.prompts is not for method reward"),
        ({"overlong": "truncate"}, r"data\.overlong must be drop for method reward"),
        ({"loss": {"beta": 0.1}}, r"loss\.beta belongs to method dpo"),
        ({"training": {"center_rewards_coefficient": 1}}, r"is written as loss\.center_rewards"),
        ({"loss": {"center_rewards": -1}}, r"loss\.center_rewards must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    sections: dict[str, Any], sentence: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    rest = {name: section for name, section in sections.items() if name != "overlong"}
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **ADAMW, **rest)
    values["data"]["overlong"] = sections.get("overlong", "drop")
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


def test_an_adapter_of_a_language_model_is_refused(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    sections = {"optimizer": tiny.ADAMW, "base": None, "adapter": {"r": 2}, "training": {"max_steps": 1}}
    adapter = tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / "a", **sections)) / "model"
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **ADAMW, model=str(adapter), reference=None)
    with pytest.raises(UserError, match="is an adapter of a language model, which has no place for a score"):
        tiny.train(values)


def test_pairs_that_teach_nothing_are_counted(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    good = tiny.preference_rows(6)
    empty = {**good[0], "rejected": [{"role": "assistant", "content": " "}]}
    same = {**good[0], "rejected": good[0]["chosen"]}
    long = {**good[0], "prompt": [{"role": "user", "content": "x" * 80}]}
    data = (tiny.write_rows(tmp_path / "rows.jsonl", [*good, empty, same, long]), tiny_pairs[1])
    folder = tiny.train(tiny.recipe(tiny_models, data, tmp_path / "o", **ADAMW, training={"max_steps": 1}))
    counts = json.loads((folder / "results" / "data.json").read_text())["train"]["sources"][0]
    assert counts["dropped"] == {"overlong": 1, "empty_response": 1, "identical": 1}
    assert counts["kept"] == 6
