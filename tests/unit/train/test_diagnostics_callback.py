"""Diagnostics in the logs of a transformers Trainer, and the warning about the drift."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimtab import OnDARE, ReferenceDelta
from trimtab.optim.diagnostics import DRIFT_WARNS, DriftWarning, log_line, log_values
from trimtab.train import DiagnosticsCallback

pytestmark = pytest.mark.xdist_group("train")

FIRST = {"merge/weight", "merge/reserve_rate"}
MEASURED = {
    f"merge/{name}"
    for name in (
        "cosine",
        "conflicts",
        "survived",
        "arrived_delta",
        "arrived_update",
        "update_norm",
        "kept_update_norm",
        "delta_norm",
    )
}


class Regression(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.second(self.first(x).tanh()) - labels).square().mean()}


def made(alpha: float = 1e-3, groups: int = 1, **settings: Any) -> tuple[Regression, OnDARE]:
    model = Regression(1)
    delta = ReferenceDelta.between(reference=model, base=Regression(0))
    named = list(model.named_parameters())
    cut = len(named) // groups
    parts: Any = [{"params": named[i * cut : (i + 1) * cut]} for i in range(groups)]
    return model, OnDARE(parts, delta, lr=1e-3, reserve_rate=0.5, merge_weight=alpha, **settings)


def stepped(optimizer: OnDARE, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


class Reporter(TrainerCallback):
    """Stands where W&B's callback would, in front of those that a user adds."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def trained(tmp_path: Path, optimizer: Any, model: torch.nn.Module, callback: Any, steps: int) -> Any:
    rows = [{"x": torch.ones(4) * i, "labels": torch.zeros(1)} for i in range(4)]
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    )
    reporter = Reporter()
    trainer = Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[reporter])
    callback.attach(trainer)
    trainer.train()
    return trainer.state.log_history, reporter.seen


def test_a_plain_trainer_logs_it_and_its_reporters_see_it(tmp_path: Path) -> None:
    model, optimizer = made(measure_every=2)
    callback = DiagnosticsCallback(expected=lambda step, of: step / of)
    history, seen = trained(tmp_path, optimizer, model, callback, steps=3)
    logs = [record for record in history if "loss" in record]
    assert [{key for key in record if key.startswith("merge/")} for record in logs] == [
        FIRST | MEASURED | {"merge/drift", "merge/expected_drift"},
        FIRST | {"merge/drift", "merge/expected_drift"},
        FIRST | MEASURED | {"merge/drift", "merge/expected_drift"},
    ]
    drifts = [record["merge/drift"] for record in logs]
    assert drifts == sorted(drifts)
    assert drifts[-1] == pytest.approx(((1e-3 * 1.5) ** 2 + 3e-6 * 0.25) ** 0.5)
    assert [record["merge/expected_drift"] for record in logs] == pytest.approx([1 / 3, 2 / 3, 1])
    with_values = [record for record in seen if "loss" in record]
    assert [r["merge/drift"] for r in with_values] == drifts
    assert not any(key.startswith("merge/") for record in history if "loss" not in record for key in record)


def test_other_optimizers_add_nothing(tmp_path: Path) -> None:
    model = Regression(1)
    history, _ = trained(
        tmp_path, torch.optim.AdamW(model.parameters()), model, DiagnosticsCallback(expected=max), steps=1
    )
    assert not any(key.startswith("merge/") for record in history for key in record)


def log(callback: DiagnosticsCallback, optimizer: Any, step: int, *, first: bool = True) -> dict[str, float]:
    state = SimpleNamespace(global_step=step, max_steps=99, log_history=[], is_world_process_zero=first)
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs, optimizer=optimizer)  # type: ignore[arg-type]
    return logs


def test_the_drift_is_warned_about_once_by_the_first_process() -> None:
    _, optimizer = made(alpha=DRIFT_WARNS)  # p = 0.5: 0.1 and a little, then 0.2 and a little
    callback, other = DiagnosticsCallback(), DiagnosticsCallback()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(optimizer)
        assert log(callback, optimizer, 1)["merge/drift"] < DRIFT_WARNS
        stepped(optimizer)
        log(other, optimizer, 2, first=False)
    with pytest.warns(DriftWarning, match=r"at step 2 the merges have added up to 0\.2"):
        assert log(callback, optimizer, 2)["merge/drift"] > DRIFT_WARNS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log(callback, optimizer, 3)
    with pytest.warns(DriftWarning):
        log(DiagnosticsCallback(warn_above=0.01), optimizer, 3)


def test_what_was_measured_is_given_once_and_each_group_has_its_norms() -> None:
    _, optimizer = made(groups=2)
    assert set(log_values(optimizer)) == FIRST
    assert log_line(optimizer) == "no merge measured yet"
    stepped(optimizer)
    values = log_values(SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]  # as accelerate wraps
    own = {f"merge/group_{i}/{name}" for i in (0, 1) for name in ("drift", "update_norm")}
    own |= {f"merge/group_{i}/{name}" for i in (0, 1) for name in ("kept_update_norm", "delta_norm")}
    assert set(values) == FIRST | MEASURED | {"merge/drift"} | own
    norms = [values[f"merge/group_{i}/update_norm"] for i in (0, 1)]
    assert values["merge/update_norm"] == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert values["merge/arrived_delta"] == optimizer.arrival.delta
    assert set(log_values(optimizer, since=1)) == FIRST | {"merge/drift"}
    line = log_line(optimizer)
    assert line.startswith("step 1: ‖Δ‖ ")
    assert f"drift {values['merge/drift']:.3g} τ" in line
