"""RRHF from a recipe: its loss on fixed batches is the oracle's; runs, resumes; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.equivalence.runs import assert_same_run
from tests.oracle import losses
from tests.unit.losses.test_rrhf import oracle
from trimtab import UserError
from trimtab.rewards.ranked_batches import encode_ranked
from trimtab.train.checkpoints import checkpoint_folders

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing the trainers

LOSS = {"rank_weight": 2.0, "length_exponent": 0.5, "margin": 0.25}


def ranked_rows(count: int) -> list[dict[str, Any]]:
    """Two or three responses to each prompt; the scores of the first prompt are all equal."""
    rows = []
    for index, row in enumerate(tiny.preference_rows(count, seed=2)):
        good, bad = row["chosen"][0]["content"], row["rejected"][0]["content"]
        responses = [bad, good, f"{good} {bad}"][: 2 + index % 2]
        rows.append(
            {
                "prompt": row["prompt"],
                "responses": responses,
                "scores": [0.5 * (index > 0) * place for place in range(len(responses))],
            }
        )
    return rows


@pytest.fixture
def ranked(tiny_pairs: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Ranked responses to train on, and pairs held out."""
    return tiny.write_rows(tmp_path / "ranked.jsonl", ranked_rows(12)), tiny_pairs[1]


@pytest.mark.parametrize("ft", ["sum", "token_mean"])
@pytest.mark.parametrize("layout", ["shared_prefix", "repeated"])
def test_the_loss_is_the_oracle_s(
    ft: str, layout: str, trainer_of: Any, in_float64: Any, ranked: Any, tiny_models: tuple[Path, Path]
) -> None:
    trainer = trainer_of(
        ranked,
        method="rrhf",
        loss={**LOSS, "ft_normalization": ft, "layout": layout},
        optimizer=tiny.ADAMW,
        base=None,
    )
    model = in_float64(tiny_models[1])
    rows = [trainer.train_dataset[index] for index in range(5)]
    batch = trainer.data_collator(rows)
    assert ("segments" in batch) == (layout == "shared_prefix")
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, batch))
        prompts = [
            [
                (losses.log_probabilities(model, row["prompt_ids"], ids), score)
                for ids, score in zip(row["response_ids"], row["scores"], strict=True)
            ]
            for row in rows
        ]
    expected = oracle(prompts, LOSS["length_exponent"], LOSS["margin"], LOSS["rank_weight"], ft)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", [tiny.ADAMW, {"name": "ondare"}, {"name": "onties"}], ids=lambda section: section["name"]
)
def test_a_run(optimizer: dict[str, Any], tiny_models: Any, ranked: Any, tmp_path: Path) -> None:
    sections = {"base": None} if optimizer["name"] == "adamw" else {}
    training = {"max_steps": 2, "per_device_train_batch_size": 3}
    evaluation = {"samples": 1, "max_new_tokens": 2}
    values = tiny.recipe(
        tiny_models,
        ranked,
        tmp_path / "o",
        method="rrhf",
        optimizer=optimizer,
        training=training,
        evaluation=evaluation,
        **sections,
    )
    folder = tiny.train(values)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss/rank"] + line["loss/ft"], rel=1e-4)
    assert {"rewards/accuracies", "rewards/margins", "response_length", "tied_prompts"} <= steps[0].keys()
    assert [line["step"] for line in lines if "eval_loss/rank" in line] == [0, 2]
    counts = json.loads((folder / "results" / "data.json").read_text())
    assert counts["train"]["sources"][0]["responses"] == {"kept": 30, "dropped": {}, "tied_prompts": 1}
    assert "two responses, with the scores 1 and 0" in counts["eval"]["sources"][0]["notes"][0]
    card = (folder / "README.md").read_text()
    assert "RRHF, arXiv 2304.05302" in card
    assert "means over the held-out prompts" in card
    assert "| loss/rank |" in card
    samples = json.loads((folder / "results" / "samples.json").read_text())
    assert {when: len(answers) for when, answers in samples.items()} == {"before": 1, "after": 1}
    start, trained = tiny.weights(tiny_models[1]), tiny.weights(folder / "model")
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)


def test_the_trained_model_is_measured_as_a_judge_of_held_out_responses(
    tiny_models: Any, in_float64: Any, tmp_path: Path, capsys: Any
) -> None:
    held_out = ranked_rows(7)[:1] + ranked_rows(9)[3:]  # the scores of the first are all equal
    files = [
        tiny.write_rows(tmp_path / name, rows)
        for name, rows in {"train.jsonl": ranked_rows(12), "eval.jsonl": held_out}.items()
    ]
    sections = {"optimizer": {**tiny.ADAMW, "lr": 3e-3}, "base": None, "loss": {"length_exponent": 0.5}}
    training = {"max_steps": 3, "per_device_eval_batch_size": 2}
    values = tiny.recipe(tiny_models, files, tmp_path / "o", method="rrhf", training=training, **sections)
    folder = tiny.train(values)
    model, tokenizer = in_float64(folder / "model"), tiny.tokenizer()
    pairs, prompts = [], 0
    for row in held_out:
        encoded = encode_ranked(tokenizer, row["prompt"], row["responses"])
        worth = [
            sum(losses.log_probabilities(model, encoded["prompt_ids"], ids)) / len(ids) ** 0.5
            for ids in encoded["response_ids"]
        ]
        found = [
            worth[i] > worth[j]
            for i, better in enumerate(row["scores"])
            for j, other in enumerate(row["scores"])
            if better > other
        ]
        pairs, prompts = pairs + found, prompts + bool(found)
    result = json.loads((folder / "results" / "rewards.json").read_text())
    assert (result["pairs"], result["prompts"], result["correct"]) == (len(pairs), prompts, sum(pairs))
    assert 0 < sum(pairs) < len(pairs)
    assert len(result["scores"]) == len(held_out)
    assert result["scores"][-1]["values"] == pytest.approx(worth, abs=1e-4)
    assert result["scores"][0]["ranks"] == [0] * len(held_out[0]["scores"])
    assert f"in {sum(pairs)} of {len(pairs)} held-out pairs of {prompts} prompts" in result["summary"]
    assert result["summary"] in (folder / "README.md").read_text()
    assert result["summary"] in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line["eval_rewards/accuracies"] for line in lines if "eval_rewards/accuracies" in line]
    assert logged[-1] == pytest.approx(result["accuracy"])


def test_held_out_responses_whose_scores_never_differ_measure_nothing(
    tiny_models: Any, ranked: Any, tmp_path: Path
) -> None:
    rows = [{**row, "scores": [2.0] * len(row["scores"])} for row in ranked_rows(2)]
    data = (ranked[0], tiny.write_rows(tmp_path / "tied.jsonl", rows))
    sections = {"optimizer": tiny.ADAMW, "base": None, "training": {"max_steps": 1}}
    folder = tiny.train(tiny.recipe(tiny_models, data, tmp_path / "o", method="rrhf", **sections))
    assert not (folder / "results" / "rewards.json").exists()


def test_a_resumed_run_is_the_uninterrupted_one(tiny_models: Any, ranked: Any, tmp_path: Path) -> None:
    values = tiny.recipe(tiny_models, ranked, tmp_path / "whole", method="rrhf", evaluation={"every": 2})
    whole = tiny.train(values)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "results")
    shutil.rmtree(checkpoint_folders(copy)[4])
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)
    measured = [(run / "results" / "rewards.json").read_text() for run in (whole, copy)]
    assert measured[0] == measured[1]


def test_where_all_scores_are_equal_only_the_first_responses_are_learned(
    tiny_models: Any, ranked: Any, tmp_path: Path, capsys: Any
) -> None:
    rows = [{**row, "scores": [1.0] * len(row["scores"])} for row in ranked_rows(4)]
    data = (tiny.write_rows(tmp_path / "tied.jsonl", rows), ranked[1])
    sections = {"optimizer": tiny.ADAMW, "base": None, "training": {"max_steps": 1}}
    folder = tiny.train(tiny.recipe(tiny_models, data, tmp_path / "o", method="rrhf", **sections))
    assert "warning: prompts whose scores are all equal: 4" in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert (first["loss/rank"], first["tied_prompts"]) == (0.0, 1.0)
    assert "rewards/accuracies" not in first


def test_under_an_adapter(tiny_models: Any, ranked: Any, tmp_path: Path) -> None:
    sections = {"optimizer": tiny.ADAMW, "base": None, "adapter": {"r": 2}, "training": {"max_steps": 2}}
    folder = tiny.train(tiny.recipe(tiny_models, ranked, tmp_path / "o", method="rrhf", **sections))
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    assert not (folder / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"streaming": True}}, r"data\.streaming is not supported for method rrhf"),
        ({"data": {"overlong": "truncate"}}, r"data\.overlong must be drop for method rrhf"),
        ({"loss": {"beta": 0.1}}, r"loss\.beta belongs to method"),
        ({"loss": {"margin": -1}}, r"loss\.margin must be at least 0, not -1"),
        ({"loss": {"rank_weight": "much"}}, r"loss\.rank_weight must be a number, not 'much'"),
        ({"loss": {"layout": "packed"}}, r"loss\.layout .*'?shared_prefix'?.*repeated"),
        ({"loss": {"ft_normalization": "mean"}}, r"loss\.ft_normalization .*sum.*token_mean"),
        ({"training": {"max_length": 5}}, r"max_length is written as data\.max_length"),
        ({"training": {"max_stepz": 5}}, r"max_stepz is not a field of TrainerConfig; did you mean"),
        (
            {"training": {"model_init_kwargs": {"attn_implementation": "flex_attention"}}},
            r"the layout 'shared_prefix' needs attn_implementation sdpa or eager, not 'flex_attention'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    sections: dict[str, Any], sentence: str, tiny_models: Any, ranked: Any, tmp_path: Path
) -> None:
    data = sections.get("data", {})
    rest = {name: section for name, section in sections.items() if name != "data"}
    values = tiny.recipe(tiny_models, ranked, tmp_path / "o", method="rrhf", **rest)
    values["data"] |= data
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()
