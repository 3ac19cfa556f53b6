"""The RRHF trainer: the loss, gradients and metrics of the global batch, however it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from tests import tiny
from tests.unit.losses.test_rrhf import oracle
from tests.unit.rewards.test_ranked_batches import naive, rows
from trimtab import OnDARE, ReferenceDelta, UserError
from trimtab.rewards.ranked_batches import RRHFCollator
from trimtab.terminal import plain_libraries
from trimtab.train import OptimizerPlan
from trimtab.train.rrhf_trainer import MergingRRHFTrainer, RRHFSettings, RRHFTrainer

pytestmark = pytest.mark.xdist_group("train")

SETTINGS = {"length_exponent": 0.5, "margin": 0.5, "rank_weight": 2.0}


def data() -> list[dict[str, Any]]:
    """Four prompts with different numbers of responses; the last one's scores are all equal."""
    tied = {"prompt_ids": [9, 8], "response_ids": [[3, 4, 5], [6]], "scores": [0.5, 0.5]}
    return [*rows(), tied]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """One step of plain gradient descent with rate 1, so that the weights move by the gradient."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "dataloader_pin_memory": False,
        "per_device_eval_batch_size": 3,
    }
    return TrainingArguments(**{**settings, **changes})


def gradients(model: Any, train: Any) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def expected(model: Any, ft: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the whole batch, from plain loops over one response at a time."""
    logps = naive(model, data())
    total, place, tokens = logps.new_zeros(()), 0, 0
    best_nll = logps.new_zeros(())
    for row in data():
        mine = logps[place : place + len(row["scores"])]
        place += len(mine)
        lengths = [len(ids) for ids in row["response_ids"]]
        values = [
            value / length ** SETTINGS["length_exponent"] for value, length in zip(mine, lengths, strict=True)
        ]
        for i, low in enumerate(row["scores"]):
            for j, high in enumerate(row["scores"]):
                if low < high:
                    hinge = values[i] - values[j] + SETTINGS["margin"]
                    total = total + SETTINGS["rank_weight"] * hinge.clamp(min=0) / len(data())
        best = row["scores"].index(max(row["scores"]))
        best_nll, tokens = best_nll - mine[best], tokens + lengths[best]
    loss = total + best_nll / (len(data()) if ft == "sum" else tokens)
    names = [name for name, _ in model.named_parameters()]
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), dict(zip(names, slopes, strict=True))


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    largest = max(float(slope.abs().max()) for slope in theirs.values())
    assert largest > 0.01
    for name, slope in theirs.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-4, atol=2e-5 * largest)


@pytest.mark.parametrize("layout", ["shared_prefix", "repeated"])
@pytest.mark.parametrize("ft", ["sum", "token_mean"])
@pytest.mark.parametrize(("size", "accumulated"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_the_split_into_micro_batches_changes_nothing(
    size: int, accumulated: int, ft: Any, layout: Any, tmp_path: Path
) -> None:
    model = tiny.model(tied=False)
    loss, slopes = expected(model, ft)
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    settings = RRHFSettings(**SETTINGS, ft_normalization=ft, layout=layout)
    trainer = RRHFTrainer(
        model, arguments(tmp_path, **split), settings=settings, train_dataset=Dataset.from_list(data())
    )
    assert_same_gradients(gradients(model, trainer.train), slopes)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-4)
    assert 2 * logged["loss/rank"] + logged["loss/ft"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("ft", ["sum", "token_mean"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_evaluation_and_what_is_logged(ft: Any, size: int, tmp_path: Path) -> None:
    model = tiny.model()
    loss, _ = expected(model, ft)
    columns = Dataset.from_list([{**row, "sources": ["me"]} for row in data()])
    changes = {"per_device_eval_batch_size": size, "per_device_train_batch_size": 4}
    trainer = RRHFTrainer(
        model,
        arguments(tmp_path, **changes),
        settings=RRHFSettings(**SETTINGS, ft_normalization=ft),
        train_dataset=columns,
        eval_dataset=columns,
    )
    found = trainer.evaluate()
    values = naive(model, data()).tolist()
    pairs, ordered, leads, lengths = 0, 0, [], []
    for row in data():
        mine = [values.pop(0) / len(ids) ** 0.5 for ids in row["response_ids"]]
        lengths += [len(ids) for ids in row["response_ids"]]
        best = row["scores"].index(max(row["scores"]))
        leads += [mine[best] - value for place, value in enumerate(mine) if place != best]
        worse = [(i, j) for i, a in enumerate(row["scores"]) for j, b in enumerate(row["scores"]) if a < b]
        pairs, ordered = pairs + len(worse), ordered + sum(mine[i] < mine[j] for i, j in worse)
    assert 0 < ordered < pairs
    trainer.train()
    logged = trainer.state.log_history[-2]
    for where, prefix in ((found, "eval_"), (logged, "")):
        assert where[f"{prefix}loss"] == pytest.approx(loss, rel=1e-4)
        assert where[f"{prefix}rewards/accuracies"] == ordered / pairs
        assert where[f"{prefix}rewards/margins"] == pytest.approx(sum(leads) / len(leads), abs=1e-5)
        assert where[f"{prefix}response_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert where[f"{prefix}tied_prompts"] == 1 / 4


def test_logs_average_over_the_steps_between_them(tmp_path: Path) -> None:
    changes = {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 2}
    trainer = RRHFTrainer(
        tiny.model(), arguments(tmp_path, **changes), train_dataset=Dataset.from_list(data())
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert line["loss/rank"] + line["loss/ft"] == pytest.approx(line["loss"], rel=1e-4)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_one_response_and_token_mean_are_sft(accumulated: int, tmp_path: Path) -> None:
    """The same first loss and the same step as TRL's trainer."""
    from trl import SFTConfig, SFTTrainer

    chosen = [{**row, "response_ids": row["response_ids"][:1], "scores": [0.0]} for row in data()]
    split = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    ours = tiny.model()
    trainer = RRHFTrainer(
        ours,
        arguments(tmp_path, **split),
        settings=RRHFSettings(ft_normalization="token_mean"),
        train_dataset=Dataset.from_list(chosen),
    )
    slopes = gradients(ours, trainer.train)
    tokens = [
        {
            "input_ids": row["prompt_ids"] + row["response_ids"][0],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"][0]),
        }
        for row in chosen
    ]
    given = arguments(tmp_path, **split).to_dict()
    wanted = ("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "optim", "max_grad_norm")
    more = ("logging_steps", "save_strategy", "use_cpu", "disable_tqdm", "dataloader_pin_memory", *split)
    masked = {"completion_only_loss": True}
    theirs = tiny.model()
    with plain_libraries():
        config = SFTConfig(
            **{key: given[key] for key in (*wanted, *more)}, bf16=False, report_to=[], **masked
        )
        dataset = Dataset.from_list(tokens)
        sft = SFTTrainer(theirs, config, train_dataset=dataset, processing_class=tiny.tokenizer())
        slopes_of_sft = gradients(theirs, sft.train)
    assert_same_gradients(slopes, slopes_of_sft)
    losses = [one.state.log_history[0]["loss"] for one in (trainer, sft)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_online_merging_optimizer_takes_the_gradients(tiny_models: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    delta = ReferenceDelta.between(reference=tiny_models[1], base=tiny_models[0])

    def optimizer(groups: Any) -> OnDARE:
        return OnDARE(groups, delta, lr=1e-3, eps=1e-3, reserve_rate=0.5, merge_weight=1e-2, seed=3)

    model = AutoModelForCausalLM.from_pretrained(tiny_models[1])
    trainer = MergingRRHFTrainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=4),
        settings=RRHFSettings(**SETTINGS),
        optimizer_plan=OptimizerPlan(optimizer),
        train_dataset=Dataset.from_list(data()),
    )
    trainer.train()
    by_hand = AutoModelForCausalLM.from_pretrained(tiny_models[1])
    _, slopes = expected(by_hand, "sum")
    stepped = optimizer(list(by_hand.named_parameters()))
    for name, parameter in by_hand.named_parameters():
        parameter.grad = slopes[name].float()
    stepped.step()
    start = tiny.weights(tiny_models[1])
    for (name, mine), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
        assert (mine.detach() - start[name]).abs().max() > 1e-4, name


def test_the_guard_stops_at_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = tiny.model()
    plan = OptimizerPlan(lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    trainer = MergingRRHFTrainer(
        model, arguments(tmp_path), optimizer_plan=plan, train_dataset=Dataset.from_list(data())
    )
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        trainer.train()


def test_activation_checkpointing_and_autocast(tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for kind, near in (({"activation_checkpointing": True}, 1e-4), ({"bf16": True}, 1e-2)):
        model = tiny.model()
        loss, slopes = expected(model, "sum")
        trainer = RRHFTrainer(
            model,
            arguments(tmp_path, **split, **kind),
            settings=RRHFSettings(**SETTINGS),
            train_dataset=Dataset.from_list(data()),
        )
        with plain_libraries():
            found = gradients(model, trainer.train)
        largest = max(float(slope.abs().max()) for slope in slopes.values())
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=near)
        for name, slope in slopes.items():
            torch.testing.assert_close(found[name], slope, rtol=0, atol=near * largest)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_adapters_train_and_on_the_output_embedding_too(target: str, tmp_path: Path) -> None:
    """An adapter on the output embedding makes it more than a product: then the model makes its logits."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["v_proj", target], init_lora_weights=False)
    with plain_libraries():
        model = get_peft_model(tiny.model(tied=False), lora)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    logps, place, loss = naive(model, data()), 0, 0
    for row in data():
        loss = loss - logps[place + row["scores"].index(max(row["scores"]))] / len(data())
        place += len(row["scores"])
    slopes = dict(
        zip([n for n, _ in trainable], torch.autograd.grad(loss, [p for _, p in trainable]), strict=True)
    )
    with plain_libraries():
        trainer = RRHFTrainer(
            model,
            arguments(tmp_path, per_device_train_batch_size=4),
            settings=RRHFSettings(rank_weight=0.0),
            train_dataset=Dataset.from_list(data()),
        )
        assert (trainer._head is None) == (target == "lm_head")
        found = gradients(model, trainer.train)
    assert_same_gradients(found, slopes)
    assert all(float(found[name].abs().max()) == 0 for name in found if name not in slopes)


def test_a_collator_of_ones_own(tmp_path: Path) -> None:
    collator = RRHFCollator(0, "repeated", padding_side="left", pad_to_multiple_of=32)
    model = tiny.model()
    settings = RRHFSettings(**SETTINGS)
    everything = {"data_collator": collator, "eval_dataset": Dataset.from_list(data()), "settings": settings}
    found = RRHFTrainer(model, arguments(tmp_path), **everything).evaluate()
    assert found["eval_loss"] == pytest.approx(expected(model, "sum")[0], rel=1e-4)


def test_the_oracles_agree() -> None:
    """The loss of these tests is that of the loss's own tests, for the values that a model gives."""
    model, prompts, place = tiny.model(), [], 0
    values = naive(model, data()).tolist()
    for row in data():
        group = []
        for ids, value in zip(row["response_ids"], row["scores"], strict=True):
            group.append(([values[place] / len(ids)] * len(ids), value))
            place += 1
        prompts.append(group)
    assert oracle(prompts, 0.5, 0.5, 2.0, "sum") == pytest.approx(expected(model, "sum")[0], rel=1e-9)
