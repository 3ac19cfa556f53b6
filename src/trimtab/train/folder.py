"""The run folder: what may be there before a training, what is written into it, and in which order."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from trimtab.delta.adapters import INITIAL_ADAPTER
from trimtab.errors import UserError
from trimtab.files import replacing_folder, write_json, write_text
from trimtab.recipe import Recipe
from trimtab.train.checkpoints import read_marker, set_aside_incomplete, truncate_metrics

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
_PACKAGES = (
    "trimtab",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "torchao",
)


class RunFolder:
    """The files of one run.

    ::

        recipe.yaml       the resolved recipe
        environment.json  versions, commit, seed, device
        metrics.jsonl     one line per log
        checkpoint-N/     complete when trimtab.json is in it
        initial_adapter.safetensors   what an adapter was before its training
        results/          data.json, samples.json
        README.md         the model card
        model/            the trained model; it appears last, so a run with it is finished

    Args:
        path: the folder; it is made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / METRICS

    @property
    def model(self) -> Path:
        """Where the trained model is saved."""
        return self.path / "model"

    @property
    def results(self) -> Path:
        """Where results are saved."""
        return self.path / "results"

    def is_finished(self) -> bool:
        """Whether the run's model has been saved."""
        return self.model.is_dir()

    def is_fresh(self) -> bool:
        """Whether nothing is there yet, but what a killed process was writing under temporary names."""
        return not self.path.exists() or set(self.path.iterdir()) <= set(self._temporary())

    def started_with(self) -> dict[str, Any]:
        """Return the values of the recipe the run was started with.

        Raises:
            UserError: if there is no such recipe, so that this is not a run folder.
        """
        try:
            values = yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"output {str(self.path)!r} holds no readable {RECIPE}, so there is no run to resume; "
                "name another output"
            ) from error
        return dict(values)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse an output that a new run would overwrite.

        Raises:
            UserError: if something is there that is neither to be resumed nor to be overwritten, or that is
                no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {str(self.path)!r} is a file; name a folder")
        if self.is_fresh():
            return
        if not (self.path / RECIPE).is_file():
            raise UserError(
                f"output {str(self.path)!r} is not empty and holds no run ({RECIPE} is missing); "
                "name another output"
            )
        if not (resume or overwrite):
            raise UserError(
                f"output {str(self.path)!r} already holds a run; continue it with --resume, replace it with "
                "--overwrite, or name another output"
            )

    def clear(self, *, checkpoints: bool) -> list[Path]:
        """Delete a run's files, so that it can start anew; anything else in the folder stays.

        So does the recipe, until :meth:`write_start` replaces it: without it a kill in between would leave a
        folder that is no run, and could not be resumed.

        Args:
            checkpoints: delete checkpoints too; else incomplete ones are set aside.

        Returns:
            Where the incomplete checkpoints are now.
        """
        for path in (self.model, self.results, *(self.path.glob("checkpoint-*") if checkpoints else ())):
            shutil.rmtree(path, ignore_errors=True)
        for name in ("README.md", METRICS, ENVIRONMENT, INITIAL_ADAPTER):
            (self.path / name).unlink(missing_ok=True)
        self._sweep()
        return set_aside_incomplete(self.path)

    def _sweep(self) -> None:
        """Delete what a killed process was still writing under temporary names."""
        for path in (*self._temporary(), *self.results.glob(".*.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _temporary(self) -> list[Path]:
        return [*self.path.glob(".*.tmp"), *self.path.glob(".*.old")]

    def withdraw(self) -> None:
        """Delete what a run wrote that came to nothing, so that the corrected one finds no run in its way.

        A run that has a checkpoint or has measured anything is kept: there is something to see.
        """
        if not self.path.is_dir() or self.metrics.exists() or any(self.path.glob("checkpoint-*")):
            return
        self.clear(checkpoints=False)
        (self.path / RECIPE).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def rewind(self, checkpoint: Path) -> list[Path]:
        """Make the folder what it was when its last complete checkpoint was written.

        Incomplete checkpoints are set aside and later lines of the metrics are dropped.

        Args:
            checkpoint: the last complete checkpoint.

        Returns:
            Where the incomplete checkpoints are now.
        """
        self._sweep()
        aside = set_aside_incomplete(self.path)
        marker = read_marker(checkpoint)
        assert marker is not None
        truncate_metrics(self.metrics, marker["step"])
        return aside

    def write_start(self, recipe: Recipe, device: torch.device, world_size: int) -> None:
        """Write what is known before the first step; the recipe first, since it makes the folder a run's."""
        write_text(self.path / RECIPE, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
        write_json(self.path / ENVIRONMENT, environment(recipe.seed, device, world_size))

    def note_resume(self, checkpoint: Path, seed: int, device: torch.device, world_size: int) -> list[str]:
        """Note in ``environment.json`` from where the run goes on, and in what its environment has changed.

        Returns:
            What has changed, in words.
        """
        before = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))
        now = environment(seed, device, world_size)
        changed = {key: now[key] for key in now if now[key] != before.get(key)}
        before.setdefault("resumed", []).append({"from": checkpoint.name, **changed})
        write_json(self.path / ENVIRONMENT, before)
        return [f"{key} was {before.get(key)}, is {value}" for key, value in changed.items()]

    def read_result(self, name: str) -> dict[str, Any]:
        """Return ``results/NAME.json``, or nothing where it is not there."""
        path = self.results / f"{name}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def write_result(self, name: str, value: Any) -> None:
        """Write ``results/NAME.json``."""
        write_json(self.results / f"{name}.json", value)

    @contextmanager
    def saving_model(self) -> Iterator[Path]:
        """Yield a folder for the model's files; it becomes ``model/`` when all of them are written."""
        with replacing_folder(self.model) as temporary:
            yield temporary


def environment(seed: int, device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what a result depends on besides the recipe: versions, commit, device, CPU capability, seed."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world_size,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of trimtab's source, where it runs from a git checkout of its own."""
    source = Path(__file__).resolve().parents[3]
    if not (source / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
