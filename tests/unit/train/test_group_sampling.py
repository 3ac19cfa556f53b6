"""GRPO and RLOO through TRL: their losses off the policy are the oracle's; runs; exact resumes; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.equivalence.runs import assert_same, assert_same_run
from tests.oracle import losses, sampled
from tests.unit.train import rules
from trimtab import UserError
from trimtab.recipe import make_recipe
from trimtab.terminal import plain_libraries
from trimtab.train import config_class
from trimtab.train.checkpoints import checkpoint_folders
from trimtab.train.estimate import count_steps, measure
from trimtab.train.grpo import make_trainer
from trimtab.train.parts import gather_parts

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

RULES = "tests.unit.train.rules"
REWARDS = [f"{RULES}:letters", {"rule": f"{RULES}:shared", "weight": 0.5}]
LOSS = {"rewards": REWARDS, "max_new_tokens": 6, "num_generations": 4, "beta": 0.3}


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Prompts with a word that rules know of."""
    rows = tiny.preference_rows(count, seed=3)
    return [{"prompt": row["prompt"], "word": row["chosen"][0]["content"]} for row in rows]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of training and of held-out prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    written = [tiny.write_rows(folder / f"{count}.jsonl", prompt_rows(count)) for count in (8, 2)]
    return written[0], written[1]


@pytest.fixture
def values(
    tiny_models: tuple[Path, Path], prompts: tuple[Path, Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """A recipe's values, with the given sections laid over."""

    def make(**sections: Any) -> dict[str, Any]:
        training = {"per_device_train_batch_size": 4, **sections.pop("training", {})}
        loss = {**LOSS, **sections.pop("loss", {})}
        data = sections.pop("data", {})
        made = tiny.recipe(
            tiny_models, prompts, tmp_path / "run", **{"loss": loss, "training": training, **sections}
        )
        return {**made, "data": {**made["data"], **data}}

    return make


def generation(trainer: Any, size: int) -> dict[str, torch.Tensor]:
    """What the trainer learns from: responses of the policy as it is, to the first ``size`` prompts."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    group = trainer.num_generations
    rows = [trainer.train_dataset[index] for index in range(size) for _ in range(group)]
    batch: dict[str, torch.Tensor] = trainer._prepare_inputs(rows)
    return batch


def responses_of(batch: dict[str, torch.Tensor], models: list[Any], temperature: float) -> dict[str, Any]:
    """The responses of a generation by the word asked for, with their rewards and log-probabilities."""
    groups: dict[str, list[tuple[int, float, sampled.Sampled]]] = {}
    models = [sampled.Tempered(model, temperature) for model in models]
    tokenizer = tiny.tokenizer()
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        response = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        word = tokenizer.decode(prompt, skip_special_tokens=True).removeprefix("say ")
        text = [tokenizer.decode(response, skip_special_tokens=True)]
        reward = rules.letters(None, text, None)[0] + 0.5 * rules.shared(None, text, [{"word": word}])[0]
        logps = tuple(losses.log_probabilities(one, prompt, response) for one in models)
        groups.setdefault(word, []).append((row, reward, logps))
    return groups


def moved_trainer(trainer_of: Any, in_float64: Any, models: Any, prompts: Any, **sections: Any) -> Any:
    """A trainer, a generation of its start, and the groups; then its policy becomes the base, τ away."""
    training = {"per_device_train_batch_size": 12, **sections.pop("training", {})}
    trainer = trainer_of(prompts, optimizer=tiny.ADAMW, base=None, training=training, **sections)
    batch = generation(trainer, 3)
    base, reference = in_float64(models[0]), in_float64(models[1])
    trainer.model.load_state_dict(base.state_dict())
    temperature = sections["loss"].get("temperature", 1.0)
    groups = responses_of(batch, [base, reference, reference], temperature)
    assert [len(group) for group in groups.values()] == [4, 4, 4]
    return trainer, batch, groups


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        ({}, {}),
        ({"type": "dapo", "scale_rewards": "batch"}, {}),
        ({"type": "dr_grpo", "scale_rewards": "none", "temperature": 1.7}, {}),
        ({"type": "bnpo", "beta": 0.0}, {}),
    ],
    ids=["the paper's", "dapo", "dr_grpo", "bnpo without a reference"],
)
def test_grpo_s_loss_is_the_oracle_s(
    settings: dict[str, Any],
    training: dict[str, Any],
    trainer_of: Any,
    in_float64: Any,
    tiny_models: Any,
    prompts: Any,
) -> None:
    loss = {**LOSS, "num_iterations": 2, "epsilon": 0.02, **settings}
    trainer, batch, groups = moved_trainer(
        trainer_of, in_float64, tiny_models, prompts, method="grpo", loss=loss, training=training
    )
    rewards = [[reward for _, reward, _ in group] for group in groups.values()]
    advantages = sampled.grpo_advantages(rewards, loss.get("scale_rewards", "group"))
    flat = [one for group in groups.values() for one in group]
    expected, clipped = sampled.grpo(
        [logps for _, _, logps in flat],
        [value for group in advantages for value in group],
        beta=loss["beta"],
        epsilon=loss["epsilon"],
        kind=loss.get("type", "grpo"),
        longest=loss["max_new_tokens"],
    )
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, batch))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    metrics = trainer._metrics["train"]
    assert metrics["clip_ratio/region_mean"] == pytest.approx([clipped])
    assert 0 < clipped < 1
    everything = [value for group in rewards for value in group]
    assert metrics["reward"] == pytest.approx([sum(everything) / 12])
    assert set(metrics) >= {f"rewards/{RULES}:{name}/mean" for name in ("letters", "shared")}
    assert (trainer.ref_model is None) == (loss["beta"] == 0)


@pytest.mark.parametrize("normalized", [False, True])
def test_rloo_s_loss_is_the_oracle_s(
    normalized: bool, trainer_of: Any, in_float64: Any, tiny_models: Any, prompts: Any
) -> None:
    loss = {**LOSS, "epsilon": 0.05, "normalize_advantages": normalized}
    # The start is τ away from the reference as well, so that the penalty is not zero.
    sections = {"model": str(tiny_models[0]), "method": "rloo", "loss": loss}
    trainer = trainer_of(
        prompts, optimizer=tiny.ADAMW, base=None, training={"per_device_train_batch_size": 12}, **sections
    )
    batch = generation(trainer, 3)
    base, reference = (in_float64(folder) for folder in tiny_models)
    trainer.model.load_state_dict(reference.state_dict())
    groups = responses_of(batch, [reference, base, reference], 1.0)
    expected, clipped = sampled.rloo(
        [[(logps, reward) for _, reward, logps in group] for group in groups.values()],
        beta=loss["beta"],
        epsilon=loss["epsilon"],
        normalized=normalized,
    )
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, batch))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == pytest.approx([clipped])
    assert clipped > 0
    tokens = [one[2] for group in groups.values() for one in group]
    kl = sum(sum(old) - sum(theirs) for _, old, theirs in tokens) / sum(len(old) for _, old, _ in tokens)
    assert trainer._metrics["train"]["kl"] == pytest.approx([kl], rel=1e-4)


def test_a_truncated_prompt_is_what_is_answered(values: Any) -> None:
    made = values(
        method="grpo",
        optimizer=tiny.ADAMW,
        base=None,
        data={"max_length": 13, "overlong": "truncate"},
    )
    with plain_libraries():
        trainer = make_trainer(gather_parts(make_recipe(made, config_class=config_class), resumes=False))
        batch = generation(trainer, 1)
    expected = trainer.train_dataset[0]["prompt_ids"]
    whole = trainer.processing_class.apply_chat_template(
        trainer.train_dataset[0]["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert len(whole) > 7
    assert expected == whole[-7:]
    assert batch["prompt_ids"].tolist() == [expected] * 4


@pytest.mark.parametrize("method", ["grpo", "rloo"])
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
def test_a_run_with_every_optimizer(
    optimizer: dict[str, Any], method: str, values: Any, tiny_models: Any
) -> None:
    sections = {"base": None} if optimizer["name"] == "adamw" else {}
    before = tiny.weights(tiny_models[1])
    made = values(method=method, optimizer=optimizer, training={"max_steps": 2}, **sections)
    folder = tiny.train(made)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    # On the policy every ratio is 1 and advantages add up to 0; the policy is still the reference.
    assert [first["loss"], first["kl"], lines[0]["eval_kl"]] == pytest.approx([0, 0, 0], abs=1e-6)
    last = next(line for line in reversed(lines) if "loss" in line)
    assert last["kl"] != 0
    wanted = {"reward", "entropy", "completions/mean_length", "clip_ratio/region_mean", "grad_norm"}
    assert wanted <= first.keys()
    assert 0 < first["completions/mean_length"] <= 6
    card = (folder / "README.md").read_text()
    assert {"grpo": "arXiv 2402.03300", "rloo": "arXiv 2402.14740"}[method] in card
    assert "| reward |" in card
    assert tiny.weights(folder / "model").keys() == before.keys()
    assert_same(tiny.weights(tiny_models[1]), before, "reference")


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_without_a_penalty_there_is_no_divergence_to_log(method: str, values: Any) -> None:
    folder = tiny.train(values(method=method, loss={"beta": 0}, training={"max_steps": 2}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("reward" in line for line in lines) == 2
    assert not any("kl" in line or "eval_kl" in line for line in lines)


def test_the_reference_is_the_recipe_s_and_stays(trainer_of: Any, tiny_models: Any, prompts: Any) -> None:
    trainer = trainer_of(
        prompts,
        method="grpo",
        model=str(tiny_models[0]),
        loss=LOSS,
        optimizer={"name": "ondare", "policy_differs": True},
        training={"max_steps": 2, "per_device_train_batch_size": 4},
    )
    trainer.train()
    reference = tiny.weights(tiny_models[1])
    kept = dict(trainer.ref_model.named_parameters())
    assert_same({name: kept[name].detach() for name in reference}, reference, "reference")
    moved = dict(trainer.model.named_parameters())
    assert any(not torch.equal(moved[name], reference[name]) for name in reference)


@pytest.mark.parametrize("adapter", [{"r": 2}, {"r": 2, "dropout": 0.2}])
def test_an_adapter_is_compared_with_its_start(adapter: Any, values: Any) -> None:
    made = values(method="rloo", adapter=adapter, optimizer=tiny.ADAMW, base=None, training={"max_steps": 2})
    folder = tiny.train(made)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert (folder / "model" / "adapter_model.safetensors").is_file()


RESUMES = {
    # Stopped after 3 optimizer steps; 8 prompts.
    "inside a generation": ("grpo", {"num_iterations": 2}, {"steps_per_generation": 2}),
    "with accumulation": ("rloo", {}, {"steps_per_generation": 4, "gradient_accumulation_steps": 3}),
    "in the second epoch": ("grpo", {}, {"per_device_train_batch_size": 16}),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, values: Any, tmp_path: Path) -> None:
    method, loss, training = RESUMES[name]
    training = {"max_steps": 5, "save_steps": 3, **training}
    made = values(method=method, loss=loss, training=training, evaluation={"every": 2})
    whole = tiny.train(made)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(checkpoint_folders(copy)[5])
    tiny.train({**made, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)


def test_a_checkpoint_without_its_place_is_refused(values: Any) -> None:
    made = values(method="grpo", training={"max_steps": 4})
    whole = tiny.train(made)
    shutil.rmtree(whole / "model")
    shutil.rmtree(checkpoint_folders(whole)[4])
    checkpoint = checkpoint_folders(whole)[2]
    marker = json.loads((checkpoint / "trimtab.json").read_text())
    del marker["files"]["responses_0.pt"]
    (checkpoint / "trimtab.json").write_text(json.dumps(marker))
    (checkpoint / "responses_0.pt").unlink()
    with pytest.raises(UserError, match=r"has no responses_0\.pt"):
        tiny.train(made, resume=True)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 2.5},
        {"steps_per_generation": 3, "num_train_epochs": 2},
        {"generation_batch_size": 24, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    ],
    ids=lambda training: " ".join(training),
)
def test_steps_are_counted_as_the_trainer_counts_them(
    training: dict[str, Any], trainer_of: Any, prompts: Any
) -> None:
    trainer = trainer_of(
        prompts,
        method="grpo",
        loss={**LOSS, "num_iterations": 2},
        optimizer=tiny.ADAMW,
        base=None,
        training={"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 1, **training},
    )
    loader = trainer.get_train_dataloader()
    expected = trainer.set_initial_training_values(trainer.args, loader)[-1]
    assert count_steps(8, trainer.args) == expected > 0


def test_a_resolved_recipe_says_what_the_rewards_are(values: Any) -> None:
    recipe = make_recipe(values(method="rloo"))
    assert recipe.resolved()["loss"]["rewards"] == [
        {"rule": f"{RULES}:letters", "weight": 1.0},
        {"rule": f"{RULES}:shared", "weight": 0.5},
    ]
    assert make_recipe(recipe.resolved()) == recipe


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_estimate_counts_the_models_that_are_loaded(beta: float, values: Any, tiny_models: Any) -> None:
    rewards = [{"likelihood": str(tiny_models[0])}, f"{RULES}:letters"]
    made = values(method="rloo", loss={"rewards": rewards, "beta": beta}, optimizer=tiny.ADAMW, base=None)
    size = measure(gather_parts(make_recipe(made, config_class=config_class), resumes=False))
    one = 4 * size.parameters
    expected = {"reward models": one, **({"reference model": one} if beta else {})}
    assert {name: count for name, count in size.memory.items() if name.endswith(" model")} | {
        "reward models": size.memory["reward models"]
    } == expected


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"training": {"per_device_train_batch_size": 6}}, r"loss\.num_generations is 4, and 6 responses"),
        (
            {"training": {"steps_per_generation": 3, "per_device_train_batch_size": 2}},
            "6 responses .*× training",
        ),
        (
            {"training": {"per_device_eval_batch_size": 2}},
            "each held-out prompt is answered 4 times, and 2 resp",
        ),
        ({"training": {"per_device_train_batch_size": 64}}, "8 prompts and one generation takes 16"),
        ({"training": {"use_vllm": True}}, r"training\.use_vllm needs vLLM"),
        (
            {"training": {"vllm_mode": "server", "sapo_temperature_neg": 1.0}},
            "vllm_mode would .*; .*loss sapo",
        ),
        ({"training": {"chat_template_kwargs": {"a": 1}}}, "chat_template_kwargs has no effect"),
        ({"training": {"sync_ref_model": True}}, "would move the reference"),
        ({"training": {"load_best_model_at_end": True}}, "no loss that tells how good answers"),
        ({"training": {"dataloader_drop_last": True}}, "grpo, which orders prompts by itself"),
        ({"training": {"temperature": 0.5}}, r"training\.temperature is written as loss\.temperature"),
        ({"training": {"reward_weights": [1.0]}}, r"reward_weights is written as loss\.rewards"),
        ({"loss": {"num_generations": 1}}, r"loss\.num_generations must be at least 2"),
        (
            {"loss": {"max_new_tokens": 64}},
            r"leaves no room for a prompt; it must be below data\.max_length, 64",
        ),
        ({"loss": {"rewards": []}}, r"loss\.rewards must not be empty"),
        ({"loss": {"rewards": None}}, r"loss\.rewards must not be empty"),
        ({"loss": {"rewards": "tests.unit.train.rules:nothing"}}, "cannot be imported"),
        ({"loss": {"rewards": {"model": "./nowhere"}}}, r"loss\.rewards.*nowhere.*does not exist"),
        (
            {"data": {"max_length": 512}, "loss": {"max_new_tokens": 250}},
            r"prompt of data\.train has \d+ tokens, and with loss\.max_new_tokens 250 .* the 256 positions",
        ),
        ({"data": {"streaming": True}}, "not supported for method grpo"),
    ],
    ids=lambda case: "" if isinstance(case, str) else str(case),
)
def test_what_is_refused_before_a_model_is_loaded(
    sections: dict[str, Any], sentence: str, values: Any
) -> None:
    made = values(method="grpo", optimizer=tiny.ADAMW, base=None, **sections)
    with pytest.raises(UserError, match=sentence):
        gather_parts(make_recipe(made, config_class=config_class), resumes=False)
