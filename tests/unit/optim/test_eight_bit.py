"""torchao's 8-bit AdamW under online merging; where torchao is not installed, nothing of this runs."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from tests.equivalence.runs import assert_same_run
from trimtab import OnlineMerging, ReferenceDelta
from trimtab.ops import moments
from trimtab.recipe import Optimizer
from trimtab.train.checkpoints import checkpoint_folders
from trimtab.train.state_sizes import state_sizes

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torchao") is None, reason="torchao is not installed (trimtab[lowbit])"
    ),
    pytest.mark.xdist_group("train"),  # one worker: what costs is importing TRL
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao.*"),
]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its step; what it computes is the same without, and costs no compiler here."""
    moments.torchao_state()
    with torch.compiler.set_stance("force_eager"):
        yield


class Policy(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.large = nn.Parameter(torch.randn(64, 80, generator=generator).to(dtype))  # 20 blocks of 256
        self.small = nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))


def take_step(model: nn.Module, optimizer: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def eight_bit(model: nn.Module, **settings: Any) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.named_parameters(), **{"lr": 0.01, "weight_decay": 0.1, **settings})


def merged(model: nn.Module, delta: ReferenceDelta, **settings: Any) -> OnlineMerging:
    given = {"sparsify": "none", "consensus": "linear", "reserve_rate": 1.0, "merge_weight": 0.1, **settings}
    return OnlineMerging(eight_bit(model), delta, decoupled_decay=True, **given)


def test_each_merged_step_is_torchao_s_own_and_tau() -> None:
    model = Policy()
    delta = ReferenceDelta.between(reference=model, base=Policy(1))
    optimizer = merged(model, delta)
    for step in range(4):
        twin = copy.deepcopy(model)
        alone = eight_bit(twin)
        if step:
            saved = optimizer.optimizer.state_dict()
            kept = {
                key: {k: v for k, v in one.items() if "merge" not in k} for key, one in saved["state"].items()
            }
            alone.load_state_dict({**saved, "state": copy.deepcopy(kept)})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        take_step(twin, alone, step)
        take_step(model, optimizer, step)
        for name, p in model.named_parameters():
            kept_part = before[name] * (1 - 0.01 * 0.1)
            update = twin.get_parameter(name).detach() - kept_part
            expected = kept_part + 0.9 * update + 0.1 * delta.tensor(name)
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-6)
    assert moments.is_8bit(optimizer.state[model.large]["exp_avg"])
    assert not moments.is_8bit(optimizer.state[model.small]["exp_avg"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    delta = ReferenceDelta.between(reference=Policy(dtype=dtype), base=Policy(1, dtype))
    whole = Policy(dtype=dtype)
    straight = merged(whole, delta, merge_every=2)
    for step in range(3):
        take_step(whole, straight, step)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(whole)
    resumed = merged(again, delta, merge_every=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 8):
        take_step(whole, straight, step)
        take_step(again, resumed, step)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_estimate_is_what_the_state_holds() -> None:
    model = Policy()
    optimizer = eight_bit(model)
    take_step(model, optimizer, 0)
    held = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    section = Optimizer.model_validate({"name": "adamw_8bit", "lr": 1e-6})
    assert state_sizes(section, shapes) == {"Adam's moments": sum(map(moments.nbytes, held))}


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "merged"])
def test_a_run_killed_and_resumed_is_the_same(
    wrapped: bool, tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    alone = {"optimizer": {**tiny.ADAMW, "name": "adamw_8bit"}, "base": None}
    pairing = {"name": "online_merging", "inner": "adamw_8bit", "sparsify": "top", "consensus": "sign"}
    sections = {"optimizer": pairing} if wrapped else alone
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "whole", **sections)
    whole = tiny.train(values)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == pytest.approx(
        [1e-3, 7.5e-4, 5e-4, 2.5e-4], rel=1e-5
    )
    copied = tmp_path / "copy"
    shutil.copytree(whole, copied)
    shutil.rmtree(copied / "model")
    shutil.rmtree(checkpoint_folders(copied)[4])
    tiny.train({**values, "output": str(copied)}, resume=True)
    assert_same_run(copied, whole)
