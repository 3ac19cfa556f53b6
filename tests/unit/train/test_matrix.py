"""Every method under every optimizer: two steps, and what must hold whatever the two are.

The loss on the held-out rows is the oracle's for the model that was saved, against the reference that lies on
the disk: so the measured model is the kept one, and the reference in memory is still the one it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.oracle import losses
from tests.unit.losses.test_rrhf import oracle as rrhf_oracle
from tests.unit.train import rules
from trimtab.terminal import plain_libraries
from trimtab.train import launch

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing the trainers

Rows = list[dict[str, Any]]

MERGING: dict[str, Any] = {"lr": 3e-3, "reserve_rate": 0.5, "merge_weight": 1e-3}
PLAIN: dict[str, Any] = {**tiny.ADAMW, "lr": 3e-3}
LORA = {"r": 4, "alpha": 64.0}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": PLAIN, "base": None},
    "ondare": {"optimizer": {"name": "ondare", **MERGING}},
    "onties": {"optimizer": {"name": "onties", **MERGING}},
    "ondare, gap 5": {"optimizer": {"name": "ondare", **MERGING, "merge_every": 5}},
    "ema": {"optimizer": {**PLAIN, "ema": {"coefficient": 0.4}}, "base": None},
    "childtuning": {"optimizer": {**PLAIN, "child_tuning": {"reserve_rate": 0.3}}, "base": None},
    "lora": {"optimizer": PLAIN, "base": None, "adapter": LORA},
}


def answers(policy: Any, reference: Any, rows: Rows, column: str) -> list[losses.Answer]:
    return [losses.answer(policy, reference, row["prompt_ids"], row[column]) for row in rows]


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def sft(policy: Any, reference: Any, rows: Rows) -> float:
    """The mean over all tokens that count."""
    logps: list[float] = []
    for row in rows:
        start = row["labels"].count(-100)
        logps += losses.log_probabilities(policy, row["input_ids"][:start], row["input_ids"][start:])
    return -mean(logps)


def dpo(policy: Any, reference: Any, rows: Rows) -> float:
    sides = zip(*(answers(policy, reference, rows, f"{side}_ids") for side in ("chosen", "rejected")))  # noqa: B905
    return mean(losses.dpo(chosen, rejected, beta=0.1) for chosen, rejected in sides)


def ipo(policy: Any, reference: Any, rows: Rows) -> float:
    sides = zip(*(answers(policy, reference, rows, f"{side}_ids") for side in ("chosen", "rejected")))  # noqa: B905
    return mean(losses.ipo(chosen, rejected, beta=0.1) for chosen, rejected in sides)


def kto(policy: Any, reference: Any, rows: Rows) -> float:
    """All held-out rows are one batch, in which each prompt is put before the answer of the row before."""
    own = answers(policy, reference, rows, "completion_ids")
    others = [
        losses.answer(policy, reference, row["prompt_ids"], rows[place - 1]["completion_ids"])
        for place, row in enumerate(rows)
    ]
    labels = [row["label"] for row in rows]
    return losses.kto(list(zip(own, labels, strict=True)), others, beta=0.1)[0]


def reward(policy: Any, reference: Any, rows: Rows) -> float:
    with torch.no_grad():
        sides = [
            [float(policy.double()(torch.tensor([row[f"{side}_ids"]])).logits) for row in rows]
            for side in ("chosen", "rejected")
        ]
    return losses.reward(*sides)


def rrhf(policy: Any, reference: Any, rows: Rows) -> float:
    prompts = [
        [
            (losses.log_probabilities(policy, row["prompt_ids"], ids), score)
            for ids, score in zip(row["response_ids"], row["scores"], strict=True)
        ]
        for row in rows
    ]
    return rrhf_oracle(prompts, 1.0, 0.0, 1.0, "sum")


METHODS: dict[str, tuple[Callable[[Any, Any, Rows], float], set[str]]] = {
    "sft": (sft, {"loss", "entropy", "mean_token_accuracy"}),
    "dpo": (dpo, {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"}),
    "ipo": (ipo, {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"}),
    "kto": (kto, {"loss", "kl", "rewards/margins"}),
    "reward": (reward, {"loss", "accuracy", "margin"}),
    "rrhf": (rrhf, {"loss", "loss/rank", "loss/ft", "rewards/accuracies"}),
}
"""What each method's loss is, and what each of its steps tells."""


COMPLETIONS = {"completions/mean_length", "completions/clipped_ratio", "entropy", "clip_ratio/region_mean"}
SAMPLED: dict[str, set[str]] = {
    "ppo": {"loss/policy", "loss/value", "entropy", "clip_fraction", "explained_variance", "response_length"},
    "grpo": COMPLETIONS,
    "rloo": COMPLETIONS,
}
"""What each step tells of the methods whose answers are drawn, beside loss, reward and divergence."""


def saved(folder: Path, method: str, adapter: bool) -> Any:
    """The model that a run kept, as a user loads it, in float64."""
    with plain_libraries():
        return _loaded(folder, method, adapter)


def _loaded(folder: Path, method: str, adapter: bool) -> Any:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if method == "reward":
        kind: Any = AutoPeftModelForSequenceClassification if adapter else AutoModelForSequenceClassification
        return kind.from_pretrained(folder / "model", num_labels=1, dtype=torch.float64).eval()
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    return kind.from_pretrained(folder / "model", dtype=torch.float64).eval()


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that runs make, for their held-out rows as tokens."""
    made: list[Any] = []
    make = launch._make_trainer
    monkeypatch.setattr(launch, "_make_trainer", lambda parts: made.append(make(parts)) or made[-1])
    return made


def trained(values: dict[str, Any], reference: Path) -> tuple[Path, Rows]:
    """The run folder and its metrics; the reference's files are as they were."""
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    folder = tiny.train(values)
    assert {path.name: path.read_bytes() for path in reference.iterdir()} == before
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_steps(lines: Rows, told: set[str], optimizer: str) -> None:
    """Both steps tell what they should, in finite numbers."""
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(told <= line.keys() for line in steps), told - set(steps[0])
    assert all(math.isfinite(line[name]) for line in steps for name in {"loss", "grad_norm", *told})
    assert all(("merge/weight" in line) == optimizer.startswith("on") for line in steps)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_two_steps(
    method: str,
    optimizer: str,
    trainers: list[Any],
    in_float64: Any,
    tiny_models: tuple[Path, Path],
    tiny_pairs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    loss, told = METHODS[method]
    instructions = [tiny.write_rows(tmp_path / f"{n}.jsonl", tiny.instruction_rows(n)) for n in (24, 8)]
    data = (instructions[0], instructions[1]) if method == "sft" else tiny_pairs
    training = {"max_steps": 2, "per_device_eval_batch_size": 64, "max_grad_norm": 0.0}
    values = tiny.recipe(
        tiny_models, data, tmp_path / "run", method=method, training=training, **OPTIMIZERS[optimizer]
    )
    folder, lines = trained(values, tiny_models[1])
    check_steps(lines, told, optimizer)
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    model = saved(folder, method, optimizer == "lora")
    rows = list(trainers[0].eval_dataset)
    expected = loss(model, in_float64(tiny_models[1]), rows)
    assert measured[-1] == pytest.approx(expected, rel=2e-5)
    assert abs(measured[-1] - measured[0]) > 1e-3 * abs(measured[0])  # else the oracle has been told nothing


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", SAMPLED)
def test_two_steps_of_answers_that_are_drawn(
    method: str,
    optimizer: str,
    trainers: list[Any],
    tiny_models: tuple[Path, Path],
    tiny_pairs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reward that is told is the rule's, the divergence begins at 0, the reference in memory stays.

    Their losses off the policy are held to the oracle in test_ppo.py and test_group_sampling.py.
    """
    scored: list[list[float]] = []
    rule = rules.letters
    monkeypatch.setattr(rules, "letters", lambda *given: scored.append(rule(*given)) or scored[-1])
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "run",
        method=method,
        loss={"rewards": "tests.unit.train.rules:letters", "max_new_tokens": 6, "beta": 0.1},
        training={"max_steps": 2, "per_device_train_batch_size": 8},
        evaluation={"at_start": False},
        **OPTIMIZERS[optimizer],
    )
    folder, lines = trained(values, tiny_models[1])
    check_steps(lines, {"reward", "kl", *SAMPLED[method]}, optimizer)
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["reward"] == pytest.approx(mean(scored[0]), rel=1e-6)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    end = next(line for line in lines if "eval_kl" in line)
    assert end["eval_kl"] != 0.0
    if optimizer != "lora":  # there it is the model without its adapter
        trainer = trainers[0]
        reference = (trainer.maker.reference if method == "ppo" else trainer.ref_model).state_dict()
        on_disk = tiny.weights(tiny_models[1])
        assert all(torch.equal(reference[name], value) for name, value in on_disk.items())
    assert all(value.isfinite().all() for value in saved(folder, method, optimizer == "lora").parameters())
