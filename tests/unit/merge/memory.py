"""Run as a script: how much memory of its own a merge takes, for a model and for one of twice its size.

Prints, in chunks, what the process has beyond what it had after a small merge: pages of files that are
mapped do not count (RssAnon). The largest tensor has 8 chunks, then 16.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from trimtab.merge import arithmetic, merge, run
from trimtab.merge.config import read_config

CHUNK = 1 << 21


def write(folder: Path, seed: int, counts: list[int]) -> None:
    """Write a model of random numbers, a block at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header, at = {}, 0
    for number, count in enumerate(counts):
        header[f"t{number:03}"] = {"dtype": "F32", "shape": [count], "data_offsets": [at, at + 4 * count]}
        at += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator, block = torch.Generator().manual_seed(seed), torch.empty(1 << 18)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(0, at, block.numel() * 4):
            file.write(block.uniform_(-1, 1, generator=generator).numpy().data)


def own() -> int:
    """Bytes of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak(work: Callable[[], object]) -> int:
    """The most that the process had while it worked."""
    done, seen = threading.Event(), [own()]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(own())

    watching = threading.Thread(target=watch)
    watching.start()
    work()
    done.set()
    watching.join()
    return max(seen)


def merging(place: Path, method: str, counts: list[int]) -> Callable[[], object]:
    for number in range(2):
        write(place / str(number), number, counts)
    values: dict[str, object] = {"merge_method": method, "base_model": str(place / "0")}
    own_parameters = {"slerp": {}, "task_arithmetic": {"weight": 0.5}}
    each = own_parameters.get(method, {"weight": 0.5, "density": 0.3})
    values["models"] = [{"model": str(place / "1"), "parameters": each}]
    if method == "slerp":
        values["parameters"] = {"t": 0.5}
    config = read_config(values)
    return lambda: merge(config, place / "out", overwrite=True)


def trim() -> None:
    """Give back what was freed, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def taken(work: Callable[[], object]) -> int:
    """Bytes that the work takes at most; on a busy machine some are given back later than on another."""
    trim()
    before = own()
    return peak(work) - before


def main() -> None:
    place, methods = Path(sys.argv[1]), sys.argv[2:]
    run.CHUNK, arithmetic.CHUNK = CHUNK, CHUNK // 8  # as they are to each other
    torch.set_num_threads(2)
    for method in methods:
        merging(place / f"{method}-small", method, [3 * CHUNK])()
        used = []
        for size in (1, 2):
            work = merging(place / f"{method}-{size}", method, [8 * size * CHUNK] + [CHUNK // 4] * 8 * size)
            used.append(min(taken(work) for _ in range(2)) / (4 * CHUNK))
        print(method, *used)


if __name__ == "__main__":
    main()
