"""Paths and hub ids in a recipe: what is meant to be here must be, and the output overwrites no input."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trimtab.recipe.losses import SampledLoss
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.weights import model_folder_problem
from trimtab.yaml_file import Key, Problem

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".gz", ".zst", ".arrow")


def local_path(text: str) -> Path | None:
    """Return the path that ``text`` means on this machine, or None if it can only be a hub id.

    Local is what starts with ``.``, ``/`` or ``~``, what ends as a data file does, and what exists.

    Examples:
        >>> local_path("org/name") is None, local_path("./model").name, local_path("org/pairs.jsonl").name
        (True, 'model', 'pairs.jsonl')
    """
    path = Path(text).expanduser()
    if text.startswith((".", "/", "~")) or text.lower().endswith(DATA_SUFFIXES) or path.exists():
        return path
    return None


def path_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the paths that are not there, are not what they should be, or would be overwritten."""
    inputs: dict[Path, Key] = {}
    for key, text in [*_models(recipe), *_reward_models(recipe)]:
        path, problem = _found(text, "a model folder or a hub id such as org/name")
        yield from _said(key, problem or (model_folder_problem(path) if path else None))
        if path is not None:
            inputs.setdefault(path, key)
    if recipe.delta is not None:
        delta = Path(recipe.delta).expanduser()
        yield from _said(("delta",), _delta_problem(delta))
        inputs.setdefault(delta, ("delta",))
    for key, text in _sources(recipe):
        path, problem = _found(text, "a file, a folder or a hub id such as org/name")
        yield from _said(key, problem)
        if path is not None:
            inputs.setdefault(path, key)
    yield from _output(Path(recipe.output).expanduser(), inputs)


def _models(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Each model once, at the key that was written rather than the one that was filled in from it."""
    seen: set[str] = set()
    for name in (recipe.key_of_model(), "model", "reference", "base"):
        text = getattr(recipe, name)
        if text is not None and text not in seen:
            seen.add(text)
            yield (name,), text


def _reward_models(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    if isinstance(recipe.loss, SampledLoss):
        for index, source in enumerate(recipe.loss.rewards):
            if source.rule is None:
                kind = "model" if source.model is not None else "likelihood"
                yield ("loss", "rewards", index, kind), source.source


def _sources(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    for part in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, part) or ()):
            yield ("data", part, index, "path"), source.path
    for name in ("child_tuning", "projection"):
        section = getattr(recipe.optimizer, name)
        for index, source in enumerate((section and section.data) or ()):
            yield ("optimizer", name, "data", index, "path"), source.path


def _found(text: str, wanted: str) -> tuple[Path | None, str | None]:
    path = local_path(text)
    if path is not None:
        return path, None if path.exists() else f"{text!r} does not exist; name {wanted}"
    if not HUB_ID.fullmatch(text):
        return None, f"{text!r} neither exists here nor is a hub id; name {wanted}"
    return None, None


def _said(key: Key, problem: str | None) -> Iterator[Problem]:
    if problem:
        yield Problem(key, problem)


def _delta_problem(folder: Path) -> str | None:
    if not folder.exists():
        return f"{str(folder)!r} does not exist; make it with trimtab delta"
    if not (folder / "delta.json").is_file():
        return f"{str(folder)!r} has no delta.json; name a folder made with trimtab delta"
    return None


def _output(output: Path, inputs: dict[Path, Key]) -> Iterator[Problem]:
    file = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        where = "is a file" if file == output else f"cannot be made: {str(file)!r} is a file"
        yield Problem(("output",), f"{str(output)!r} {where}; name a folder")
    folder = output.resolve()
    for path, key in inputs.items():
        what = path.resolve()
        if folder == what or folder in what.parents:
            yield Problem(
                ("output",),
                f"{str(output)!r} is or holds {str(path)!r}, which is read; name another",
                also=(key,),
            )
        elif what in folder.parents and "data" not in key:
            yield Problem(
                ("output",),
                f"{str(output)!r} lies inside {str(path)!r}, which is read; name another",
                also=(key,),
            )
