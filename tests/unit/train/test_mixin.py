"""The mixin in real trainers: every step must be the oracle's, given the gradients that the trainer made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tests import tiny
from tests.oracle.reference import PAPER, Adam, Parameter
from trimtab import OnDARE, ReferenceDelta, UserError
from trimtab.ops import DELTA, UPDATE, MaskKey, bernoulli_mask
from trimtab.recipe import make_recipe
from trimtab.terminal import plain_libraries
from trimtab.train import OnlineMergingMixin, OptimizerPlan, config_class
from trimtab.train.dpo import MergingDPOTrainer, make_trainer
from trimtab.train.optimizers import unwrapped
from trimtab.train.parts import gather_parts

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

LR, ALPHA, P, SEED, STEPS = 1e-3, 1e-2, 0.5, 3, 3


class Recorder:
    """Keeps, before every optimizer step, the gradients and the learning rate it will see."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, torch.Tensor], float]] = []
        self.start: dict[str, torch.Tensor] = {}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._keep)

    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        named = [
            pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)
        ]
        if not self.start:
            self.start = {name: p.detach().clone() for name, p in named}
        gradients = {name: p.grad.detach().clone() for name, p in named}
        self.steps.append((gradients, float(optimizer.param_groups[0]["lr"])))


def watched(trainer: Any) -> Recorder:
    """Make the trainer's optimizer now and record what it is fed."""
    recorder = Recorder()
    recorder.watch(trainer.create_optimizer())
    return recorder


def oracle(recorder: Recorder, delta: ReferenceDelta) -> dict[str, np.ndarray]:
    """What the recorded gradients make of the parameters, by the naive float64 loops of the oracle."""
    result = {}
    for name, start in recorder.start.items():
        tau = delta.tensor(name).double().flatten().tolist()
        parameter = Parameter(start.double().flatten().tolist(), tau, Adam(), PAPER["ondare"])
        for step, (gradients, lr) in enumerate(recorder.steps, 1):
            update_kept, tau_kept = (
                bernoulli_mask(start.shape, P, MaskKey(SEED, stream, step, name)).flatten().tolist()
                for stream in (UPDATE, DELTA)
            )
            gradient = gradients[name].double().flatten().tolist()
            masks = {"update_kept": update_kept, "tau_kept": tau_kept}
            parameter.step(gradient, lr=lr, merge_weight=ALPHA, reserve_rate=P, **masks)
        result[name] = np.array(parameter.theta)
    return result


def assert_is(model: torch.nn.Module, expected: dict[str, np.ndarray], recorder: Recorder) -> None:
    moved = 0.0
    for name, parameter in model.named_parameters():
        value = parameter.detach().double().flatten().numpy()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=5e-7, err_msg=name)
        moved = max(moved, float(np.abs(value - recorder.start[name].double().flatten().numpy()).max()))
    assert moved > 1e-3  # the steps were large against the tolerance


@pytest.fixture(scope="module")
def delta(tiny_models: tuple[Path, Path]) -> ReferenceDelta:
    return ReferenceDelta.between(reference=tiny_models[1], base=tiny_models[0])


@pytest.fixture
def dpo(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> Any:
    """Make a DPO trainer from a recipe whose ``training`` section is given."""

    def make(optimizer: dict[str, Any] | None = None, **training: Any) -> MergingDPOTrainer:
        section = {"lr": LR, "merge_weight": ALPHA, "reserve_rate": P, **(optimizer or {})}
        values = tiny.recipe(
            tiny_models,
            tiny_pairs,
            tmp_path / "run",
            seed=SEED,
            evaluation={"at_start": False},
            optimizer=section,
            training={"max_steps": STEPS, "save_strategy": "no", **training},
        )
        recipe = make_recipe(values, config_class=config_class)
        return make_trainer(gather_parts(recipe, resumes=False))

    with plain_libraries():
        yield make


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True, "gradient_checkpointing": True},
    ],
    ids=["fp32", "accumulation", "bf16 and checkpointing"],
)
def test_dpo_steps_are_the_oracle_s(dpo: Any, delta: ReferenceDelta, training: dict[str, Any]) -> None:
    trainer = dpo(**training)
    recorder = watched(trainer)
    trainer.train()
    assert len(recorder.steps) == STEPS
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert_is(trainer.model, oracle(recorder, delta), recorder)


class Numbers(Dataset):  # type: ignore[type-arg]
    """Rows that repeat, for a trainer that knows nothing of TRL."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = [(7 * index + 3 * i) % 97 for i in range(10)]
        return {"input_ids": row, "labels": row}


def test_a_plain_transformers_trainer_takes_it_too(
    tiny_models: Any, delta: ReferenceDelta, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    class Merging(OnlineMergingMixin, Trainer):
        pass

    def make(groups: Any) -> OnDARE:
        return OnDARE(groups, delta, lr=LR, reserve_rate=P, merge_weight=ALPHA, seed=SEED)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    with plain_libraries():
        model = AutoModelForCausalLM.from_pretrained(tiny_models[1])
        trainer = Merging(model, arguments, train_dataset=Numbers(), optimizer_plan=OptimizerPlan(make))
        recorder = watched(trainer)
        trainer.train()
    assert_is(model, oracle(recorder, delta), recorder)


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list that grows with each forward pass of the module."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_bf16_is_autocast_and_checkpointing_changes_no_gradient(dpo: Any) -> None:
    runs = {}
    for name, training in {
        "fp32": {},
        "checkpointed": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }.items():
        trainer = dpo(max_steps=1, **training)
        calls = count_calls(trainer.model.model.layers[0].mlp)
        recorder = watched(trainer)
        trainer.train()
        runs[name] = (recorder.steps[0][0], len(calls))
    fp32, checkpointed, bf16 = (gradients for gradients, _ in runs.values())
    assert runs["checkpointed"][1] == runs["fp32"][1] + 1  # the layer ran once more, in the backward pass
    assert all(torch.equal(fp32[name], checkpointed[name]) for name in fp32)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (fp32, bf16)]
    assert not torch.equal(*flat)
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def test_the_log_carries_what_the_optimizer_measured(dpo: Any) -> None:
    trainer = dpo(optimizer={"measure_every": 2})
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["merge/weight"] for record in logs] == [ALPHA] * STEPS
    assert ["merge/arrived_delta" in record for record in logs] == [True, False, True]
    assert all(0.9 < record["merge/arrived_delta"] <= 1 for record in (logs[0], logs[2]))


def test_a_second_training_keeps_its_optimizer_and_its_schedule(dpo: Any) -> None:
    trainer = dpo()
    trainer.train()
    first = unwrapped(trainer.optimizer)
    trainer.train()
    assert unwrapped(trainer.optimizer) is first


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed hands the optimizer one flat slice per group"),
        ({"is_fsdp_enabled": True}, "FSDP version 1 flattens parameters"),
    ],
)
def test_flat_parameters_are_refused(flags: dict[str, bool], sentence: str) -> None:
    class Flat:
        def __init__(self) -> None:
            self.is_deepspeed_enabled = self.is_fsdp_enabled = False
            self.accelerator = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
            )
            self.__dict__.update(flags)

    class Merging(OnlineMergingMixin, Flat):
        pass

    with pytest.raises(UserError, match=sentence):
        Merging(optimizer_plan=OptimizerPlan(lambda groups: torch.optim.AdamW(groups)))
