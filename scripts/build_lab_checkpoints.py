"""Train the lab's base and SFT models for three seeds: what `trimtab quickstart` starts from.

    python scripts/build_lab_checkpoints.py                  # rebuild in place: about 5 CPU minutes a seed
    python scripts/build_lab_checkpoints.py --check          # rebuild elsewhere and compare with what is
    shipped python scripts/build_lab_checkpoints.py --check --seeds 1

On the CPU capability and versions that the manifest records, a rebuild equals the shipped files bit for
bit; elsewhere sums are formed in another order, and the capability of each model must land within 4 points
of the recorded one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# One thread: more would be faster but not the same bits on a machine with another number of cores.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from trimtab.files import write_json
from trimtab.lab import checkpoints
from trimtab.lab.measure import measure
from trimtab.lab.pretrain import train_base, train_sft


def build_seed(seed: int, root: Path) -> None:
    """Train both models of a seed and write them with their scores."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.process_time()

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(
                f"seed {seed}: step {step}, loss {loss:.3f}, {time.process_time() - start:.0f} CPU s",
                flush=True,
            )

    model = train_base(seed, report)
    records: dict[str, Any] = {}
    for kind in checkpoints.KINDS:
        if kind == "sft":
            train_sft(model, seed, report)
        folder = checkpoints.model_folder(seed, kind, root)
        checkpoints.save(model, folder)
        score = measure(model)
        print(f"seed {seed} {kind}: reward {score.reward:.3f}, capability {score.capability:.3f}", flush=True)
        records[folder.name] = {
            "sha256": checkpoints.file_hash(folder / "model.safetensors"),
            **checkpoints.score_record(score),
        }
    write_json(root / f"seed{seed}.json", checkpoints.manifest(records))


def build(seeds: list[int], root: Path, workers: int) -> dict[str, Any]:
    """Train the seeds, each in a process of its own, and return the manifest."""
    waiting, running = list(seeds), []
    while waiting or running:
        while waiting and len(running) < workers:
            command = [sys.executable, __file__, "--one-seed", str(waiting.pop(0)), "--out", str(root)]
            running.append(subprocess.Popen(command))
        finished = running.pop(0)
        if finished.wait() != 0:
            sys.exit(f"building failed with exit code {finished.returncode}")
    parts = []
    for seed in seeds:
        part = root / f"seed{seed}.json"
        parts.append(checkpoints.read_manifest(root, part.name))
        part.unlink()
    return parts[0] | {"models": {name: record for part in parts for name, record in part["models"].items()}}


def compare(rebuilt: dict[str, Any], shipped: dict[str, Any]) -> list[str]:
    """Return what differs more than it may."""
    same = checkpoints.same_arithmetic(rebuilt["environment"], shipped["environment"])
    print("same versions and CPU capability: bits must agree" if same else "another environment: ± 4 points")
    problems = (
        []
        if rebuilt["world"] == shipped["world"]
        else ["the world has changed since the checkpoints were built"]
    )
    for name, record in rebuilt["models"].items():
        theirs = shipped["models"][name]
        gap = 100 * abs(record["capability"] - theirs["capability"])
        equal = record["sha256"] == theirs["sha256"]
        print(f"{name}: {'bit for bit equal' if equal else 'other bits'}, capability {gap:.1f} points apart")
        if same and not equal:
            problems.append(f"{name}: other bits in the same environment")
        if gap > checkpoints.REBUILD_TOLERANCE:
            problems.append(f"{name}: capability {gap:.1f} points apart")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare a rebuild with the shipped files, change nothing"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(checkpoints.SEEDS), help="with --check: some only"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=checkpoints.FOLDER)
    parser.add_argument("--one-seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seeds != list(checkpoints.SEEDS) and not args.check:
        parser.error("--seeds goes with --check: the manifest describes all seeds")
    if args.one_seed is not None:
        build_seed(args.one_seed, args.out)
    elif args.check:
        with tempfile.TemporaryDirectory() as folder:
            problems = compare(build(args.seeds, Path(folder), args.workers), checkpoints.read_manifest())
        sys.exit("\n".join(problems) or 0)
    else:
        write_json(args.out / checkpoints.MANIFEST, build(args.seeds, args.out, args.workers))


if __name__ == "__main__":
    main()
