"""The output's folder: where it grows, what lies in it beside the weights, and how it takes its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.delta.checkpoint import read_json
from trimtab.errors import UserError
from trimtab.files import take_place, write_json, write_text
from trimtab.merge.layers import COUNTS, Layers
from trimtab.merge.plan import Plan
from trimtab.merge.tokens import tokenizer_folder
from trimtab.merge.writer import Shard, is_whole

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_LOCK = "merging.lock"
DIGEST = "merging.json"
"""What the work folder holds beside complete files: which merge they belong to."""

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
_PROCESSING = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def folder_named(out: str | os.PathLike[str]) -> Path:
    """The output's path.

    Raises:
        UserError: it begins with the home of a user who is not known.
    """
    try:
        return Path(out).expanduser()
    except RuntimeError:
        raise UserError(
            f"{os.fspath(out)!r} begins with a home that is not known; write the whole path"
        ) from None


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there already, or that cannot be a folder.

    Raises:
        UserError: says which.
    """
    check_place(out)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is there already; name another folder, or give --overwrite to replace it")
        _check_model(out)


def _check_model(out: Path) -> None:
    """Refuse to replace a folder that is more than a model, or none."""
    names = [path.name for path in out.iterdir()]
    weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
    if "config.json" not in names or not weights:
        raise UserError(f"{out} holds no model, so --overwrite does not replace it; name another folder")
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    if folders:
        raise UserError(
            f"{out} holds more than a model ({folders[0]}), so --overwrite does not replace it; name another "
            "folder"
        )


def check_place(out: Path) -> None:
    """Refuse an output that cannot be a folder of its own.

    Raises:
        UserError: says why.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; name a folder to be written")
    if out.is_symlink():
        raise UserError(f"{out} is a link; name the folder that it leads to, or another one")
    here = Path.cwd()
    if out.resolve() in (here, *here.parents):
        raise UserError(f"{out} is, or holds, the current folder; name a folder to be made in it")


def check_inputs_apart(out: Path, plan: Plan) -> None:
    """Refuse to write over one of the models that are read.

    Raises:
        UserError: names it.
    """
    target = out.resolve()
    read = [(model.folder, f"the model {model.label}") for model in plan.inputs]
    named = [source.model for slice_ in plan.config.slices for source in slice_.sources]
    read += [(Path(ref.lora).expanduser(), f"the adapter {ref.lora}") for ref in named if ref.lora]
    for folder, what in read:
        if target == folder.resolve() or target in folder.resolve().parents:
            raise UserError(f"{out} is, or holds, {what} that is merged; name another folder")


def check_space(out: Path, size: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        UserError: says how much there is.
    """
    parent = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(
            f"the merge needs {size / 1e9:.2f} GB in {parent}, where {free / 1e9:.2f} GB are free; free some "
            "or write elsewhere"
        )


@contextmanager
def growing(
    out: Path, digest: str, shards: tuple[Shard, ...], check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield the folder in which the output grows, beside ``out``; at the end it takes its place.

    After an interruption (Ctrl-C, a kill) its complete shards stay, and the same merge goes on from there.
    After an error it is removed. Another merge's remains are removed at the start.

    Args:
        out: the output.
        digest: of everything that the output's tensors follow from.
        shards: the files that are kept.
        check: raises where ``out`` may not be written; asked again before it takes its place.
    """
    work = out.absolute().parent / f".{out.name}.merging"
    with _alone(work, out):
        _prepare(work, digest, shards)
        try:
            check()
            yield work
        except (KeyboardInterrupt, SystemExit) as stop:
            if not _kept(work, shards, stop):
                shutil.rmtree(work, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        try:
            check()
        except UserError as late:  # something has come to lie there meanwhile; the work is done
            if not _kept(work, shards, late):
                shutil.rmtree(work, ignore_errors=True)
            raise
        take_place(work, out)
        for name in (DIGEST, _LOCK):
            (out / name).unlink(missing_ok=True)


def _kept(work: Path, shards: tuple[Shard, ...], error: BaseException) -> bool:
    """Whether there are complete files to go on from; the error says so."""
    count = sum((work / shard.file).is_file() for shard in shards)
    if count:
        error.add_note(f"{count} of {len(shards)} files are kept, and the same command goes on from there")
    return bool(count)


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """Make the folder and keep other merges out of it."""
    if work.exists() and not work.is_dir():
        raise UserError(f"{work} is in the way of the folder in which {out} grows; remove it")
    work.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (work / _LOCK).open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another merge is writing {out}; wait for it, or name another folder") from None
        except OSError:  # a file system without locks
            pass
        yield


def _prepare(work: Path, digest: str, shards: tuple[Shard, ...]) -> None:
    try:
        ours = json.loads((work / DIGEST).read_text(encoding="utf-8")) == {"digest": digest}
    except (OSError, ValueError):
        ours = False
    kept = {_LOCK}
    if ours:
        kept |= {shard.file for shard in shards if is_whole(work, shard)}
    for file in work.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name not in kept:
            file.unlink()
    write_json(work / DIGEST, {"digest": digest})


def write_surroundings(folder: Path, plan: Plan, card: str) -> None:
    """Write what makes a folder of weights a model: configuration, tokenizer, generation settings, card.

    Args:
        folder: the folder that grows.
        plan: the merge.
        card: the model card's text.
    """
    donor = plan.inputs[plan.donor]
    write_json(folder / "config.json", _config(plan))
    _copy(donor.folder, folder, ("generation_config.json", *_PROCESSING))
    if plan.vocabulary is not None:
        plan.vocabulary.tokenizer.save_pretrained(folder)
        generation = folder / "generation_config.json"
        if generation.is_file():  # the ids of its tokens may have moved
            write_json(generation, plan.vocabulary.configured(read_json(generation), plan.donor))
    else:
        _copy(tokenizer_folder(donor), folder, _TOKENIZER)
    if plan.config.chat_template is not None:
        _set_chat_template(folder, plan.config.chat_template)
    write_text(folder / "README.md", card)
    write_text(folder / "merge.yaml", plan.config.text)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _set_chat_template(folder: Path, template: str) -> None:
    write_text(folder / "chat_template.jinja", template)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():  # an older tokenizer carries its template there
        values = json.loads(settings.read_text(encoding="utf-8"))
        if values.pop("chat_template", None) is not None:
            write_json(settings, values)


def _config(plan: Plan) -> dict[str, Any]:
    """The donor's configuration, with what the merge has changed."""
    config: dict[str, Any] = dict(plan.inputs[plan.donor].config)
    floating = [one.entry for one in plan.outputs if not one.copied]
    if floating:
        largest = max(floating, key=lambda entry: entry.size)
        name = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
        config[name] = str(largest.dtype).removeprefix("torch.")
    if plan.vocabulary is not None:
        config = plan.vocabulary.configured(config, plan.donor)
    if plan.layers is not None:
        config = _with_layers(config, plan)
    for name in ("_name_or_path", "quantization_config", "transformers_weights"):
        config.pop(name, None)
    return config


def _with_layers(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The configuration of a model with as many layers as the slices have together.

    It is changed where the count stands: at the top, or in ``text_config``, or in both.
    """
    donor = plan.inputs[plan.donor]
    _, count = Layers.of(donor.keys(), donor.config).only(donor.label)
    changed: dict[str, Any] = {name: plan.layers for name in COUNTS if config.get(name) == count}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and _is_by_layer(name):
            changed[name] = [item for span in plan.spans for item in value[slice(*span)]]
    inner = config.get("text_config")
    if isinstance(inner, dict):
        changed["text_config"] = _with_layers(inner, plan)
    return {**config, **changed}


def _is_by_layer(name: str) -> bool:
    """Whether a list of a configuration has an entry per layer, if it has as many as there are layers."""
    return name.startswith("layer") or name.endswith("layer_types") or name == "no_rope_layers"
