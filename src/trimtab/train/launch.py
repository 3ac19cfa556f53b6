"""``trimtab train``: from a checked recipe to a run folder with a trained model in it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from trimtab.errors import UserError
from trimtab.files import write_text
from trimtab.optim.diagnostics import DRIFT_WARNS, HARM_BEGAN
from trimtab.recipe import Recipe, SampledLoss, make_recipe, refuse_differences
from trimtab.terminal import is_first_process, plain_libraries, say
from trimtab.train.callbacks import CompleteCheckpoints, MetricsFile
from trimtab.train.card import model_card
from trimtab.train.checkpoints import last_complete, read_marker
from trimtab.train.estimate import measure
from trimtab.train.folder import RunFolder
from trimtab.train.guard import is_disk_full, no_space
from trimtab.train.initial_adapter import copy_initial_adapter, keep_initial_adapter
from trimtab.train.optimizers import unwrapped
from trimtab.train.parts import Parts, gather_parts
from trimtab.train.progress import show_progress
from trimtab.train.regularisers import keep_average
from trimtab.train.samples import answers, sample_prompts


def run(
    recipe: Recipe, *, dry_run: bool = False, resume: bool = False, overwrite: bool = False
) -> Path | None:
    """Train what a recipe describes, into its run folder.

    Args:
        recipe: a checked recipe.
        dry_run: only say what would be done; no weights are loaded and nothing is written.
        resume: continue the run that the output folder holds, from its last complete checkpoint, bit for bit.
        overwrite: replace a run that the output folder holds.

    Returns:
        The run folder; None after a dry run.

    Raises:
        UserError: for a mistake in the recipe, in the data or in what the output folder holds; for a loss
            that is not finite; and for a full disk.
        KeyboardInterrupt: as it came, with a note of how to go on; the last complete checkpoint stays.

    Examples:
        >>> from trimtab.recipe import load_recipe                  # doctest: +SKIP
        >>> run(load_recipe("recipe.yaml", ["optimizer.lr=1e-6"]))  # doctest: +SKIP
        PosixPath('runs/first')
    """
    if dry_run:
        importlib.import_module("trimtab.train.dry_run").describe(recipe)
        return None
    folder = RunFolder(recipe.output)
    if is_first_process():
        folder.check(resume=resume, overwrite=overwrite)
    if resume and not folder.is_fresh():
        refuse_differences(make_recipe(folder.started_with()), recipe)
        if folder.is_finished():
            say(f"the run in {str(folder.path)!r} is finished; its model is {folder.model}")
            return folder.path
    was_fresh = folder.is_fresh()
    had_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        with plain_libraries():
            _train(recipe, folder, resume=resume)
    except KeyboardInterrupt as stop:
        stop.add_note(_how_to_go_on(folder))
        raise
    except Exception as error:
        if was_fresh and is_first_process():
            folder.withdraw()
        if not isinstance(error, UserError) and is_disk_full(error, folder.path):
            raise no_space(folder.path) from error
        raise
    finally:
        if not had_group and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return folder.path


def _how_to_go_on(folder: RunFolder) -> str:
    kept = last_complete(folder.path) if folder.path.exists() else None
    if kept is not None:
        return f"{kept} is complete, so the same command with --resume continues from there"
    return "there was no complete checkpoint yet, so the same command with --resume starts anew"


def _train(recipe: Recipe, folder: RunFolder, *, resume: bool) -> None:
    checkpoint = last_complete(folder.path) if resume and folder.path.exists() else None
    parts = gather_parts(recipe, resumes=checkpoint is not None)
    marker = _marker(checkpoint, parts.arguments.world_size) if checkpoint else None
    _introduce(parts)
    trainer = _make_trainer(parts)
    with parts.arguments.distributed_state.main_process_first():
        if is_first_process():
            _prepare(folder, parts, checkpoint, resume=resume)
            if checkpoint is None:
                model = trainer.accelerator.unwrap_model(trainer.model)
                keep_initial_adapter(model, parts.policy, folder.path)
    _add_callbacks(trainer, folder, parts)
    if checkpoint is None:
        _sample(trainer, folder, parts, "before")
        trainer.train()
    elif marker is not None and marker["step"] < _planned_steps(checkpoint):
        _restore_counts(trainer, checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # killed after the last checkpoint: the Trainer would take one step more
        trainer._load_from_checkpoint(str(_kept(checkpoint, parts)))
    if recipe.optimizer.ema is not None:
        keep_average(trainer, checkpoint if trainer.optimizer is None else None)
    _finish(trainer, folder, parts)


def _make_trainer(parts: Parts) -> Any:
    """Build the method's trainer; what TRL refuses is the recipe's mistake, and is said as one."""
    try:
        return importlib.import_module(f"trimtab.train.{parts.recipe.method}").make_trainer(parts)
    except UserError:
        raise
    except (ValueError, NotImplementedError, ImportError) as error:
        said = " ".join(str(error).split())
        library = "transformers" if parts.recipe.method in ("rrhf", "ppo") else "TRL"
        raise UserError(f"{library} refuses this {parts.recipe.method} recipe: {said}") from error


def _introduce(parts: Parts) -> None:
    """Show what became of the data, and how large the training is."""
    if not is_first_process():
        return
    terminal = sys.stderr.isatty()
    console = Console(stderr=True, width=None if terminal else 140)
    for data in (parts.data, parts.held_out_data):
        if data is not None:
            console.print(data.report.table())
    size = measure(parts)
    unit = "responses" if isinstance(parts.recipe.loss, SampledLoss) else "rows"
    say(
        f"{parts.recipe.method} of {parts.policy.label}: "
        f"{size.trainable:,} of {size.parameters:,} parameters, "
        f"{size.steps:,} steps of {size.batch:,} {unit} on {parts.arguments.device}"
    )
    if parts.delta is not None and parts.delta.assumption is not None:
        say(parts.delta.assumption)
    if parts.plan.drift is not None:
        drift = parts.plan.drift.after(size.steps, of=size.steps)
        began = f" (on trimtab's lab models harm began at about {HARM_BEGAN:g} τ)"
        late = began if drift > DRIFT_WARNS else ""
        say(f"the merges are expected to add up to {drift:.3g} τ{late}")


def _marker(checkpoint: Path, world_size: int) -> dict[str, Any] | None:
    marker = read_marker(checkpoint)
    if marker is not None and marker["world_size"] != world_size:
        raise UserError(
            f"{checkpoint} was written by {marker['world_size']} processes and this run has {world_size}, "
            "which would give it other batches; launch it with as many as before"
        )
    return marker


def _planned_steps(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"])


def _kept(checkpoint: Path, parts: Parts) -> Path:
    """The checkpoint whose weights a finished training keeps: the last, or the best where that is asked."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = state["best_model_checkpoint"]
    keeps_best = parts.arguments.load_best_model_at_end and best is not None
    return checkpoint.with_name(Path(best).name) if keeps_best else checkpoint


def _prepare(folder: RunFolder, parts: Parts, checkpoint: Path | None, *, resume: bool) -> None:
    """Bring the folder to where the training starts from."""
    device, processes = parts.arguments.device, parts.arguments.world_size
    if checkpoint is None:
        if resume:
            say(f"{str(folder.path)!r} holds no complete checkpoint; the run starts anew")
        aside = folder.clear(checkpoints=not resume)
        folder.write_start(parts.recipe, device, processes)
    else:
        aside = folder.rewind(checkpoint)
        say(f"continuing from {checkpoint}")
        for change in folder.note_resume(checkpoint, parts.recipe.seed, device, processes):
            say(f"this run began elsewhere, so it may not come out bit for bit as there: {change}")
    for path in aside:
        say(f"an incomplete checkpoint was set aside as {path}")
    _write_counts(folder, parts)


def _write_counts(folder: RunFolder, parts: Parts) -> None:
    counts = {"train": parts.data.report.to_dict()}
    if parts.held_out_data is not None:
        counts["eval"] = parts.held_out_data.report.to_dict()
    folder.write_result("data", counts)


def _add_callbacks(trainer: Any, folder: RunFolder, parts: Parts) -> None:
    def merge_pending(step: int) -> None:
        merge_now = getattr(unwrapped(trainer.optimizer), "merge_now", None)
        merged = merge_now() if merge_now is not None else 0
        if merged:
            say(f"after the last step ({step}), what was pending in {merged} parameters was merged")

    trainer.add_callback(MetricsFile(folder.metrics))
    keep = parts.recipe.training.get("save_total_limit")
    evaluates = parts.held_out is not None
    trainer.add_callback(CompleteCheckpoints(folder.path, keep, evaluates, merge_pending))
    show_progress(trainer)


def _restore_counts(trainer: Any, checkpoint: Path) -> None:
    """Give TRL back the number of tokens seen so far, which it does not save."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    counts = [record["num_tokens"] for record in history if "num_tokens" in record]
    if counts and hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = int(counts[-1])


def _sample(trainer: Any, folder: RunFolder, parts: Parts, when: str) -> None:
    evaluation = parts.recipe.evaluation
    prompts = sample_prompts(parts.held_out, evaluation)
    if prompts and is_first_process():
        given = answers(trainer.model, parts.tokenizer, prompts, evaluation.max_new_tokens)
        folder.write_result("samples", {**folder.read_result("samples"), when: given})


def _finish(trainer: Any, folder: RunFolder, parts: Parts) -> None:
    """Write what is known at the end; ``model/`` comes last, and a run that has it is finished."""
    _sample(trainer, folder, parts, "after")
    results, model = trainer.final_results(), trainer.trained_model()
    if is_first_process():
        for name, result in results.items():
            folder.write_result(name, result)
            say(result["summary"])
        _write_counts(folder, parts)  # those of a stream have grown
        write_text(folder.path / "README.md", model_card(folder, parts))
        model.config.use_cache = True  # the Trainer turned it off for training
        adapters = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
        with folder.saving_model() as temporary:
            model.save_pretrained(temporary, **adapters)
            parts.tokenizer.save_pretrained(temporary)
            copy_initial_adapter(folder.path, temporary)
        say(f"the trained model is {folder.model}")
    parts.arguments.distributed_state.wait_for_everyone()
