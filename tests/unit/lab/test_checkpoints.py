"""The shipped models are the ones the manifest describes, and can do what it says."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab.errors import UserError
from trimtab.lab import checkpoints
from trimtab.lab.measure import measure
from trimtab.lab.model import config
from trimtab.lab.pretrain import BASE, SFT

EVERY = [(seed, kind) for seed in checkpoints.SEEDS for kind in checkpoints.KINDS]
MANIFEST = checkpoints.read_manifest()


def test_the_manifest_covers_exactly_what_is_shipped():
    names = {checkpoints.model_folder(seed, kind).name for seed, kind in EVERY}
    assert set(MANIFEST["models"]) == names
    assert {entry.name for entry in checkpoints.FOLDER.iterdir()} == names | {checkpoints.MANIFEST}
    assert sum(file.stat().st_size for file in checkpoints.FOLDER.rglob("*") if file.is_file()) < 8.5e6


def test_the_world_and_the_training_are_those_of_the_manifest():
    assert MANIFEST["world"] == checkpoints.world_hash()
    assert MANIFEST["training"]["base"]["steps"] == BASE.steps
    assert MANIFEST["training"]["sft"]["lr"] == SFT.lr
    assert MANIFEST["environment"]["threads"] == 1
    assert set(MANIFEST["environment"]) == set(checkpoints.environment())


@pytest.mark.parametrize(("seed", "kind"), EVERY)
def test_hashes_and_measured_scores_hold(seed, kind):
    folder = checkpoints.model_folder(seed, kind)
    record = MANIFEST["models"][folder.name]
    assert checkpoints.file_hash(folder / "model.safetensors") == record["sha256"]
    score = measure(checkpoints.load(seed, kind))
    # The same weights: only near-ties between two words can fall differently on another CPU.
    assert score.capability == pytest.approx(record["capability"], abs=0.004)
    assert score.reward == pytest.approx(record["reward"], abs=0.004)
    assert score.capability >= 0.95


def test_seeds_share_nothing_and_tau_is_small():
    weights = {
        pair: {name: p.detach() for name, p in checkpoints.load(*pair).named_parameters()} for pair in EVERY
    }
    name = "model.layers.1.mlp.up_proj.weight"
    for seed, other in [(0, 1), (0, 2), (1, 2)]:
        first, second = weights[seed, "base"][name], weights[other, "base"][name]
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.1
    for seed in checkpoints.SEEDS:
        base, sft = weights[seed, "base"], weights[seed, "sft"]
        tau = sum(float((sft[name] - base[name]).square().sum()) for name in base) ** 0.5
        size = sum(float(base[name].square().sum()) for name in base) ** 0.5
        assert 0.02 < tau / size < 0.08


def test_transformers_reads_the_folders_as_they_are():
    ours = checkpoints.load(0, "sft")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints.model_folder(0, "sft"))
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
    assert theirs.config.hidden_size == config().hidden_size
    assert sum(p.numel() for p in ours.parameters()) == 325_824


def test_saving_gives_the_same_bytes(tmp_path):
    checkpoints.save(checkpoints.load(0, "base"), tmp_path)
    assert checkpoints.file_hash(tmp_path / "model.safetensors") == MANIFEST["models"]["seed0-base"]["sha256"]


def test_missing_and_damaged_checkpoints_are_said_so(tmp_path):
    with pytest.raises(UserError, match="no sft checkpoint for seed 7"):
        checkpoints.load(7, "sft", tmp_path)
    shutil.copytree(checkpoints.model_folder(0, "sft"), tmp_path / "seed0-sft")
    file = tmp_path / "seed0-sft" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.load(0, "sft", tmp_path)
