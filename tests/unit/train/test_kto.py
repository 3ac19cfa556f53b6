"""KTO through TRL: its loss on fixed batches is the oracle's, KL term included; runs; refusals."""

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
from trimtab import UserError
from trimtab.train.checkpoints import checkpoint_folders

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

LOSS = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}
SIZE = 4


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Answers without partners: every third is undesirable."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if index % 3 == 0 else "chosen"],
            "label": index % 3 != 0,
        }
        for index, row in enumerate(tiny.preference_rows(count, seed=2))
    ]


def mismatched(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[int]:
    """The answer that stands before ``row`` in its batch; the last one's for the first."""
    return rows[rows.index(row) - 1]["completion_ids"]


@pytest.mark.parametrize("swapped", [False, True], ids=["from the base", "from the reference"])
def test_the_loss_is_the_oracle_s(
    swapped: bool, trainer_of: Any, in_float64: Any, tiny_models: tuple[Path, Path]
) -> None:
    start, compared = tiny_models[::-1] if swapped else tiny_models
    trainer = trainer_of(
        method="kto",
        model=str(start),
        reference=str(compared),
        loss=LOSS,
        optimizer=tiny.ADAMW,
        base=None,
        training={"per_device_train_batch_size": SIZE},
    )
    trainer.model.train()
    policy, reference = in_float64(start), in_float64(compared)
    points = []
    for first in range(0, 3 * SIZE, SIZE):
        rows = [trainer.train_dataset[index] for index in range(first, first + SIZE)]
        with torch.no_grad():
            found = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
        answers = [
            (losses.answer(policy, reference, row["prompt_ids"], row["completion_ids"]), row["label"])
            for row in rows
        ]
        others = [losses.answer(policy, reference, row["prompt_ids"], mismatched(row, rows)) for row in rows]
        expected, point = losses.kto(answers, others, **LOSS)
        assert found == pytest.approx(expected, rel=1e-5)
        assert trainer._metrics["train"]["kl"][-1] == pytest.approx(point, abs=1e-5)
        points.append(point)
    # Both cases of the maximum are met: where one model finds the answers likelier, the other does not.
    assert max(points) > 1e-3 if swapped else min(points) == 0.0


def test_pairs_are_taken_apart_and_shuffled_by_the_seed(trainer_of: Any, tiny_pairs: Any) -> None:
    rows = list(trainer_of(method="kto", optimizer=tiny.ADAMW, base=None).train_dataset)
    asked = [json.loads(line) for line in tiny_pairs[0].read_text().splitlines()]
    told = {(row["prompt"][0]["content"], row["completion"][0]["content"], row["label"]) for row in rows}
    assert told == {
        (pair["prompt"][0]["content"], pair[side][0]["content"], side == "chosen")
        for pair in asked
        for side in ("chosen", "rejected")
    }
    assert len(rows) == 2 * len(asked)
    labels = [row["label"] for row in rows]
    assert labels != sorted(labels, reverse=True)
    assert any(labels[first] != labels[first + 1] for first in range(0, len(labels), 2))


@pytest.mark.parametrize(
    "optimizer",
    [
        tiny.ADAMW,
        {"name": "ondare"},
        {"name": "onties"},
        {"name": "online_merging", "sparsify": "top", "consensus": "sign"},
    ],
    ids=lambda section: section["name"],
)
def test_a_run_with_every_optimizer(
    optimizer: dict[str, Any], tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    unpaired = tiny.write_rows(tmp_path / "labelled.jsonl", labelled_rows(24))
    sections = {"base": None} if optimizer["name"] == "adamw" else {}
    values = tiny.recipe(
        tiny_models, (unpaired, tiny_pairs[1]), tmp_path / "o", method="kto", optimizer=optimizer, **sections
    )
    folder = tiny.train(values)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)  # policy = reference: every value is σ(0)
    assert [lines[0]["eval_loss"], lines[0]["eval_kl"]] == pytest.approx([0.5, 0.0], abs=1e-6)
    assert {"kl", "rewards/margins"} & set().union(*lines) == {"kl", "rewards/margins"}
    counts = json.loads((folder / "results" / "data.json").read_text())
    assert [counts[part]["rows"] for part in ("train", "eval")] == [24, 16]
    assert "each pair is learned as two answers" in counts["eval"]["sources"][0]["notes"][0]
    assert "Kahneman-Tversky optimization (arXiv 2402.01306)" in (folder / "README.md").read_text()
    assert tiny.weights(folder / "model").keys() == tiny.weights(tiny_models[1]).keys()


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(
    precomputed: bool, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    training = {"precompute_ref_log_probs": precomputed}
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "whole", method="kto", training=training, evaluation={"every": 2}
    )
    whole = tiny.train(values)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(checkpoint_folders(copy)[4])
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (True, r"all 6 answers of data\.train are labelled true \(desirable\).* labelled false"),
        (False, r"all 6 answers of data\.train are labelled false \(undesirable\).* labelled true"),
    ],
)
def test_one_kind_of_label_is_refused(
    label: bool, sentence: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    rows = [{**row, "label": label} for row in labelled_rows(6)]
    data = (tiny.write_rows(tmp_path / "rows.jsonl", rows), tiny_pairs[1])
    with pytest.raises(UserError, match=sentence):
        tiny.train(tiny.recipe(tiny_models, data, tmp_path / "o", method="kto"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"streaming": True}}, r"data\.streaming cannot go with method kto"),
        (
            {"training": {"per_device_train_batch_size": 1}},
            r"training\.per_device_train_batch_size must be at least 2 for method kto",
        ),
        (
            {"training": {"train_sampling_strategy": "random"}},
            r"training\.train_sampling_strategy must be sequential for method kto",
        ),
        ({"loss": {"type": "sigmoid"}}, r"loss\.type belongs to method dpo"),
        ({"loss": {"desirable_weight": 0}}, r"loss\.desirable_weight must be above 0, not 0"),
        ({"training": {"desirable_weight": 2}}, r"desirable_weight is written as loss\.desirable_weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    sections: dict[str, Any], sentence: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    data = sections.get("data", {})
    rest = {name: section for name, section in sections.items() if name != "data"}
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", method="kto", **rest)
    values["data"] |= data
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)


@pytest.mark.parametrize(("method", "loss"), [("ipo", 25.0), ("kto", 0.5)])
def test_under_an_adapter_the_start_is_the_reference(
    method: str, loss: float, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    sections = {"optimizer": tiny.ADAMW, "base": None, "adapter": {"r": 2}, "training": {"max_steps": 2}}
    folder = tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", method=method, **sections))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(loss, rel=1e-5)
    assert (folder / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["ipo", "kto"])
def test_without_a_pad_token_the_loss_is_the_same(
    method: str, trainer_of: Any, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    unpadded = tmp_path / "unpadded"
    shutil.copytree(tiny_models[0], unpadded)
    tiny.tokenizer(pad_token=None).save_pretrained(unpadded)
    found = []
    for start in (tiny_models[0], unpadded):
        trainer = trainer_of(method=method, model=str(start), optimizer=tiny.ADAMW, base=None)
        rows = [trainer.train_dataset[index] for index in range(6)]
        with torch.no_grad():
            found.append(float(trainer.compute_loss(trainer.model, trainer.data_collator(rows))))
        found.append(trainer.data_collator.pad_token_id)
    assert found[1::2] == [0, 1]  # <|pad|>, and <|end|> in its place
    assert found[0] == pytest.approx(found[2], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models[1], broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(broken)
    sections = {"optimizer": tiny.ADAMW, "base": None, "model": str(broken)}
    for method in ("ipo", "kto", "reward"):
        values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / method, method=method, **sections)
        values["reference"] = str(tiny_models[1]) if method != "reward" else None
        values = {name: value for name, value in values.items() if value is not None}
        with pytest.raises(UserError, match=r"the loss is nan at step 1 .*no checkpoint was written yet"):
            tiny.train(values)
