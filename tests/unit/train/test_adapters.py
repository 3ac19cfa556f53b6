"""LoRA: a fresh adapter under every method, and online merging in the space of a trained one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.equivalence.runs import assert_same_run
from tests.oracle import losses
from trimtab import ReferenceDelta, UserError
from trimtab.terminal import plain_libraries
from trimtab.train.checkpoints import checkpoint_folders

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL

INITIAL = "initial_adapter.safetensors"
ADAMW = {"optimizer": {**tiny.ADAMW, "lr": 0.05}, "base": None}
SHORT = {"max_steps": 2, "save_strategy": "no"}


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.instruction_rows(16))


def sft_values(models: tuple[Path, Path], rows: Path, output: Path, **sections: Any) -> dict[str, Any]:
    values = {
        "method": "sft",
        "model": str(models[1]),
        "data": {"train": str(rows)},
        "adapter": {"r": 2, "alpha": 4},
        "optimizer": {"lr": 0.05},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no"},
        "output": str(output),
    }
    return values | sections


@pytest.fixture(scope="module")
def sft_adapter(
    tiny_models: tuple[Path, Path], instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter that SFT has trained on the tiny reference; do not write there."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    return tiny.train(sft_values(tiny_models, instructions, folder)) / "model"


# -- a fresh adapter


RANKED = [
    {
        "prompt": row["prompt"],
        "responses": [row["chosen"][0]["content"], row["rejected"][0]["content"]],
        "scores": [1, 0],
    }
    for row in tiny.preference_rows(12)
]


SAMPLED = {
    "ppo": {"rewards": "tests.tiny:share_of_small", "max_new_tokens": 4},
    "grpo": {"rewards": "tests.tiny:share_of_small", "max_new_tokens": 4, "num_generations": 2, "beta": 0.1},
}


@pytest.mark.parametrize("method", ["sft", "dpo", "ipo", "kto", "reward", "rrhf", "ppo", "grpo"])
def test_a_fresh_adapter_under_every_method(
    method: str, tiny_models: Any, tiny_pairs: Any, instructions: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    rows = {"sft": instructions, "rrhf": tiny.write_rows(tmp_path / "ranked.jsonl", RANKED)}
    data = (rows[method], rows[method]) if method in rows else tiny_pairs
    values = tiny.recipe(
        tiny_models, data, tmp_path / "o", method=method, adapter={"r": 2}, training=SHORT, **ADAMW
    )
    if method in ("sft", "reward", "rrhf"):
        values["model"] = values.pop("reference")
    values["loss"] = SAMPLED.get(method, {})
    folder = tiny.train(values)
    lines = logged(folder)
    if method in ("dpo", "ipo", "kto"):  # the policy starts as the reference, which is the model without it
        assert lines[0]["eval_rewards/margins"] == 0.0
    assert sum("loss" in line for line in lines) == 2
    if method in SAMPLED:
        assert next(line["kl"] for line in lines if "kl" in line) == pytest.approx(0, abs=1e-5)
    trained, initial = adapter_of(folder / "model"), load_file(folder / "model" / INITIAL)
    assert trained.keys() == initial.keys()
    ones_of_b = [name for name in trained if "lora_B" in name]
    assert len(ones_of_b) == 2 * 7
    assert all(not initial[name].any() and trained[name].any() for name in ones_of_b)
    scores = {"num_labels": 1} if method == "reward" else {}
    kind = AutoPeftModelForSequenceClassification if method == "reward" else AutoPeftModelForCausalLM
    with plain_libraries():
        model = kind.from_pretrained(folder / "model", **scores)
    underneath = {
        name: p for name, p in model.named_parameters() if "lora" not in name and "score" not in name
    }
    given = tiny.weights(tiny_models[1])
    for name, p in underneath.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(p, given[plain]), name


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_the_reference_is_the_model_without_the_adapter(
    method: str, trainer_of: Any, in_float64: Any, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """The loss of an adapter that has moved, against a reference that has none, by the oracle."""
    trainer = trainer_of(
        method=method, adapter={"r": 2, "alpha": 4}, loss={"beta": 0.3}, training=SHORT, **ADAMW
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    rows = [trainer.train_dataset[index] for index in range(4)]
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    policy, reference = in_float64(tmp_path / "merged"), in_float64(tiny_models[1])
    expected = []
    for row in rows:
        pair = [
            losses.answer(policy, reference, row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
        ]
        expected.append(losses.ipo(*pair, beta=0.3) if method == "ipo" else dpo(*pair, beta=0.3))
    assert found == pytest.approx(sum(expected) / 4, rel=1e-4)


def dpo(chosen: losses.Answer, rejected: losses.Answer, beta: float) -> float:
    """DPO's loss, Eq. 7 of arXiv 2305.18290."""
    ratios = [sum(chosen[0]) - sum(chosen[1]), sum(rejected[0]) - sum(rejected[1])]
    return -float(torch.nn.functional.logsigmoid(torch.tensor(beta * (ratios[0] - ratios[1]))))


def test_an_adapter_as_reference_of_another_policy_is_the_model_it_is_merged_into(
    sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    with plain_libraries():
        AutoPeftModelForCausalLM.from_pretrained(sft_adapter).merge_and_unload().save_pretrained(
            tmp_path / "m"
        )
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    margins = []
    for reference in (sft_adapter, tmp_path / "m"):
        values = tiny.recipe(
            tiny_models, tiny_pairs, tmp_path / f"run-{reference.name}", model=str(tiny_models[1]),
            reference=str(reference), training={**SHORT, "max_steps": 1}, **ADAMW,
        )  # fmt: skip
        margins.append(logged(tiny.train(values))[0]["eval_rewards/margins"])
    assert margins[0] == pytest.approx(margins[1], rel=1e-4)
    assert abs(margins[1]) > 1e-4


# -- what it was before


@pytest.mark.parametrize("dora", [False, True])
def test_the_initial_adapter_is_that_of_a_training_that_learns_nothing(
    dora: bool, tiny_models: Any, instructions: Path, tmp_path: Path
) -> None:
    adapter = {"r": 2, "dora": dora, "rslora": dora}
    still = tiny.train(
        sft_values(tiny_models, instructions, tmp_path / "a", adapter=adapter, optimizer={"lr": 0})
    )
    moved = tiny.train(sft_values(tiny_models, instructions, tmp_path / "b", adapter=adapter))
    unmoved, initial = adapter_of(still / "model"), load_file(moved / "model" / INITIAL)
    assert unmoved.keys() == initial.keys()
    assert all(torch.equal(unmoved[name], initial[name]) for name in unmoved)
    assert any("magnitude" in name for name in unmoved) == dora
    after = adapter_of(moved / "model")
    assert not any(torch.equal(after[name], initial[name]) for name in after)


def test_a_run_that_starts_anew_keeps_no_adapter_of_the_one_before(
    tiny_models: Any, instructions: Path, tmp_path: Path
) -> None:
    values = sft_values(tiny_models, instructions, tmp_path / "o", training=SHORT)
    run = tiny.train(values)
    assert (run / INITIAL).is_file()
    assert not (tiny.train({**values, "adapter": None}, overwrite=True) / INITIAL).exists()


# -- merging in adapter space


PAIRING = {
    "name": "online_merging",
    "sparsify": "none",
    "consensus": "linear",
    "lr": 0.05,
    "merge_weight": 0.1,
}


def merging_values(
    models: tuple[Path, Path], pairs: tuple[Path, Path], adapter: Path, output: Path, **sections: Any
) -> dict[str, Any]:
    """A DPO recipe that merges an adapter's own delta into it."""
    given: dict[str, Any] = {
        "reference": str(adapter),
        "base": None,
        "optimizer": {**PAIRING, "reserve_rate": None},
        "training": {"max_steps": 1, "save_strategy": "no"},
        "evaluation": {"at_start": False},
    }
    return tiny.recipe(models, pairs, output, **(given | sections))


@pytest.fixture(scope="module")
def dora_adapter(
    tiny_models: tuple[Path, Path], instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with a magnitude per output, and another scale."""
    folder, adapter = tmp_path_factory.mktemp("dora") / "run", {"r": 2, "dora": True, "rslora": True}
    return tiny.train(sft_values(tiny_models, instructions, folder, adapter=adapter)) / "model"


@pytest.mark.parametrize("kind", ["A0 kept", "A0 assumed", "DoRA"])
def test_one_merged_step_is_the_plain_one_and_the_adapter_s_own_delta(
    kind: str, sft_adapter: Path, dora_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    """θ_r + (1 − α)·Δ + α·τ, with Δ from a run of AdamW and τ from the files."""
    sft_adapter, kept = dora_adapter if kind == "DoRA" else sft_adapter, kind != "A0 assumed"
    reference = sft_adapter
    if not kept:
        reference = tmp_path / "without"
        shutil.copytree(sft_adapter, reference)
        (reference / INITIAL).unlink()
    start, initial = adapter_of(sft_adapter), load_file(sft_adapter / INITIAL)
    plain = merging_values(tiny_models, tiny_pairs, reference, tmp_path / "plain", optimizer=tiny.ADAMW)
    plain["optimizer"] = {"name": "adamw", "lr": 0.05}
    values = merging_values(tiny_models, tiny_pairs, reference, tmp_path / "merged")
    alone, merged = (adapter_of(tiny.train(one) / "model") for one in (plain, values))
    said = capsys.readouterr().err
    assumed = f"has no {INITIAL}, so its B are assumed to have started at 0 and its A as they are now"
    assert said.count(assumed) == (0 if kept else 1)
    for name, now in start.items():
        before = initial[name] if kept or "lora_B" in name else now
        expected = now + 0.9 * (alone[name] - now) + 0.1 * (now - before)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
        assert kept or not torch.allclose(initial[name], now, atol=1e-3)  # else nothing is told apart
    assert (tmp_path / "merged" / "model" / INITIAL).is_file() == kept


@pytest.mark.parametrize("method", ["sft", "kto", "rrhf", "ppo", "grpo"])
def test_methods_merge_in_adapter_space(
    method: str, sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, instructions: Path, tmp_path: Path
) -> None:
    """At a learning rate that is next to nothing, what is added in two steps is 2·α·τ."""
    rows = {"sft": instructions, "rrhf": tiny.write_rows(tmp_path / "ranked.jsonl", RANKED)}
    data = (rows[method], rows[method]) if method in rows else tiny_pairs
    values = merging_values(
        tiny_models, data, sft_adapter, tmp_path / "o", method=method, training=SHORT,
        optimizer={**PAIRING, "lr": 1e-9, "merge_weight": 0.05, "reserve_rate": None},
        schedule={"lr": {"type": "constant"}},
    )  # fmt: skip
    values["loss"] = SAMPLED.get(method, {})
    merged = adapter_of(tiny.train(values) / "model")
    start, initial = adapter_of(sft_adapter), load_file(sft_adapter / INITIAL)
    assert merged.keys() == start.keys()
    for name, now in start.items():
        torch.testing.assert_close(merged[name], now + 2 * 0.05 * (now - initial[name]), rtol=0, atol=1e-6)


def test_it_is_not_merging_in_weight_space(sft_adapter: Path) -> None:
    """The equation of docs/methods.md, on the adapter of one weight."""
    delta = ReferenceDelta.between(reference=sft_adapter)
    trained, initial = adapter_of(sft_adapter), load_file(sft_adapter / INITIAL)
    layer, alpha = "model.layers.1.mlp.up_proj", 0.1
    a, b = (trained[f"base_model.model.{layer}.lora_{which}.weight"].double() for which in "AB")
    first = initial[f"base_model.model.{layer}.lora_A.weight"].double()
    tau_a, tau_b = (delta.tensor(f"{layer}.lora_{which}.weight").double() for which in "AB")
    added = (b + alpha * tau_b) @ (a + alpha * tau_a) - b @ a
    stated = alpha * b @ (2 * a - first) + alpha**2 * b @ (a - first)
    torch.testing.assert_close(added, stated, rtol=0, atol=1e-7)
    in_weights = alpha * b @ a
    assert (added - in_weights).norm() > 0.1 * in_weights.norm()


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "ondare", "reserve_rate": 0.5},
        {"name": "onties", "merge_every": 2, "reserve_rate": 0.5},
        {**PAIRING, "sparsify": "top", "inner": "adafactor", "merge_every": 3, "reserve_rate": 0.5},
    ],
    ids=lambda section: section["name"],
)
def test_a_run_killed_and_resumed_is_the_same(
    optimizer: dict[str, Any], sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    values = merging_values(
        tiny_models, tiny_pairs, sft_adapter, tmp_path / "whole",
        optimizer={**optimizer, "lr": 0.01, "merge_weight": 0.01},
        training={"max_steps": 4, "save_steps": 1, "logging_steps": 1},
    )  # fmt: skip
    whole = tiny.train(values)
    assert {line["merge/weight"] for line in logged(whole) if "merge/weight" in line} == {0.01}
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    for step, folder in checkpoint_folders(copy).items():
        if step > 2:
            shutil.rmtree(folder)
    tiny.train({**values, "output": str(copy)}, resume=True)
    assert_same_run(copy, whole)
    kept = [load_file(folder / "model" / INITIAL) for folder in (copy, whole)]
    theirs = load_file(sft_adapter / INITIAL)  # what the adapter was before SFT, not before DPO
    assert all(torch.equal(one[name], theirs[name]) for one in kept for name in theirs)
    assert kept[0].keys() == theirs.keys()


def test_the_recipe_s_base_stands_in_for_a_model_that_was_moved(
    sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(sft_adapter, moved)
    configuration = json.loads((moved / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] == str(tiny_models[1])
    configuration["base_model_name_or_path"] = "./nowhere"
    (moved / "adapter_config.json").write_text(json.dumps(configuration))
    values = merging_values(tiny_models, tiny_pairs, moved, tmp_path / "o")
    sentence = (
        r"reference: the model that the adapter .*moved' stands on: there is no folder '\./nowhere'.*; "
        "give the model it stands on as base"
    )
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    again = tiny.train({**values, "base": str(tiny_models[1])})
    usual = tiny.train(merging_values(tiny_models, tiny_pairs, sft_adapter, tmp_path / "usual"))
    ours, theirs = adapter_of(again / "model"), adapter_of(usual / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = json.loads((again / "model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_models[1])


def test_a_base_of_another_shape_is_refused(
    sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    tiny.model(0, hidden_size=48).save_pretrained(tmp_path / "wide")
    values = merging_values(tiny_models, tiny_pairs, sft_adapter, tmp_path / "o", base=str(tmp_path / "wide"))
    sentence = (
        r"the adapter .* does not fit the model .*wide' \(.*size mismatch for .*lora_A.*give the model it"
    )
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


def test_a_delta_written_by_itself_is_the_same(
    sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    ReferenceDelta.between(reference=sft_adapter).save(tmp_path / "tau")
    direct = tiny.train(merging_values(tiny_models, tiny_pairs, sft_adapter, tmp_path / "a"))
    values = merging_values(tiny_models, tiny_pairs, sft_adapter, tmp_path / "b", delta=str(tmp_path / "tau"))
    ours, theirs = adapter_of(direct / "model"), adapter_of(tiny.train(values) / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_policy_that_is_not_the_reference_is_refused(
    sft_adapter: Path, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(sft_adapter, other)
    tensors = adapter_of(other)
    save_file({name: value + 1e-3 for name, value in tensors.items()}, other / "adapter_model.safetensors")
    values = merging_values(tiny_models, tiny_pairs, sft_adapter, tmp_path / "o", model=str(other))
    with pytest.raises(UserError, match=r"the policy differs from the delta's reference .* in 28 of 28"):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": 1}, "is a whole model, and the delta is one of an adapter; let model be the adapter"),
        (
            {"model": "adapter", "reference": 1, "base": 0},
            "an adapter is trained on .*, and the delta is one of whole models",
        ),
        ({"adapter": {"r": 2}}, "is an adapter already, so the recipe's adapter cannot be added to it"),
        ({"optimizer": {**PAIRING, "inner": "galore"}}, "galore projects whole matrices to a low rank"),
        ({"adapter": {"r": 2}, "base": 0}, "adapter cannot go with base: .* a trained adapter as reference"),
    ],
)  # fmt: skip
def test_models_and_adapters_that_do_not_go_together_are_refused(
    changes: dict[str, Any],
    sentence: str,
    sft_adapter: Path,
    tiny_models: Any,
    tiny_pairs: Any,
    tmp_path: Path,
) -> None:
    values = merging_values(tiny_models, tiny_pairs, sft_adapter, tmp_path / "o")
    for key, value in changes.items():
        values[key] = {"adapter": str(sft_adapter), 0: str(tiny_models[0]), 1: str(tiny_models[1])}.get(
            value if not isinstance(value, dict) else "", value
        )
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()
