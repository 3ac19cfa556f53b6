"""The quickstart as a whole, with a few steps and few questions: what it writes, refuses and says."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trimtab import optim
from trimtab.errors import UserError
from trimtab.lab import methods, quickstart, story
from trimtab.lab.dpo import tune
from trimtab.lab.measure import measure
from trimtab.lab.methods import ADAMW, AVERAGE, EMA, ONDARE, ONTIES, REPEAT, Plan
from trimtab.report.verdict import headline

SHORT = Plan(steps=12, measured=(6, 12), ema_measured=(12,), weights=(0.25, 0.5), lr=1e-4)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """One seed, twelve steps, the development questions."""
    patch = pytest.MonkeyPatch()
    for module in (methods, quickstart):
        patch.setattr(module, "measure", lambda model: measure(model, "dev"))
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    results = quickstart.run(folder, [1], plan=SHORT, workers=1, console=console)
    console.file.close()
    patch.undo()
    return folder, results, console.export_text()


def test_files_hold_what_was_measured(short_run):
    folder, results, _ = short_run
    assert {file.name for file in folder.iterdir()} == quickstart.OURS
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    counts = {name: sum(point["method"] == name for point in results["points"]) for name in story.ORDER}
    assert counts == {ADAMW: 2, ONDARE: 2, ONTIES: 2, REPEAT: 2, EMA: 1, AVERAGE: 3}
    reference = results["references"]["1"]
    for point in results["points"]:
        gap = 100 * (reference["capability"] - point["capability"])
        assert point["tax"] == pytest.approx(gap, abs=0.02)
        assert len(point["per_capability"]) == 9


def test_runs_record_drift_and_arrival(short_run):
    runs = {run["method"]: run for run in short_run[1]["runs"]}
    assert runs[ONDARE]["drift"] == pytest.approx(1e-3 * 0.5 * 12)
    assert runs[ONTIES]["drift"] == pytest.approx(1e-3 * 12)
    assert runs[ADAMW]["drift"] == 0
    assert runs[ADAMW]["delta_arrived"] is None
    assert runs[ONDARE]["delta_arrived"] > 0.9


def test_the_last_average_is_the_tuned_model(short_run):
    points = short_run[1]["points"]
    last = [next(p for p in reversed(points) if p["method"] == name) for name in (ADAMW, AVERAGE)]
    assert (last[0]["reward"], last[0]["tax"]) == (last[1]["reward"], last[1]["tax"])


def test_the_page_and_the_terminal_say_the_computed_headline(short_run):
    folder, results, printed = short_run
    page = (folder / "report.html").read_text()
    for said in headline(quickstart.curves_of(results), story.question()):
        assert said in page
        assert " ".join(said.split()[:4]) in " ".join(printed.split())
    assert "Reward at equal tax" in printed
    assert results["examples"]["questions"][0] in page
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_run_repeats_exactly(monkeypatch):
    monkeypatch.setattr(methods, "measure", lambda model: weights_hash(model))
    plan = Plan(steps=3, measured=(3,), lr=1e-4)
    first, again = (methods.train_run(ONDARE, 1, plan).points for _ in range(2))
    assert first == again
    assert first != methods.train_run(ONTIES, 1, plan).points


def weights_hash(model):
    return hash(tuple(parameter.detach().numpy().tobytes() for parameter in model.parameters()))


def test_an_average_a_quarter_of_the_way():
    start = methods.prepare(1)
    mixed = copy.deepcopy(start.sft)
    methods.interpolate(mixed, start.base, start.sft, 0.25)
    triples = zip(mixed.parameters(), start.base.parameters(), start.sft.parameters(), strict=True)
    for target, base, sft in triples:
        torch.testing.assert_close(target, 0.75 * base + 0.25 * sft)


def test_the_public_average_is_the_quickstart_s_to_the_bit():
    start = methods.prepare(1)
    model, average = copy.deepcopy(start.sft), copy.deepcopy(start.sft)
    optimizer = methods.build_optimizer(ADAMW, model, start.delta, SHORT)
    ema = optim.EMA(optimizer, SHORT.ema)
    for _ in tune(model, optimizer, start.pairs, start.reference_logps, steps=3, beta=SHORT.beta, seed=1):
        methods.interpolate(average, average, model, SHORT.ema)
    with ema.swapped_in():
        assert weights_hash(model) == weights_hash(average)
    assert weights_hash(model) != weights_hash(average)


@pytest.mark.parametrize("seeds", [[3], [0, -1], []])
def test_unknown_seeds_are_refused(seeds, tmp_path):
    with pytest.raises(UserError, match="choose from 0, 1, 2"):
        quickstart.run(tmp_path / "out", seeds)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        quickstart.run(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_foreign_files_are_refused_unless_told_and_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        quickstart.run(tmp_path)
    assert quickstart._checked_folder(tmp_path, overwrite=True) == tmp_path
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "report.html").write_text("an earlier one")
    assert quickstart._checked_folder(tmp_path, overwrite=False) == tmp_path


@pytest.mark.slow
def test_worker_processes_give_what_one_process_gives(tmp_path):
    plan = Plan(steps=6, measured=(6,), ema_measured=(6,), weights=(0.5,), lr=1e-4)
    quiet = Console(quiet=True)
    alone = quickstart.run(tmp_path / "one", [1], plan=plan, workers=1, console=quiet)
    both = quickstart.run(tmp_path / "two", [1], plan=plan, workers=2, console=quiet)
    assert alone["points"] == both["points"]


def _workers(pid: int) -> list[Path]:
    """Return the worker processes of a quickstart (Python's resource tracker is another child, not ours)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [Path(f"/proc/{child}") for child in children]
    return [child for child in found if b"spawn_main" in (child / "cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads children from /proc")
def test_ctrl_c_ends_the_workers_and_exits_with_130(tmp_path):
    command = [sys.executable, "-m", "trimtab", "quickstart", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while "2,120 fixed questions" not in process.stdout.readline().decode():
        assert process.poll() is None
    while len(workers := _workers(process.pid)) < 2:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert not any(worker.exists() for worker in workers)
    assert not list((tmp_path / "out").iterdir())
