"""Regularisers from a recipe: what is evaluated and kept, runs that resume, rows that are read, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.equivalence.runs import assert_same, assert_same_run, logged
from tests.oracle import losses, regularisers
from trimtab import UserError
from trimtab.optim import FisherChildTuning, GradientProjection
from trimtab.optim.regulariser import attached
from trimtab.recipe import Source, make_recipe
from trimtab.train.checkpoints import checkpoint_folders, last_complete
from trimtab.train.row_losses import read_answers

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

ONDARE = {"name": "ondare"}
optimizers = pytest.mark.parametrize("optimizer", [tiny.ADAMW, ONDARE], ids=lambda section: section["name"])


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    """Capability rows."""
    return tiny.write_rows(tmp_path / "instructions.jsonl", tiny.instruction_rows(6, seed=3))


def sections(optimizer: dict[str, Any], **regulariser: Any) -> dict[str, Any]:
    base = {"base": None} if optimizer["name"] == "adamw" else {}
    return {"optimizer": {**optimizer, **regulariser}, "evaluation": {"every": 2}, **base}


def saved_state(run: Path, key: str) -> dict[str, torch.Tensor]:
    """What the last checkpoint keeps under a key, by the names of the parameters."""
    folder = last_complete(run)
    assert folder is not None
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    names = [
        (name, place)
        for group in state["param_groups"]
        for name, place in zip(group["param_names"], group["params"], strict=True)
    ]
    return {name: state["state"][place][key] for name, place in names}


@optimizers
def test_the_average_is_kept_and_evaluated_and_training_goes_on_from_the_weights(
    optimizer: dict[str, Any], tiny_models: Any, tiny_pairs: Any, tmp_path: Path, trainer_of: Any
) -> None:
    plain = tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / "a", **sections(optimizer)))
    run = tiny.train(
        tiny.recipe(tiny_models, tiny_pairs, tmp_path / "b", **sections(optimizer, ema={"coefficient": 0.25}))
    )
    first, second = (tiny.weights(last_complete(folder)) for folder in (plain, run))  # type: ignore[arg-type]
    assert_same(first, second, "the weights that are trained")
    average, kept = saved_state(run, "ema_average"), tiny.weights(run / "model")
    assert_same(kept, {name: average[name] for name in kept}, "model/")
    assert any(not torch.equal(kept[name], second[name]) for name in kept)
    evaluated = [
        [line["eval_loss"] for line in logged(folder) if "eval_loss" in line] for folder in (plain, run)
    ]
    assert len(evaluated[1]) == 3
    assert evaluated[0][0] == evaluated[1][0]  # before the first step
    judge = trainer_of(model=str(run / "model"), **sections(tiny.ADAMW))
    assert judge.evaluate()["eval_loss"] == pytest.approx(evaluated[1][-1], rel=1e-6)
    assert evaluated[0][-1] != evaluated[1][-1]


def test_the_average_after_a_kill_between_the_last_checkpoint_and_the_model(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "whole", **sections(ONDARE, ema={"coefficient": 0.25})
    )
    whole = tiny.train(values)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)


CASES: dict[str, dict[str, Any]] = {
    "ema": {"coefficient": 0.25, "every": 2},
    "pull": {"strength": 0.25},
    "elastic_reset": {"coefficient": 0.25, "every": 3},
    "child_tuning": {"reserve_rate": 0.25},
    "child_tuning ": {"variant": "D", "rows": 3},
    "projection": {"rows": 4, "every": 3},
}


@optimizers
def test_a_recipe_s_regularisers_are_attached_in_the_order_in_which_they_act(
    optimizer: dict[str, Any], trainer_of: Any, instructions: Path, tiny_pairs: Any
) -> None:
    given = {
        "projection": {"data": [str(instructions), str(tiny_pairs[1])], "rows": 2, "every": 4},
        "child_tuning": {"reserve_rate": 0.25},
        "pull": {"strength": 0.125},
        "elastic_reset": {"coefficient": 0.5, "every": 6},
        "ema": {"coefficient": 0.75, "every": 2},
    }
    made = trainer_of(**sections(optimizer, **given), seed=5).create_optimizer()
    owners = [hook.__self__ for hook in made._optimizer_step_pre_hooks.values()]
    projection, masks, pull, reset, ema = owners
    assert [type(owner).__name__ for owner in owners] == [
        "GradientProjection",
        "ChildTuning",
        "PullToReference",
        "ElasticReset",
        "EMA",
    ]
    assert (len(projection.losses), projection.every) == (2, 4)
    assert (masks.reserve_rate, masks.seed) == (0.25, 5)
    assert pull.strength == 0.125
    assert (reset.coefficient, reset.every) == (0.5, 6)
    assert (ema.coefficient, ema.every) == (0.75, 2)


@pytest.mark.parametrize("name", CASES)
@optimizers
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str,
    optimizer: dict[str, Any],
    tiny_models: Any,
    tiny_pairs: Any,
    instructions: Path,
    tmp_path: Path,
) -> None:
    section = dict(CASES[name])
    if name == "projection":
        section["data"] = [str(instructions), str(tiny_pairs[1])]
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "whole", **sections(optimizer, **{name.strip(): section})
    )
    whole = tiny.train(values)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(checkpoint_folders(copy)[4])
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_methods_that_sample_are_regularised_and_resume(
    method: str, tiny_models: Any, tiny_pairs: Any, instructions: Path, tmp_path: Path
) -> None:
    loss = {"rewards": "tests.tiny:share_of_small", "max_new_tokens": 4, "beta": 0.3}
    given = {
        "projection": {"data": str(instructions), "rows": 2, "every": 2},
        "child_tuning": {"variant": "D", "rows": 3, "data": str(instructions)},
        "pull": {"strength": 0.25},
        "elastic_reset": {"coefficient": 0.25, "every": 3},
        "ema": {"coefficient": 0.25},
    }
    if method == "ppo":  # D is refused: it would freeze the value head
        given["child_tuning"] = {"variant": "F"}
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path / "whole",
        method=method,
        loss={**loss, **({"num_generations": 2} if method == "grpo" else {})},
        training={"per_device_train_batch_size": 4},
        **sections(ONDARE, **given),
    )
    whole = tiny.train(values)
    for cut in ((4,), ()):  # after the second step, and after the last
        copy = tmp_path / f"copy{len(cut)}"
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "model")
        for step in cut:
            shutil.rmtree(checkpoint_folders(copy)[step])
        tiny.train({**values, "output": str(copy)}, resume=True)
        assert_same_run(copy, whole)


def test_fisher_information_is_of_the_method_s_own_loss(
    trainer_of: Any, in_float64: Any, tiny_models: Any
) -> None:
    trainer = trainer_of(
        **sections(tiny.ADAMW, child_tuning={"variant": "D", "rows": 3, "reserve_rate": 0.1})
    )
    trainer.model.train()
    optimizer = trainer.create_optimizer()
    (regulariser,) = attached(optimizer, FisherChildTuning)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trainer._metrics["train"]["rewards/margins"].append(7.0)
    found = [torch.autograd.grad(loss, parameters) for loss in regulariser.losses()]
    assert trainer._metrics["train"]["rewards/margins"] == [7.0], "the log's averages are left alone"
    assert trainer._metrics["eval"] == {}
    assert trainer.model.training
    policy, reference = (in_float64(tiny_models[1]) for _ in range(2))
    drawn = torch.randperm(len(trainer.train_dataset), generator=torch.Generator().manual_seed(0))[
        :3
    ].tolist()
    assert len(found) == len(set(drawn)) == 3
    names = {p: name for name, p in trainer.model.named_parameters()}
    for index, gradients in zip(drawn, found, strict=True):
        row, ratios = trainer.train_dataset[index], []
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            inputs = torch.tensor([row["prompt_ids"] + ids])
            summed = []
            for model in (policy, reference):
                logps = model(inputs).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
                summed.append(logps.gather(1, torch.tensor(ids)[:, None]).sum())
            ratios.append(summed[0] - summed[1].detach())
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))
        policy.zero_grad()
        loss.backward()
        for p, gradient in zip(parameters, gradients, strict=True):
            expected = policy.get_parameter(names[p]).grad
            assert torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-6), names[p]


def test_capability_directions_are_of_the_answers_alone(
    trainer_of: Any, in_float64: Any, tiny_models: Any, instructions: Path
) -> None:
    section = {"data": str(instructions), "rows": 2}
    trainer = trainer_of(**sections(tiny.ADAMW, projection=section))
    (regulariser,) = attached(trainer.create_optimizer(), GradientProjection)
    model, tokenizer = in_float64(tiny_models[1]), tiny.tokenizer()
    found = [float(loss.detach()) for loss in regulariser.losses[0]()]
    assert len(found) == 2
    for value, row in zip(found, tiny.instruction_rows(6, seed=3), strict=False):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        tokens = losses.log_probabilities(model, prompt, whole[len(prompt) :])
        assert value == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5)


def test_the_gradient_of_a_batch_is_projected(tiny_models: Any, instructions: Path, trainer_of: Any) -> None:
    trainer = trainer_of(**sections(tiny.ADAMW, projection={"data": str(instructions), "rows": 2}))
    optimizer = trainer.create_optimizer()
    (regulariser,) = attached(optimizer, GradientProjection)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rows = [torch.autograd.grad(loss, parameters) for loss in regulariser.losses[0]()]
    mean = [torch.stack(gradients).double().mean(0) for gradients in zip(*rows, strict=True)]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.compute_loss(trainer.model, batch).backward()
    before = [p.grad.double().flatten().tolist() for p in parameters]
    optimizer.step()
    for p, gradient, direction in zip(parameters, before, mean, strict=True):
        expected = torch.tensor(regularisers.rejected(gradient, [direction.flatten().tolist()]))
        scale = float(torch.tensor(gradient).abs().max())
        assert torch.allclose(p.grad.flatten(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_the_kl_penalty_is_dpo_s_beta(
    beta: float, trainer_of: Any, in_float64: Any, tiny_models: Any
) -> None:
    trainer = trainer_of(
        model=str(tiny_models[0]),
        optimizer=tiny.ADAMW,
        base=None,
        reference=str(tiny_models[1]),
        loss={"beta": beta},
    )
    rows = [trainer.train_dataset[index] for index in range(4)]
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
        policy, reference = (in_float64(folder) for folder in tiny_models)
        total = 0.0
        for row in rows:
            chosen, rejected = (
                tuple(
                    losses.log_probabilities(model, row["prompt_ids"], row[side])
                    for model in (policy, reference)
                )
                for side in ("chosen_ids", "rejected_ids")
            )
            ratios = [sum(ours) - sum(theirs) for ours, theirs in (chosen, rejected)]
            total += math.log1p(math.exp(-beta * (ratios[0] - ratios[1])))
    assert found == pytest.approx(total / 4, rel=1e-5)


def test_memory_and_card_name_what_is_there(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, capsys: Any
) -> None:
    from trimtab.train import config_class, run

    regulariser = {"ema": {}, "elastic_reset": {}, "pull": {}}
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **sections(tiny.ADAMW, **regulariser))
    run(make_recipe(values, config_class=config_class), dry_run=True)
    shown = capsys.readouterr().out
    for name in ("average of the weights", "average of elastic reset", "weights at the start"):
        assert shown.count(f"memory: {name}") == 1
    folder = tiny.train({**values, "training": {"max_steps": 1}})
    assert "EMA of the weights (c 0.001), which is what `model/` holds" in (folder / "README.md").read_text()
    assert json.loads((folder / "environment.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("regulariser", "more", "sentence"),
    [
        ({"ema": {"coefficient": 0}}, {}, r"optimizer\.ema\.coefficient must be .*0"),
        ({"ema": {"decay": 0.99}}, {}, r"optimizer\.ema\.decay is not a key of a recipe"),
        (
            {"ema": {}},
            {"training": {"load_best_model_at_end": True, "save_steps": 2}},
            r"training\.load_best_model_at_end cannot go with optimizer\.ema",
        ),
        ({"child_tuning": {"rows": 4}}, {}, r"optimizer\.child_tuning\.rows goes with variant D"),
        ({"child_tuning": {"variant": "G"}}, {}, r"optimizer\.child_tuning\.variant"),
        (
            {"child_tuning": {"variant": "D"}},
            {"data": {"streaming": True}},
            r"optimizer\.child_tuning\.data is missing: data\.streaming is read once",
        ),
        (
            {"child_tuning": {"variant": "D"}},
            {"adapter": {"r": 2}},
            r"optimizer\.child_tuning\.variant must be F with a fresh adapter",
        ),
        ({"projection": {}}, {}, r"optimizer\.projection\.data is missing"),
        ({"projection": {"data": "./nowhere.jsonl"}}, {}, r"optimizer\.projection\.data\.0.*not exist"),
        (
            {"projection": {"data": "org/rows"}},
            {"method": "reward", "loss": {}},
            r"optimizer\.projection\.data is not for method reward",
        ),
        (
            {"child_tuning": {"variant": "D", "data": "org/rows"}},
            {"method": "reward", "loss": {}},
            r"optimizer\.child_tuning\.data is not for method reward",
        ),
        (
            {"projection": {"data": {"path": "org/rows", "weight": 2}}},
            {},
            r"optimizer\.projection\.data\.0\.weight has no effect here",
        ),
        ({"pull": {"strength": 2}}, {}, r"optimizer\.pull\.strength must be"),
        ({"elastic_reset": {"every": 0}}, {}, r"optimizer\.elastic_reset\.every must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    regulariser: dict[str, Any],
    more: dict[str, Any],
    sentence: str,
    tiny_models: Any,
    tiny_pairs: Any,
    tmp_path: Path,
) -> None:
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **sections(tiny.ADAMW, **regulariser))
    for name, section in more.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


USER = {"role": "user", "content": "say b"}
ANSWER = {"role": "assistant", "content": "b"}


def read(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    path = tiny.write_rows(folder / "rows.jsonl", rows)
    values = {"method": "dpo", "reference": "org/sft", "data": {"train": "org/pairs"}, "output": "runs/a"}
    return read_answers(make_recipe(values), Source(path=str(path)), 8, tiny.tokenizer(), "here")


def test_of_a_conversation_the_last_answer_counts(tmp_path: Path) -> None:
    first, second = [USER, ANSWER], [USER, ANSWER, USER, {**ANSWER, "content": "c"}]
    rows = read([{"messages": first}, {"messages": second}], tmp_path)
    tokenizer = tiny.tokenizer()
    for row, messages in zip(rows, (first, second), strict=True):
        (answer,) = row["response_ids"]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        assert row["prompt_ids"] + answer == whole
        assert tokenizer.decode(answer, skip_special_tokens=True) == messages[-1]["content"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "only words"}, "here: these rows are plain text; give prompts and their answers"),
        ({"messages": [ANSWER]}, "here: "),
        ({"messages": [USER]}, "here: "),
    ],
)
def test_what_is_no_answer_to_a_prompt_is_refused(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        read([row], tmp_path)
