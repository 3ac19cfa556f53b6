"""Offline merging against mergekit and against copying the same bytes: time, processor time, memory.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install mergekit==0.1.5 torch==2.13.0
    python benchmarks/merge.py --peer /tmp/peer/bin/python

Three random Llama-shaped models (a base and two that differ from it) are written once. Each method then runs
in turn, both sides in one run: as whole processes, and without their imports (ours: ``trimtab merge``, and a
worker that has imported everything; mergekit's: such a worker, which is timed as a whole, too). Files are in
the page cache: ``cat`` of the inputs and ``cp`` of an output say what moving the bytes costs. Both sides get
the same configuration; ours runs with ``fidelity: mergekit``, that is, it computes the same numbers, and
``ties`` also as the paper has it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml

from trimtab.merge.writer import Entry, Shard, ShardWriter

RESULT = Path(__file__).parent / "results" / "merge.json"

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
METHODS = ("linear", "ties", "ties, paper", "dare_linear", "dare_ties")

OURS = """
import json, os, sys, time
import trimtab.merge.run, trimtab.merge.command
config, out = sys.argv[1:]
own = [line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")]
wall, cpu = time.perf_counter(), time.process_time()
trimtab.merge.run.merge(config, out)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, int(own[0]) * 1024]))
"""
THEIRS = """
import json, logging, sys, time
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
logging.disable(logging.WARNING)
config, out = sys.argv[1:]
import transformers.models.llama.modeling_llama
own = [line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")]
wall, cpu = time.perf_counter(), time.process_time()
merge = MergeConfiguration.model_validate(yaml.safe_load(open(config)))
run_merge(merge, out, MergeOptions(quiet=True, copy_tokenizer=False))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, int(own[0]) * 1024]))
"""
GRID = OURS.replace("merge.run.merge(config", "merge.sweep.sweep(config").replace(
    "import trimtab.merge.run,", "import trimtab.merge.sweep,"
)


@dataclass
class Run:
    """What one process took: seconds, processor seconds, and the most memory of its own, in bytes."""

    wall: float
    cpu: float
    anonymous: int
    resident: int
    inner: tuple[float, float, int] | None = None
    """Without the imports: seconds, processor seconds, and the memory that the imports had taken."""


def entries(shape: dict[str, Any], dtype: torch.dtype) -> list[Entry]:
    """The tensors of a Llama of a shape, with tied embeddings."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    found = [("model.embed_tokens.weight", (shape["vocab_size"], hidden))]
    for layer in range(shape["num_hidden_layers"]):
        own = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, wide),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (keys, hidden),
        }
        found += [(f"model.layers.{layer}.{name}.weight", size) for name, size in own.items()]
    found.append(("model.norm.weight", (hidden,)))
    return [Entry(name, size, dtype) for name, size in found]


def make_models(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> list[Path]:
    """Write a base and two models that differ from it as fine-tuning makes them differ."""
    names = ("base", "one", "other")
    paths = [folder / name for name in names]
    listed = entries(shape, dtype)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
        **shape,
    }
    writers = []
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        writers.append(ShardWriter(path, Shard("model.safetensors", tuple(listed))).__enter__())
    generator = torch.Generator().manual_seed(0)
    for entry in listed:
        count = prod(entry.shape)
        base = torch.randn(count, generator=generator) * 0.02
        writers[0].write(base.to(dtype))
        for writer in writers[1:]:
            writer.write((base + torch.randn(count, generator=generator) * 1e-3).to(dtype))
    for writer in writers:
        writer.__exit__(None, None, None)
    return paths


def configuration(method: str, models: Sequence[Path]) -> dict[str, Any]:
    """What both sides are asked for."""
    name, _, fidelity = method.partition(", ")
    base, *others = models
    values: dict[str, Any] = {"merge_method": name}
    if name == "linear":
        values["models"] = [{"model": str(one), "parameters": {"weight": 0.5}} for one in models]
    else:
        density = {} if name == "task_arithmetic" else {"density": 0.5}
        values["base_model"] = str(base)
        values["models"] = [{"model": str(one), "parameters": {"weight": 0.5, **density}} for one in others]
    return values | ({"fidelity": fidelity or "mergekit"})


def measured(command: Sequence[str], *, inner: bool = False) -> Run:
    """Run a process and watch its memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out_file, tempfile.TemporaryFile("w+") as error_file:
        process = subprocess.Popen(command, env=environment, stdout=out_file, stderr=error_file)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        out, errors = (file.seek(0) or file.read() for file in (out_file, error_file))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} …: {errors[-2000:]}")
    run = Run(wall, usage.ru_utime + usage.ru_stime, peak[0], usage.ru_maxrss * 1024)
    if inner:
        run.inner = tuple(json.loads(out.splitlines()[-1]))
    return run


def _watch(pid: int, peak: list[int]) -> None:
    """Keep the largest anonymous memory of a process."""
    path = Path(f"/proc/{pid}/status")
    while True:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            return
        found = [line for line in lines if line.startswith("RssAnon")]
        if not found:
            return
        peak[0] = max(peak[0], int(found[0].split()[1]) * 1024)
        time.sleep(0.005)


class Bench:
    """The cells of one shape and dtype.

    Args:
        folder: a folder of its own, for models and outputs.
        models: base and two others.
        peer: Python with mergekit; None runs ours alone.
    """

    def __init__(self, folder: Path, models: Sequence[Path], peer: str | None) -> None:
        self._folder, self._models, self._peer = folder, models, peer

    def cell(self, method: str, repeats: int) -> dict[str, Any]:
        """Run one method on both sides in turn; medians, and the ratios of each turn."""
        values = configuration(method, self._models)
        ours, theirs = self._folder / "ours.yaml", self._folder / "theirs.yaml"
        ours.write_text(yaml.safe_dump(values))
        theirs.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "fidelity"}))
        runs: dict[str, list[Run]] = {"ours": [], "ours inner": [], "theirs": []}
        moving = []
        for _ in range(repeats):
            trimtab = [sys.executable, "-m", "trimtab", "merge", str(ours)]
            runs["ours"].append(self._run(trimtab))
            moving.append(self._copy())
            runs["ours inner"].append(self._run([sys.executable, "-c", OURS, str(ours)], inner=True))
            if self._peer and "paper" not in method:
                runs["theirs"].append(self._run([self._peer, "-c", THEIRS, str(theirs)], inner=True))
        return {
            "method": method,
            "runs": {name: [asdict(run) for run in some] for name, some in runs.items()},
            "copying": moving,
        }

    def grid(self, repeats: int) -> dict[str, Any]:
        """A sweep of fifteen points beside one merge, ours alone."""
        config = self._folder / "ours.yaml"
        config.write_text(yaml.safe_dump(configuration("ties, paper", self._models)))
        runs: dict[str, list[Run]] = {"one": [], "fifteen": []}
        for _ in range(repeats):
            for name, script in (("one", OURS), ("fifteen", GRID)):
                runs[name].append(self._run([sys.executable, "-c", script, str(config)], inner=True))
                shutil.rmtree(self._folder / "out")
        pairs = [
            (one.inner, fifteen.inner) for one, fifteen in zip(runs["one"], runs["fifteen"], strict=True)
        ]
        line = {
            "one, s": f"{statistics.median(one[0] for one, _ in pairs):.2f}",
            "fifteen, s": f"{statistics.median(fifteen[0] for _, fifteen in pairs):.2f}",
            "×": _spread([fifteen[0] / one[0] for one, fifteen in pairs]),
            "CPU ×": _spread([fifteen[1] / one[1] for one, fifteen in pairs]),
        }
        return {"runs": {name: [asdict(run) for run in some] for name, some in runs.items()}, "line": line}

    def _run(self, command: Sequence[str], *, inner: bool = False) -> Run:
        out = self._folder / "out"
        shutil.rmtree(self._folder / "kept", ignore_errors=True)
        if out.exists():
            out.rename(self._folder / "kept")
        return measured([*command, str(out)], inner=inner)

    def _copy(self) -> tuple[float, float]:
        """Seconds and processor seconds of reading the inputs and copying the output."""
        inputs = " ".join(str(path / "model.safetensors") for path in self._models)
        copy = self._folder / "copy"
        run = measured(
            ["sh", "-c", f"cat {inputs} > /dev/null; cp {self._folder / 'out' / 'model.safetensors'} {copy}"]
        )
        copy.unlink()
        return run.wall, run.cpu


def summary(cell: dict[str, Any]) -> dict[str, str]:
    """The line of a table."""
    runs = cell["runs"]

    def middle(name: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[name])

    def inner(name: str, which: int) -> list[float]:
        return [run["inner"][which] for run in runs[name]]

    def grown(name: str) -> float:
        return statistics.median(run["anonymous"] - run["inner"][2] for run in runs[name]) / 1e6

    copying = [cpu for _, cpu in cell["copying"]]
    line = {
        "whole, s": f"{middle('ours', 'wall'):.2f}",
        "work, s": f"{statistics.median(inner('ours inner', 0)):.2f}",
        "work, CPU s": f"{statistics.median(inner('ours inner', 1)):.2f}",
        "cat + cp, CPU s": f"{statistics.median(copying):.2f}",
        "÷ cat + cp": _spread([a / b for a, b in zip(inner("ours inner", 1), copying, strict=True)]),
        "memory, MB": f"{grown('ours inner'):.0f}",
    }
    if runs["theirs"]:
        pairs = list(zip(runs["theirs"], runs["ours"], strict=True))
        line |= {
            "mergekit whole, s": f"{middle('theirs', 'wall'):.2f}",
            "mergekit work, s": f"{statistics.median(inner('theirs', 0)):.2f}",
            "whole, ×": _spread([theirs["wall"] / ours["wall"] for theirs, ours in pairs]),
            "work, ×": _ratios(inner("theirs", 0), inner("ours inner", 0)),
            "work, CPU ×": _ratios(inner("theirs", 1), inner("ours inner", 1)),
            "mergekit's memory, MB": f"{grown('theirs'):.0f}",
        }
    return line


def _ratios(above: Sequence[float], below: Sequence[float]) -> str:
    return _spread([a / b for a, b in zip(above, below, strict=True)])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run the cells that are asked for and keep them beside those of earlier runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="a Python that has mergekit; without it ours alone is measured")
    parser.add_argument("--shapes", nargs="+", default=["135M"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grid", action="store_true", help="a sweep of fifteen points beside one merge")
    parser.add_argument("--scratch", help="a folder for models and outputs (13 GB for 1B in float32)")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for shape in given.shapes:
        for dtype in given.dtypes:
            with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
                folder = Path(scratch)
                models = make_models(folder / "models", SHAPES[shape], getattr(torch, dtype))
                bench = Bench(folder, models, given.peer)
                cells = {"grid": bench.grid} if given.grid else {}
                for method in () if given.grid else given.methods:
                    cells[method] = partial(bench.cell, method)
                for method, measure in cells.items():
                    cell = measure(given.repeats)
                    cell["line"] = cell.get("line") or summary(cell)
                    results.setdefault(f"{shape}, {dtype}", {})[method] = cell
                    line = json.dumps(cell["line"], ensure_ascii=False)
                    print(f"{shape}, {dtype}, {method}: {line}", flush=True)
                    given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
