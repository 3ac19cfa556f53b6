"""The page of the real run: its arithmetic on small numbers, and that it is what the script writes."""

import copy
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("write_real_run", ROOT / "scripts" / "write_real_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def numbers(script):
    return script.read_json(ROOT / "docs" / script.NUMBERS)


def model(chosen, rejected, instructions=((-4.0, 2),)):
    return {"chosen": chosen, "rejected": rejected, "instructions": [list(row) for row in instructions]}


def test_the_margin_is_dpos_implicit_reward(script):
    reference = script.Pairs(model([[-10.0, 5], [-8.0, 4]], [[-12.0, 5], [-6.0, 3]]))
    policy = script.Pairs(model([[-9.0, 5], [-8.5, 4]], [[-14.0, 5], [-6.0, 3]]))
    # (−9+10) − (−14+12) = 3 and (−8.5+8) − 0 = −0.5, times β.
    assert policy.margins(reference, 0.1) == pytest.approx([0.3, -0.05])
    assert not reference.margins(reference, 0.1).any()


def test_preference_counts_sums_and_means_apart(script):
    pairs = script.Pairs(model([[-10.0, 10], [-3.0, 1]], [[-9.0, 3], [-8.0, 4]]))
    assert pairs.prefers().tolist() == [0, 1]
    assert pairs.prefers_per_token().tolist() == [1, 0]


def test_perplexity_weighs_tokens_not_rows(script):
    assert script.perplexity(model([], [], [(-3.0, 1), (-1.0, 3)])) == pytest.approx(math.exp(4 / 4))


def test_change_is_paired_and_signed_from_before_to_after(script):
    before = model([[-5.0, 1]] * 4, [[-4.0, 1]] * 4, [(-2.0, 1), (-6.0, 3)])
    after = model([[-3.0, 1]] * 4, [[-4.0, 1]] * 4, [(-1.0, 1), (-3.0, 3)])
    found = script.change(before, after)
    assert found["accuracy"].estimate == 1.0
    assert found["nll"].estimate == pytest.approx(-1.0)


def test_movement_is_measured_in_lengths_of_tau(script, tmp_path):
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    tau = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    step = {"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([[2.0]])}
    folders = {
        "base": tmp_path / "base",
        "sft": tmp_path / "sft" / "model",
        "dpo": tmp_path / "dpo" / "model",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        parts = {"base": [base], "sft": [base, tau], "dpo": [base, tau, step]}[name]
        save_file({key: sum(part[key] for part in parts) for key in base}, folder / "model.safetensors")
    found = script.movement(tmp_path / "dpo", tmp_path / "sft", tmp_path / "base")
    assert found["tau_norm"] == pytest.approx(5)
    assert found["distance_in_tau"] == pytest.approx(math.sqrt(29) / 5)
    assert found["along_tau"] == pytest.approx(4 * 2 / 25)


def test_the_stated_drift_is_what_masked_additions_come_to(script, numbers):
    stated = script.drift(numbers)
    count = round(stated["expected_drift"] / (stated["alpha"] * stated["p"]))
    generator = np.random.default_rng(0)
    draws = generator.binomial(count, stated["p"], size=200_000) * stated["alpha"]
    assert stated["drift"] == pytest.approx(math.sqrt((draws**2).mean()), rel=1e-3)


def test_models_measured_on_other_rows_are_refused(script, numbers):
    changed = copy.deepcopy(numbers["models"])
    changed["policy"]["ids"][0] = "another"
    with pytest.raises(script.UserError, match="policy and base were measured on different rows"):
        script.same_rows(changed)


def test_the_page_is_what_the_script_writes_from_the_numbers(script, numbers, tmp_path):
    assert (ROOT / "docs" / script.PAGE).read_text(encoding="utf-8") == script.page(numbers)
    assert len(numbers["models"]["base"]["chosen"]) >= 150
    assert (ROOT / "docs" / script.PICTURE).stat().st_size < 200_000
    script.draw(numbers, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_numbers_that_are_missing_are_said_with_the_way_to_them(script, tmp_path, capsys):
    assert script.main(["--docs", str(tmp_path)]) == 2
    assert "real-run.json is missing; docs/real-run.md lists the commands" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
