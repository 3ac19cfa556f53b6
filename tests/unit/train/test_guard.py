"""What every method's trainer stops at: a loss that is not finite, with the rows it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trimtab import UserError
from trimtab.train.checkpoints import last_complete
from trimtab.train.excerpts import excerpts

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

BAD = "say 100 %"
"""The prompt of the sixth row; the policy has no number for its last letter."""

SAMPLED = {"rewards": "tests.unit.train.rules:letters", "max_new_tokens": 4}
GROUPS = {**SAMPLED, "num_generations": 2}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "sft": ("sft", {}, "instructions"),
    "sft of texts": ("sft", {}, "texts"),
    "dpo": ("dpo", {}, "pairs"),
    "ipo": ("ipo", {}, "pairs"),
    "kto": ("kto", {}, "labelled"),
    "reward": ("reward", {}, "pairs"),
    "rrhf": ("rrhf", {}, "pairs"),
    "rrhf repeated": ("rrhf", {"layout": "repeated"}, "pairs"),
    "ppo": ("ppo", SAMPLED, "pairs"),
    "grpo": ("grpo", GROUPS, "pairs"),
    "rloo": ("rloo", GROUPS, "pairs"),
}


def rows_of(kind: str) -> list[dict[str, Any]]:
    rows = tiny.preference_rows(8)
    rows[5]["prompt"][0]["content"] = BAD
    if kind == "instructions":
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if kind == "texts":
        return [{"text": row["prompt"][0]["content"]} for row in rows]
    if kind == "labelled":
        return [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}
            for index, row in enumerate(rows)
        ]
    return rows


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_poisoned_model(tmp_path_factory.mktemp("poisoned"), "%")


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_finite_loss_are_named(name: str, poisoned: Path, tmp_path: Path) -> None:
    method, loss, kind = CASES[name]
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows_of(kind))
    size = 2 if method in ("kto", "grpo", "rloo") else 1
    values = tiny.recipe(
        (poisoned, poisoned),
        (file, file),
        tmp_path / "run",
        method=method,
        loss=loss,
        optimizer=tiny.ADAMW,
        base=None,
        evaluation={"at_start": False},
        training={"max_steps": 20, "per_device_train_batch_size": size, "save_steps": 1},
    )
    values["data"] = {"train": str(file), "max_length": 64}
    with pytest.raises(UserError) as caught:
        tiny.train(values)
    said = str(caught.value)
    assert repr(BAD) in said
    others = {row["prompt"][0]["content"] for row in rows_of("pairs")} - {BAD}
    assert sum(repr(other) in said for other in others) == (method == "kto")
    kept = last_complete(tmp_path / "run")
    if method == "ppo":  # before there is a loss: no token can be drawn
        assert "probabilities are not finite" in said
    else:
        what = "divergence from the reference" if method == "rloo" else "loss"
        assert f"the {what} is nan at step" in said
        assert kept is not None
        assert str(kept) in said


@pytest.mark.parametrize(
    ("method", "what"), [("grpo", "the loss is nan"), ("rloo", "the divergence from the reference is nan")]
)
def test_a_reference_without_numbers_is_told_by_the_row(
    method: str, what: str, poisoned: Path, tiny_models: Any, tmp_path: Path
) -> None:
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows_of("pairs"))
    values = tiny.recipe(
        (tiny_models[0], poisoned),
        (file, file),
        tmp_path / "run",
        method=method,
        model=str(tiny_models[0]),
        loss=GROUPS,
        optimizer=tiny.ADAMW,
        base=None,
        evaluation={"at_start": False},
        training={"max_steps": 20, "per_device_train_batch_size": 2},
    )
    values["data"] = {"train": str(file), "max_length": 64}
    with pytest.raises(UserError, match=rf"{what} at step \d+ .* on the rows '{BAD}', so training stopped"):
        tiny.train(values)


def test_a_gradient_that_is_not_finite_names_the_step_s_rows(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.train.guard import GuardedTrainer

    usual = GuardedTrainer.training_step

    def spoiled(self: Any, model: Any, *rest: Any) -> Any:
        loss = usual(self, model, *rest)
        if self.state.global_step == 1 and self.accelerator.sync_gradients:
            next(self.model.parameters()).grad.fill_(torch.inf)
        return loss

    monkeypatch.setattr(GuardedTrainer, "training_step", spoiled)
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "save_steps": 1}
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "run", training=training, evaluation={"at_start": False}
    )
    with pytest.raises(UserError, match=r"gradient norm is (nan|inf) at step 2 .*checkpoint-1") as caught:
        tiny.train(values)
    asked = {row["prompt"][0]["content"] for row in tiny.preference_rows(64)}
    named = str(caught.value).partition(" on the rows ")[2].partition(", so training")[0].split(", ")
    assert len(named) == 3
    assert {text.strip("'") for text in named} <= asked


def test_responses_are_named_by_their_prompts() -> None:
    tokenizer = tiny.tokenizer()
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in ("abcXY", "abZZZ")])
    assert excerpts({"input_ids": ids, "starts": torch.tensor([3, 2])}, tokenizer) == ["abc", "ab"]
    masks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert excerpts({"prompt_ids": ids, "prompt_mask": masks}, tokenizer) == ["cXY", "abZZZ"]


def test_packed_rows_are_told_apart() -> None:
    tokenizer = tiny.tokenizer()
    first, second = (tokenizer(text)["input_ids"] for text in ("abXY", "cdeZ"))
    batch = {
        "input_ids": torch.tensor([first + second]),
        "labels": torch.tensor([[-100, -100, *first[2:], -100, -100, -100, *second[3:]]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    assert excerpts(batch, tokenizer) == ["ab", "cde"]


def test_long_rows_are_shortened_where_they_are_told_apart() -> None:
    tokenizer = tiny.tokenizer()
    ids = torch.tensor([tokenizer("a" * 70 + "b")["input_ids"]])
    mask = torch.zeros_like(ids)
    mask[0, -1] = 1
    assert excerpts({"input_ids": ids, "completion_mask": mask}, tokenizer) == ["…" + "a" * 60]
    assert excerpts({"input_ids": ids, "labels": ids}, tokenizer) == ["a" * 60 + "…"]
