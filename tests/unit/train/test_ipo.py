"""IPO through TRL: its loss on a fixed batch is the oracle's, with means over tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.oracle import losses
from trimtab import UserError

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

BETA = 0.3


def loss_of_the_first_batch(trainer: Any) -> tuple[float, list[dict[str, Any]]]:
    """TRL's loss of its first four rows, and these rows, as it tokenized them."""
    rows = [trainer.train_dataset[index] for index in range(4)]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return float(loss), rows


@pytest.mark.parametrize("method", [{"method": "ipo"}, {"method": "dpo", "loss": {"type": "ipo"}}])
def test_the_loss_is_the_oracle_s_with_means_over_tokens(
    method: dict[str, Any], trainer_of: Any, in_float64: Any, tiny_models: tuple[Path, Path]
) -> None:
    loss = {**method.get("loss", {}), "beta": BETA}
    trainer = trainer_of(
        **{**method, "loss": loss}, model=str(tiny_models[0]), optimizer=tiny.ADAMW, base=None
    )
    found, rows = loss_of_the_first_batch(trainer)
    policy, reference = (in_float64(folder) for folder in tiny_models)
    expected, summed = [], []
    for row in rows:
        sides = [
            losses.answer(policy, reference, row["prompt_ids"], row[name])
            for name in ("chosen_ids", "rejected_ids")
        ]
        expected.append(losses.ipo(*sides, beta=BETA))
        summed.append(losses.ipo(*sides, beta=BETA, per_token=False))
    assert found == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert abs(found - sum(summed) / 4) > 1e-2  # the paper's sums are another number on this batch
    assert trainer.loss_types == ["ipo"]


@pytest.mark.parametrize(
    "optimizer",
    [
        tiny.ADAMW,
        {"name": "ondare"},
        {"name": "onties", "merge_every": 2},
        {"name": "online_merging", "sparsify": "top", "consensus": "linear"},
    ],
    ids=lambda section: section["name"],
)
def test_a_run_with_every_optimizer(
    optimizer: dict[str, Any], tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    sections = {"base": None} if optimizer["name"] == "adamw" else {}
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "o",
        method="ipo",
        optimizer=optimizer,
        training={"max_steps": 2},
        **sections,
    )
    before = tiny.weights(tiny_models[1])
    folder = tiny.train(values)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(25.0, rel=1e-5)  # policy = reference: (0 - 1 / (2 * 0.1))^2
    assert lines[0]["eval_rewards/margins"] == 0.0
    assert "merge/weight" in first or optimizer["name"] == "adamw"
    assert "Identity preference optimization (arXiv 2310.12036)" in (folder / "README.md").read_text()
    after = tiny.weights(tiny_models[1])
    assert all(torch.equal(before[name], after[name]) for name in before)  # the reference is as it was
    assert tiny.weights(folder / "model").keys() == before.keys()


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_a_reference_of_another_shape_is_refused(
    method: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    tiny.model(0, intermediate_size=64).save_pretrained(wide)
    tiny.tokenizer().save_pretrained(wide)
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "o", method=method, optimizer=tiny.ADAMW, base=None
    )
    values |= {"reference": str(wide), "model": str(tiny_models[1])}
    sentence = (
        r"reference .*wide' is not of the shape of model .*: model\.layers\.0\.mlp\.down_proj\.weight is "
        r"\[32, 64\] in the reference and \[32, 48\] in the model; take two versions of one model"
    )
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


def test_settings_of_dpo_are_no_settings_of_ipo(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    for name, value in (("type", "sigmoid"), ("label_smoothing", 0.1)):
        values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", method="ipo", loss={name: value})
        with pytest.raises(UserError, match=rf"loss\.{name} belongs to method dpo"):
            tiny.train(values)


def test_a_tokenizer_without_a_template_is_refused(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_models[1], plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tiny.tokenizer(chat_template=None).save_pretrained(plain)
    values = tiny.recipe((tiny_models[0], plain), tiny_pairs, tmp_path / "o", method="ipo")
    with pytest.raises(UserError, match=r"holds messages, but the tokenizer of .* has no chat template"):
        tiny.train(values)
