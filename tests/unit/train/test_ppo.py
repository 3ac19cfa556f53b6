"""PPO from a recipe: what it logs, learns, saves, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.equivalence.runs import assert_same, assert_same_run
from trimtab import UserError
from trimtab.rewards import load_reward
from trimtab.train.checkpoints import checkpoint_folders

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing the trainers

RULE = "tests.tiny:share_of_small"
LOSS = {"rewards": RULE, "max_new_tokens": 6, "beta": 0.3}
ADAMW = {"optimizer": tiny.ADAMW, "base": None}
HEAD = {"pattern": "^value_head", "lr": 3e-2}


def recipe(models: Any, rows: Any, output: Path, **sections: Any) -> dict[str, Any]:
    sections["loss"] = {**LOSS, **sections.get("loss", {})}
    return tiny.recipe(models, rows, output, method="ppo", **sections)


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_the_first_minibatch_has_the_ratio_1(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    loss = {"epochs": 1}
    folder = tiny.train(recipe(tiny_models, tiny_pairs, tmp_path / "o", loss=loss, **ADAMW))
    for line in steps(folder):
        assert line["ratio"] == pytest.approx(1, abs=1e-5)
        assert line["clip_fraction"] == 0
        assert line["approx_kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "optimizer",
    [
        tiny.ADAMW,
        {"name": "ondare"},
        {"name": "onties", "merge_every": 2},
        {"name": "online_merging", "sparsify": "top", "consensus": "sign"},
    ],
    ids=lambda section: section["name"],
)
def test_a_run(optimizer: dict[str, Any], tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    merges = {} if optimizer["name"] != "adamw" else {"base": None}
    values = recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "o",
        optimizer=optimizer,
        loss={"epochs": 2, "minibatches": 2},
        evaluation={"samples": 1, "max_new_tokens": 2},
        **merges,
    )
    folder = tiny.train(values)
    assert [line["step"] for line in steps(folder)] == [1, 2, 3, 4]
    for line in steps(folder):
        assert line["loss"] == pytest.approx(
            line["loss/policy"] + 0.1 * line["loss/value"], rel=1e-4, abs=1e-6
        )
        names = {
            "reward",
            "objective",
            "kl",
            "kl_coefficient",
            "entropy",
            "clip_fraction",
            "approx_kl",
            "ratio",
        }
        names |= {"explained_variance", "value_clip_fraction", "response_length", "ended_by_eos"}
        assert names <= line.keys()
        assert line["objective"] == pytest.approx(line["reward"] - 0.3 * line["kl"], rel=1e-5)
    start, trained = tiny.weights(tiny_models[1]), tiny.weights(folder / "model")
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    _, loading = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} >= {
        "value_head.safetensors",
        "rollout_0.pt",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 4]
    card = (folder / "README.md").read_text()
    assert "PPO, arXiv 1707.06347" in card
    assert "| reward |" in card
    assert "what the reward that was trained for thinks" in card
    if merges == {}:
        assert "value_head" in (folder / "recipe.yaml").read_text().partition("without_delta")[2]


def cut_off(whole: Path, step: int, copy: Path) -> None:
    """A copy of a run as a kill behind a checkpoint would have left it."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    for later in [at for at in checkpoint_folders(copy) if at > step]:
        shutil.rmtree(checkpoint_folders(copy)[later])


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(
    step: int, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    """Cut off within a rollout (3), where one is used up (4), and in the next pass over the rows (6)."""
    values = recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "whole",
        loss={"epochs": 2, "minibatches": 2, "kl_target": 0.01, "kl_gain": 1.0},
        training={"max_steps": 7, "save_steps": 1, "per_device_train_batch_size": 8},
        evaluation={"every": 2},
    )
    whole = tiny.train(values)
    assert len({line["kl_coefficient"] for line in steps(whole)}) == 2
    cut_off(whole, step, tmp_path / "copy")
    tiny.train({**values, "output": str(tmp_path / "copy")}, resume=True)
    assert_same_run(tmp_path / "copy", whole)
    for load, name in ((load_file, "value_head.safetensors"), (torch.load, "rollout_0.pt")):
        states = [load(run / "checkpoint-7" / name) for run in (tmp_path / "copy", whole)]
        assert_same(*states, name)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reward_rises(seed: int, tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    folder = tiny.train(learning(tiny_models, tiny_pairs, tmp_path / "o", seed, {"beta": 0.01}, 60))
    lines = steps(folder)
    assert lines[0]["reward"] < 0.4, "26 of 104 tokens are small letters"
    assert lines[-1]["reward"] > 0.7
    assert lines[-1]["kl"] > 4, "and nothing keeps it near the reference"
    assert lines[-1]["entropy"] < lines[0]["entropy"]


def test_the_divergence_stays_near_its_target(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    loss = {"beta": 0.2, "kl_target": 1.0, "kl_gain": 0.5}
    lines = steps(tiny.train(learning(tiny_models, tiny_pairs, tmp_path / "o", 0, loss, 100)))
    assert all(line["kl"] < 2.5 for line in lines)
    assert 0.5 < sum(line["kl"] for line in lines[-2:]) / 2 < 1.5
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.08
    assert len({line["kl_coefficient"] for line in lines}) == len(lines)


def learning(
    models: Any, rows: Any, output: Path, seed: int, loss: dict[str, Any], count: int
) -> dict[str, Any]:
    return recipe(
        models,
        rows,
        output,
        seed=seed,
        loss={**loss, "max_new_tokens": 8, "epochs": 2},
        optimizer={**tiny.ADAMW, "lr": 3e-3, "groups": [HEAD]},
        base=None,
        schedule={"lr": {"type": "constant"}},
        training={
            "max_steps": count,
            "save_steps": count,
            "logging_steps": 20,
            "per_device_train_batch_size": 16,
        },
    )


def test_under_an_adapter_the_reference_is_the_model_without_it(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    sections = {**ADAMW, "adapter": {"r": 2}, "training": {"max_steps": 4, "save_steps": 3}}
    values = recipe(tiny_models, tiny_pairs, tmp_path / "whole", loss={"epochs": 2}, **sections)
    folder = tiny.train(values)
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    assert not any("value_head" in name for name in adapter_weights(folder / "model"))
    first, last = steps(folder)[0], steps(folder)[-1]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(last["kl"]) > 1e-4
    cut_off(folder, 3, tmp_path / "copy")
    tiny.train({**values, "output": str(tmp_path / "copy")}, resume=True)
    assert_same_run(tmp_path / "copy", folder)


def test_an_adapter_goes_on_from_where_it_is(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    """The reference is then the adapter as it was, not the model without it."""
    first = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "first", adapter={"r": 2}, training={"max_steps": 4}, **ADAMW
    )
    start = str(tiny.train(first) / "model")
    values = recipe(
        tiny_models, tiny_pairs, tmp_path / "o", reference=start, training={"max_steps": 2}, **ADAMW
    )
    folder = tiny.train(values)
    assert steps(folder)[0]["kl"] == pytest.approx(0, abs=1e-5)
    before, after = adapter_weights(Path(start)), adapter_weights(folder / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("training", "close"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 0.02),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1e-5),
    ],
    ids=["checkpointing", "bf16", "accumulation"],
)
def test_what_changes_memory_does_not_change_the_step(
    training: dict[str, Any], close: float, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    runs = [
        tiny.train(
            recipe(
                tiny_models,
                tiny_pairs,
                tmp_path / name,
                loss={"generation_batch_size": size},
                training={"max_steps": 2, "per_device_train_batch_size": 4, **one},
                **ADAMW,
            )
        )
        for name, size, one in (("plain", 16, {}), ("other", 3, training))
    ]
    plain, other = (steps(run)[1] for run in runs)
    names = ["loss/value", "reward", "entropy", "response_length"]
    assert [other[name] for name in names] == pytest.approx([plain[name] for name in names], rel=close)
    assert other["loss/policy"] == pytest.approx(plain["loss/policy"], rel=close, abs=close / 100)
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=max(close, 1e-4))


def test_the_best_checkpoint_is_kept(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "save_steps": 2}
    values = recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "o",
        training={"max_steps": 6, **best},
        evaluation={"every": 2},
        **ADAMW,
    )
    folder = tiny.train(values)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = {line["step"]: line["eval_reward"] for line in lines if "eval_reward" in line and line["step"]}
    step = max(rewards, key=lambda at: (rewards[at], -at))
    assert_same(tiny.weights(folder / "model"), tiny.weights(folder / f"checkpoint-{step}"), "model")


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_parts_of_a_sum_are_logged(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    loss = {"rewards": [RULE, {"rule": "tests.tiny:minus_length", "weight": 0.5}]}
    folder = tiny.train(
        recipe(tiny_models, tiny_pairs, tmp_path / "o", loss=loss, training={"max_steps": 1}, **ADAMW)
    )
    line = steps(folder)[0]
    small, short = line[f"rewards/{RULE}/mean"], line["rewards/tests.tiny:minus_length/mean"]
    assert line["reward"] == pytest.approx(small + 0.5 * short, rel=1e-6)
    assert -6 <= short < 0


def test_a_reward_model_scores(trainer_of: Any, tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    judge = tiny.train(
        tiny.recipe(tiny_models, tiny_pairs, tmp_path / "judge", method="reward", training={"max_steps": 2})
    )
    trainer = trainer_of(method="ppo", loss={**LOSS, "rewards": str(judge / "model")}, **ADAMW)
    rows = [trainer.train_dataset[place] for place in range(5)]
    judged = trainer.maker.judge(rows, range(5))
    texts = [response.text for response in judged.responses]
    expected = load_reward(str(judge / "model"))([row["prompt"] for row in rows], texts)
    assert judged.scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 5


def test_a_reward_is_asked_outside_of_autocast(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    seen = []

    def rule(prompts: Any, responses: list[str], rows: Any) -> list[float]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return [0.0] * len(responses)

    monkeypatch.setattr(tiny, "share_of_small", rule)
    training = {"max_steps": 1, "bf16": True}
    folder = tiny.train(recipe(tiny_models, tiny_pairs, tmp_path / "o", training=training, **ADAMW))
    assert set(seen) == {(False, False)}
    assert steps(folder)[0]["kl"] == pytest.approx(0, abs=1e-6), "policy and reference are read alike"
    assert steps(folder)[0]["ratio"] == pytest.approx(1, abs=1e-6)


def test_a_score_that_is_not_finite_is_refused(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    values = recipe(tiny_models, tiny_pairs, tmp_path / "o", loss={"rewards": "tests.tiny:not_a_number"})
    with pytest.raises(UserError, match="every score must be a finite number"):
        tiny.train(values)


def test_a_dry_run_counts_steps_and_memory(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, capsys: Any
) -> None:
    from trimtab.recipe import make_recipe
    from trimtab.train import config_class, run

    training = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5}
    values = recipe(
        tiny_models, tiny_pairs, tmp_path / "o", loss={"epochs": 3, "minibatches": 2}, training=training
    )
    run(make_recipe(values, config_class=config_class), dry_run=True)
    said = capsys.readouterr().out
    assert "36 of 5 " in said  # 24 rows are 3 rollouts of 10, 6 steps each, twice
    assert "memory: reference model" in said
    folder = tiny.train(values)
    assert steps(folder)[-1]["step"] == 36


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"loss": {"rewards": None}}, r"loss\.rewards is missing"),
        ({"loss": {"clip": 1.0}}, r"loss\.clip must be below 1, not 1"),
        ({"loss": {"epochs": 0}}, r"loss\.epochs must be at least 1, not 0"),
        ({"loss": {"trace": 1.5}}, r"loss\.trace must be at most 1, not 1\.5"),
        ({"loss": {"kl_gain": 6}}, r"loss\.kl_gain must be below 5, not 6"),
        ({"loss": {"kl_target": 1, "beta": 0}}, r"loss\.kl_target cannot be reached from a beta of 0"),
        ({"loss": {"minibatchs": 2}}, r"loss\.minibatchs .*minibatches"),
        ({"loss": {"max_new_tokens": 64}}, r"loss\.max_new_tokens is 64 and leaves no room for a prompt"),
        ({"loss": {"rewards": "tests.tiny:nothing"}}, r"loss\.rewards.*nothing"),
        ({"data": {"streaming": True}}, r"data\.streaming is not supported for method ppo"),
        ({"training": {"dataloader_drop_last": True}}, r"dataloader_drop_last has no effect with method ppo"),
        ({"training": {"torch_compile": True}}, r"torch_compile is not supported for method ppo"),
        ({"training": {"ddp_find_unused_parameters": True}}, r"must be false for method ppo: its value head"),
        ({"training": {"neftune_noise_alpha": 5}}, r"neftune_noise_alpha is not for method ppo"),
        ({"training": {"load_best_model_at_end": True}}, r"training\.metric_for_best_model is missing"),
        (
            {"optimizer": {"child_tuning": {"variant": "D"}}},
            r"optimizer\.child_tuning\.variant must be F for method ppo",
        ),
        ({"training": {"max_stepz": 5}}, r"max_stepz is not a field of TrainerConfig; did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    sections: dict[str, Any], sentence: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    rest = {name: section for name, section in sections.items() if name != "data"}
    values = recipe(tiny_models, tiny_pairs, tmp_path / "o", **rest)
    values["data"] |= sections.get("data", {})
    values["loss"] = {key: value for key, value in values["loss"].items() if value is not None}
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()
