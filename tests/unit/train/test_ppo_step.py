"""A whole step of PPO and what is logged of a rollout, against an oracle in float64; the order of prompts."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from tests import tiny
from tests.oracle import ppo as oracle

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing the trainers

LOSS = {"rewards": "tests.tiny:share_of_small", "max_new_tokens": 6, "beta": 0.3}
ADAMW = {"optimizer": tiny.ADAMW, "base": None}
PLACES = [*range(6, 12)]
STEP = {"clip": 0.1, "value_clip": 0.05, "value_coefficient": 0.7, "discount": 0.9, "trace": 0.8}


@pytest.fixture
def moved(trainer_of: Any, in_float64: Any, tiny_models: Any) -> Any:
    """A trainer in float64 whose policy is not the reference and has a value head that says something."""
    loss = {**LOSS, **STEP, "max_new_tokens": 16, "temperature": 1.3, "missing_eos_penalty": 0.25}
    training = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = trainer_of(method="ppo", loss=loss, training=training, **ADAMW)
    trainer.model.double()
    trainer.maker.reference.double()
    move(trainer.model, 0, 0.05)
    return trainer


def move(model: Any, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise)


def test_a_whole_step_is_the_oracle_s(moved: Any, in_float64: Any, tiny_models: Any) -> None:
    trainer, places = moved, PLACES
    rows = [trainer.train_dataset[place] for place in places]
    judged = trainer.maker.judge(rows, places)
    rollout = trainer.rollout = trainer.maker.make(rows, places, kl_coefficient=0.3)
    assert rollout.logps.dtype == torch.float64
    episodes = [
        oracle.Episode(
            row["prompt_ids"],
            list(response.ids),
            tiny.share_of_small([], [response.text], None)[0] - 0.25 * (response.end == "length"),
        )
        for row, response in zip(rows, judged.responses, strict=True)
    ]
    assert {response.end for response in judged.responses} == {"length", "eos"}
    assert len({len(episode.prompt) for episode in episodes}) > 1
    head = (trainer.model.value_head.weight[0], trainer.model.value_head.bias[0])
    with torch.no_grad():
        old = [oracle.token_terms(trainer.model, head, episode, 1.3) for episode in episodes]
    old = [(logps.tolist(), values.tolist()) for logps, values in old]
    move(trainer.model, 1, 0.02)

    batches = [trainer._collate([0, 1, 2]), trainer._collate([3, 4, 5])]
    tokens = torch.tensor(sum(len(episode.response) for episode in episodes))
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens) for batch in batches]
    sum(losses).backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    expected = oracle.step(
        trainer.model, head, old, in_float64(tiny_models[1]), episodes, beta=0.3, temperature=1.3, **STEP
    )
    expected.backward()
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
        assert parameter.grad.abs().max() > 1e-4, name
    shares = dict(zip(("clip_fraction", "value_clip_fraction"), (trainer._step_sums[2:4]), strict=True))
    assert all(0 < float(share) < 1 for share in shares.values()), shares


def test_a_rollout_s_metrics_are_the_oracle_s(moved: Any, in_float64: Any, tiny_models: Any) -> None:
    trainer, places = moved, PLACES
    rows = [trainer.train_dataset[place] for place in places]
    rollout = trainer.maker.make(rows, places, kl_coefficient=0.3)
    head = (trainer.model.value_head.weight[0], trainer.model.value_head.bias[0])
    kl, lengths, ended, rewards, objectives, values, returns = 0.0, 0, 0, 0.0, 0.0, [], []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        finished = response[-1] == 1
        text = trainer.processing_class.decode(response, skip_special_tokens=True)
        reward = tiny.share_of_small([], [text], None)[0]
        episode = oracle.Episode(prompt, response, reward - 0.25 * (not finished))
        with torch.no_grad():
            ours, value = oracle.token_terms(trainer.model, head, episode, 1.3)
            theirs, _ = oracle.token_terms(in_float64(tiny_models[1]), head, episode, 1.3)
        tokens = oracle.rewards(episode.score, ours.tolist(), theirs.tolist(), 0.3)
        kl += float((ours - theirs).sum())
        lengths, ended, rewards = lengths + len(response), ended + finished, rewards + reward
        objectives += sum(tokens)
        values += value.tolist()
        returns += oracle.advantages(tokens, value.tolist(), 0.9, 0.8)[1]
    expected = {
        "kl": kl / 6,
        "response_length": lengths / 6,
        "ended_by_eos": ended / 6,
        "reward": rewards / 6,
        "objective": objectives / 6,
        "explained_variance": oracle.explained_variance(values, returns),
        "kl_coefficient": 0.3,
    }
    found = {name: rollout.metrics[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < rollout.metrics["entropy"] <= 4.65  # log 104
    white = rollout.advantages[rollout.logps != 0]
    assert float(white.mean()) == pytest.approx(0, abs=1e-12)
    assert float(white.var(correction=0)) == pytest.approx(1, rel=1e-6)


def test_every_prompt_has_its_turn(trainer_of: Any) -> None:
    """Rollouts of 10 prompts from 24 rows: each pass over the rows has each of them once."""
    loss = {**LOSS, "minibatches": 5}
    trainer = trainer_of(method="ppo", loss=loss, training={"per_device_train_batch_size": 2}, **ADAMW)
    assert trainer.rows_per_rollout == 10
    taken, places = [], []
    for number in range(12):
        rows, at = trainer._prompts(number)
        taken += [json.dumps(row["prompt"]) for row in rows]
        places += at
    assert places == list(range(120))
    passes = [taken[first : first + 24] for first in range(0, 120, 24)]
    assert all(len(set(one)) == 24 for one in passes)
    assert passes[0] != passes[1]
    seen = [
        sorted(row for minibatch in range(5) for row in trainer._minibatch(3, 5 * epoch + minibatch))
        for epoch in (0, 1)
    ]
    assert seen == [list(range(10))] * 2


def test_a_training_is_the_oracle_s(trainer_of: Any, in_float64: Any, tiny_models: Any) -> None:
    """Two rollouts of two epochs, each step from two micro-batches, with AdamW: the weights they end with."""
    loss = {**LOSS, **STEP, "epochs": 2}
    training = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4}
    trainer = trainer_of(
        method="ppo",
        loss=loss,
        training={**training, "max_grad_norm": 0, "save_strategy": "no"},
        evaluation={"at_start": False},
        schedule={"lr": {"type": "constant"}},
        **ADAMW,
    )
    trainer.model.double()
    trainer.maker.reference.double()
    move(trainer.model, 0, 0.05)
    policy, reference = copy.deepcopy(trainer.model), in_float64(tiny_models[1])
    rollouts = []
    make = trainer.maker.make
    trainer.maker.make = lambda *given: rollouts.append(make(*given)) or rollouts[-1]
    trainer.train()

    head = [parameter for name, parameter in policy.named_parameters() if "value_head" in name]
    others = [parameter for name, parameter in policy.named_parameters() if "value_head" not in name]
    groups = [{"params": others, "lr": 1e-3}, {"params": head, "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    assert len(rollouts) == 2
    for rollout in rollouts:
        texts = [
            trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in rollout.response_ids
        ]
        scores = tiny.share_of_small([], texts, None)
        rows = zip(rollout.prompt_ids, rollout.response_ids, scores, strict=True)
        episodes = [oracle.Episode(*row) for row in rows]
        ends = (policy.value_head.weight[0], policy.value_head.bias[0])
        with torch.no_grad():
            found = [oracle.token_terms(policy, ends, episode, 1.0) for episode in episodes]
        old = [(logps.tolist(), values.tolist()) for logps, values in found]
        for _ in range(2):
            ends = (policy.value_head.weight[0], policy.value_head.bias[0])
            whole = oracle.step(policy, ends, old, reference, episodes, beta=0.3, temperature=1.0, **STEP)
            optimizer.zero_grad()
            whole.backward()
            optimizer.step()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)
