"""The shipped models: base and SFT model of three seeds, with a record of how they were made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from trimtab.errors import UserError
from trimtab.lab.answers import Style, dress, reward
from trimtab.lab.measure import Score, capability_tasks, reward_tasks
from trimtab.lab.model import config
from trimtab.lab.preferences import draw_pairs
from trimtab.lab.pretrain import BASE, SFT
from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import WORDS
from trimtab.lab.world import FACTS, FOLLOW, ramble

Kind = Literal["base", "sft"]

FOLDER = Path(__file__).parent / "checkpoints"
MANIFEST = "manifest.json"
SEEDS = (0, 1, 2)
KINDS: tuple[Kind, ...] = ("base", "sft")
REBUILD_TOLERANCE = 4.0
"""Points of capability within which a rebuild on other hardware must land."""


def model_folder(seed: int, kind: Kind, root: Path = FOLDER) -> Path:
    """Return the folder of a model: ``config.json`` and ``model.safetensors``, as transformers reads them."""
    return root / f"seed{seed}-{kind}"


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model so that the same weights give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(seed: int, kind: Kind, root: Path = FOLDER) -> PreTrainedModel:
    """Load a model in fp32, ready for evaluation.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    path = model_folder(seed, kind, root) / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"there is no {kind} checkpoint for seed {seed} ({path}); shipped seeds are 0, 1 and 2"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); install trimtab again") from error
    model = LlamaForCausalLM(config())
    tied = set(model.all_tied_weights_keys)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) - tied or unexpected:
        raise UserError(f"{path} does not hold the lab's model: missing {missing}, unexpected {unexpected}")
    return model.eval()


def read_manifest(root: Path = FOLDER, name: str = MANIFEST) -> dict[str, Any]:
    """Return the record of the shipped checkpoints."""
    return json.loads((root / name).read_text(encoding="utf-8"))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache
def world_hash() -> str:
    """Return a fingerprint of everything the checkpoints depend on that is not a weight.

    It covers the vocabulary, the facts, the questions with their rewards for the right answer, and the
    pairs of seed 0: a change of any of them makes shipped scores meaningless.
    """
    tasks = [(t.command, t.words, t.content, t.length) for t in (*capability_tasks(), *reward_tasks())]
    styles = [Style(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]
    liked = [reward(task, dress(task, task.content, style)) for task in reward_tasks() for style in styles]
    long = Stream("world hash")
    liked += [
        reward(task, ramble(long, task.words[1], extra + task.length))
        for task in reward_tasks()
        if task.command == "talk"
        for extra in range(1, 12)
    ]
    pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in draw_pairs(0, 64)]
    everything = (WORDS, sorted(FACTS.items()), sorted(FOLLOW.items()), tasks, liked, pairs)
    return hashlib.blake2b(repr(everything).encode(), digest_size=16).hexdigest()


def environment() -> dict[str, Any]:
    """Return what decides whether a rebuild is bit for bit: versions, CPU capability, threads."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def same_arithmetic(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Say whether two environments should give the same bits."""
    keys = ("torch", "transformers", "cpu_capability", "machine", "threads")
    return all(left[key] == right[key] for key in keys)


def manifest(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the record to be written beside the checkpoints.

    Args:
        models: Folder name -> hash and scores.
    """
    return {
        "world": world_hash(),
        "environment": environment(),
        "training": {"base": asdict(BASE), "sft": asdict(SFT)},
        "models": models,
    }


def score_record(score: Score) -> dict[str, Any]:
    """Return a score as JSON-ready numbers, rounded to what the questions can resolve."""
    return {
        "reward": round(score.reward, 4),
        "capability": round(score.capability, 4),
        "per_capability": {name: round(value, 4) for name, value in score.per_capability.items()},
    }
