#!/usr/bin/env python
"""Writes docs/real-run.md from what a real run left behind; nothing on that page is typed by hand.

    python scripts/write_real_run.py --collect      # runs/ -> docs/assets/real-run.json, then the page
    python scripts/write_real_run.py                # the page and its picture again, from that JSON alone

The JSON holds every number the page needs, pair by pair, so that intervals can be recomputed by anyone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import UserError
from trimtab.evaluate import Interval, paired_bootstrap, wilson
from trimtab.files import replacing_file, write_text

DOCS = Path("docs")
NUMBERS = Path("assets/real-run.json")
PICTURE = Path("assets/real-run.png")
PAGE = Path("real-run.md")
TITLES = {
    "base": "published model",
    "reference": "after SFT",
    "policy": "after DPO, OnDARE",
    "control": "after DPO, AdamW",
}
TUNED = ("policy", "control")
"""Models that started from the reference and saw the preferences."""


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and write, turning a user's mistake into one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--collect", action="store_true", help="read the runs again first")
    parser.add_argument(
        "--base", type=Path, default=Path("runs/smollm2-base"), help="holds the base's results/"
    )
    parser.add_argument("--base-model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--sft", type=Path, default=Path("runs/smollm2-sft"), help="run folder of the SFT")
    parser.add_argument("--delta", type=Path, default=Path("runs/smollm2-delta"), help="the reference delta")
    parser.add_argument("--dpo", type=Path, default=Path("runs/smollm2-dpo"), help="run folder of the DPO")
    parser.add_argument("--control", type=Path, help="run folder of the same DPO with AdamW")
    parser.add_argument("--docs", type=Path, default=DOCS, help="documentation folder to write into")
    options = parser.parse_args(argv)
    try:
        if options.collect:
            write_text(options.docs / NUMBERS, packed(collect(options)))
        numbers = read_json(options.docs / NUMBERS)
        draw(numbers, options.docs / PICTURE)
        write_text(options.docs / PAGE, page(numbers))
    except UserError as error:
        print(f"write_real_run: {error}", file=sys.stderr)
        return 2
    return 0


# -- collecting -------------------------------------------------------------------------------------------------


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Gather everything the page says from the run folders."""
    folders = {"base": options.base, "reference": options.sft, "policy": options.dpo}
    runs = {"sft": options.sft, "dpo": options.dpo}
    if options.control:
        folders["control"], runs["control"] = options.control, options.control
    models = {name: results(folder / "results") for name, folder in folders.items()}
    same_rows(models)
    moved = {
        name: movement(folders[name], options.sft, options.base_model) for name in TUNED if name in folders
    }
    return {
        "environment": environment(read_json(options.dpo / "environment.json")),
        "recipes": {name: recipe(folder) for name, folder in runs.items()},
        "data": {
            name: read_json(folder / "data.json")
            for name, folder in runs.items()
            if (folder / "data.json").exists()
        },
        "curves": {name: curves(folder) for name, folder in runs.items()},
        "movement": moved,
        "models": models,
    }


def results(folder: Path) -> dict[str, Any]:
    """The three result files of one model, as short rows."""
    pairs, instructions = read_json(folder / "preferences.json"), read_json(folder / "instructions.json")
    return {
        "ids": [row["id"] for row in pairs["rows"]],
        "instruction_ids": [row["id"] for row in instructions["rows"]],
        "chosen": [[row["chosen"]["logp"], row["chosen"]["tokens"]] for row in pairs["rows"]],
        "rejected": [[row["rejected"]["logp"], row["rejected"]["tokens"]] for row in pairs["rows"]],
        "instructions": [
            [row["completion"]["logp"], row["completion"]["tokens"]] for row in instructions["rows"]
        ],
        "data": {"pairs": pairs["data"], "instructions": instructions["data"]},
        "answers": read_json(folder / "answers.json")["rows"],
    }


def same_rows(models: dict[str, Any]) -> None:
    """Refuse to compare models that were measured on different rows."""
    first = models["base"]
    for name, model in models.items():
        for key in ("ids", "instruction_ids"):
            if model[key] != first[key]:
                raise UserError(
                    f"{name} and base were measured on different rows ({key}); measure both again"
                )


def recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe a run was made with."""
    import yaml

    values: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    # Names only: where somebody keeps their data is nobody's business.
    for entry in values["data"]["train"]:
        entry["path"] = Path(entry["path"]).name
    return {key: values[key] for key in ("method", "loss", "optimizer", "schedule", "training", "seed")} | {
        "data": {"train": values["data"]["train"], "max_length": values["data"]["max_length"]}
    }


def environment(values: dict[str, Any]) -> dict[str, Any]:
    """The part of environment.json that belongs on a page."""
    return values


def curves(folder: Path) -> dict[str, list[float]]:
    """The training curves, and when each step was logged (seconds since the first)."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [row for row in map(json.loads, lines) if "loss" in row]
    names = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm")
    found = {name: [row[name] for row in logs] for name in names if all(name in row for row in logs)}
    return {"step": [row["step"] for row in logs], "time": [row["time"] for row in logs], **found}


def movement(run: Path, sft: Path, base_model: Path) -> dict[str, float]:
    """How far the policy went from the reference, in lengths of τ, and how far of that along τ.

    Streams over three files, one parameter at a time, summing in float64.
    """
    from safetensors import safe_open

    paths = [folder / "model.safetensors" for folder in (run / "model", sft / "model", base_model)]
    sums = np.zeros(4)
    policy, reference, base = (safe_open(path, framework="pt") for path in paths)
    for name in base.keys():  # noqa: SIM118 - safe_open is not a mapping
        b, r, p = (file.get_tensor(name).double() for file in (base, reference, policy))
        tau, step = r - b, p - r
        sums += [
            tau.square().sum().item(),
            step.square().sum().item(),
            (tau * step).sum().item(),
            b.square().sum().item(),
        ]
    tau2, step2, along, base2 = sums
    return {
        "tau_norm": math.sqrt(tau2),
        "base_norm": math.sqrt(base2),
        "distance_in_tau": math.sqrt(step2 / tau2),
        "along_tau": along / tau2,
    }


def read_json(path: Path) -> Any:
    """Read a JSON file, or say which one is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; docs/real-run.md lists the commands that make it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def packed(value: Any) -> str:
    """JSON with one line per innermost list: short, and still readable in a diff."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return squeeze(text) + "\n"


def squeeze(text: str) -> str:
    """Join the lines of innermost lists of an indented JSON text."""
    import re

    return re.sub(
        r"\[\s*([^\[\]{}]*?)\s*\]", lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]", text
    )


# -- numbers ----------------------------------------------------------------------------------------------------


class Pairs:
    """One model's log-probabilities of the held-out pairs, and what follows from them."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.chosen, self.chosen_tokens = np.array(model["chosen"], dtype=np.float64).T
        self.rejected, self.rejected_tokens = np.array(model["rejected"], dtype=np.float64).T

    def prefers(self) -> np.ndarray:
        """1 where the chosen answer is the more probable one, else 0."""
        return (self.chosen > self.rejected).astype(np.float64)

    def prefers_per_token(self) -> np.ndarray:
        """1 where the chosen answer has the higher mean log-probability per token."""
        return (self.chosen / self.chosen_tokens > self.rejected / self.rejected_tokens).astype(np.float64)

    def margins(self, reference: Pairs, beta: float) -> np.ndarray:
        """DPO's implicit reward margins, β·[(log π − log π_ref)(chosen) − (…)(rejected)]."""
        return beta * ((self.chosen - reference.chosen) - (self.rejected - reference.rejected))


def per_token(model: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood per token of each held-out instruction's answer, and its tokens as weights."""
    logp, tokens = np.array(model["instructions"], dtype=np.float64).T
    return -logp / tokens, tokens


def share(outcomes: np.ndarray) -> Interval:
    """Wilson interval of a 0/1 outcome."""
    return wilson(int(outcomes.sum()), len(outcomes))


def mean(values: np.ndarray) -> Interval:
    """Bootstrap interval of a mean."""
    return paired_bootstrap(np.zeros_like(values).tolist(), values.tolist())


def change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Interval]:
    """Paired changes from one model to another."""
    first, second = Pairs(before), Pairs(after)
    nll, weights = per_token(before)
    return {
        "accuracy": paired_bootstrap(first.prefers().tolist(), second.prefers().tolist()),
        "accuracy_per_token": paired_bootstrap(
            first.prefers_per_token().tolist(), second.prefers_per_token().tolist()
        ),
        "nll": paired_bootstrap(nll.tolist(), per_token(after)[0].tolist(), weights=weights.tolist()),
    }


# -- the page ---------------------------------------------------------------------------------------------------


def page(numbers: dict[str, Any]) -> str:
    """The whole page."""
    parts = [opening(numbers), commands(numbers), measured(numbers), changes(numbers), reading(numbers)]
    parts += [training(numbers), answers(numbers), limits(numbers)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def opening(numbers: dict[str, Any]) -> str:
    """What this page is."""
    pairs, rows = len(numbers["models"]["base"]["chosen"]), len(numbers["models"]["base"]["instructions"])
    return f"""
<!-- Written by scripts/write_real_run.py from {NUMBERS}; change those, not this page. -->
# A real run

A real model, real instructions, real human preferences, small enough for two CPU cores: SmolLM2-135M-Instruct gets
{steps(numbers, "sft")} steps of supervised fine-tuning, which makes a reference with a reference delta τ, and then
{steps(numbers, "dpo")} steps of DPO with OnDARE. It is the check that everything works together on real input; it is
far too small to say which optimizer is better. Whatever it shows is written here, "no detectable change" included.

**What "base" means here.** Not a pretrained model: the *published instruct model*, whose weights were dequantized from a
Q4_1 GGUF file (not the original bf16 release). τ is what our few steps of SFT changed, so it is small.

Measured on {pairs} held-out preference pairs and {rows} held-out instructions that no step of training saw; questions
that share their first turn are on one side of the split. Intervals are 95 %: Wilson for shares, bootstrap over prompts
for means, paired where two models are compared."""


def steps(numbers: dict[str, Any], run: str) -> int:
    """How many steps a run took."""
    return int(max(numbers["curves"][run]["step"]))


def commands(numbers: dict[str, Any]) -> str:
    """How to do it again."""
    control = (
        """
trimtab train recipes/smollm2-dpo.yaml data.train=data/hh/train.jsonl \\
    optimizer='{name: adamw, lr: 1e-5}' output=runs/smollm2-adamw        # the comparison"""
        if "control" in numbers["models"]
        else ""
    )
    names = {"base": ("models/smollm2-135m-instruct", "runs/smollm2-base")}
    names |= {name: (f"runs/smollm2-{name}/model", f"runs/smollm2-{name}") for name in ("sft", "dpo")}
    if control:
        names["adamw"] = ("runs/smollm2-adamw/model", "runs/smollm2-adamw")
    measure = "\n".join(
        f"python scripts/measure_preferences.py {model} {run}/results \\\n"
        "    --pairs data/hh/heldout.jsonl --instructions data/dolly/heldout.jsonl"
        for model, run in names.values()
    )
    option = " --control runs/smollm2-adamw" if control else ""
    return f"""
## The commands

`HH` is Anthropic's `harmless-base/test.jsonl.gz` (MIT), `DOLLY` the rows of Databricks' Dolly that the AlpaGasus rating
kept, as JSON lines (CC BY-SA 3.0); both were given without every eleventh row or as they were published.

```sh
python scripts/get_smollm2.py
python scripts/split_heldout.py "$DOLLY" data/dolly --heldout 0.1
python scripts/split_heldout.py "$HH" data/hh --heldout 0.34

trimtab train recipes/smollm2-sft.yaml data.train=data/dolly/train.jsonl
trimtab delta --reference runs/smollm2-sft/model --base models/smollm2-135m-instruct runs/smollm2-delta
trimtab train recipes/smollm2-dpo.yaml data.train=data/hh/train.jsonl{control}

{measure}
python scripts/write_real_run.py --collect{option}
```"""


def measured(numbers: dict[str, Any]) -> str:
    """The table of every model on its own."""
    models, beta = numbers["models"], numbers["recipes"]["dpo"]["loss"]["beta"]
    pairs = {name: Pairs(model) for name, model in models.items()}
    margins = {name: pairs[name].margins(pairs["reference"], beta) for name in TUNED if name in pairs}
    nothing = dict.fromkeys(models, "–")
    table = [
        ("chosen answer more probable", {n: percent(share(p.prefers())) for n, p in pairs.items()}),
        ("… per token", {n: percent(share(p.prefers_per_token())) for n, p in pairs.items()}),
        ("implicit reward prefers chosen", nothing | {n: percent(share(m > 0)) for n, m in margins.items()}),
        (f"implicit reward margin (β = {beta})", nothing | {n: number(mean(m)) for n, m in margins.items()}),
        ("perplexity, held-out instructions", {n: f"{perplexity(m):.2f}" for n, m in models.items()}),
    ]
    head = ["held out", *(TITLES[name] for name in models)]
    body = [[title, *(cells[name] for name in models)] for title, cells in table]
    return "## What came out\n\n" + markdown_table(head, body)


def perplexity(model: dict[str, Any]) -> float:
    """exp of the mean negative log-likelihood per token over all tokens."""
    nll, tokens = per_token(model)
    return math.exp(float((nll * tokens).sum() / tokens.sum()))


def changes(numbers: dict[str, Any]) -> str:
    """The table of paired changes."""
    models = numbers["models"]
    steps_taken = [("base", "reference"), *(("reference", name) for name in TUNED if name in models)]
    if "control" in models:
        steps_taken.append(("control", "policy"))
    body = []
    for before, after in steps_taken:
        found = change(models[before], models[after])
        body.append(
            [
                f"{TITLES[before]} → {TITLES[after]}",
                points(found["accuracy"]),
                points(found["accuracy_per_token"]),
                number(found["nll"]),
            ]
        )
    head = ["change", "chosen more probable, points", "… per token, points", "nats per token on instructions"]
    return (
        "The same, as paired differences (a lower negative log-likelihood on instructions is better):\n\n"
        + markdown_table(head, body)
    )


def reading(numbers: dict[str, Any]) -> str:
    """What the intervals allow to say, each sentence decided by an interval."""
    models, beta = numbers["models"], numbers["recipes"]["dpo"]["loss"]["beta"]
    reference = Pairs(models["reference"])
    lines = []
    for name in (name for name in TUNED if name in models):
        margins = Pairs(models[name]).margins(reference, beta)
        found = change(models["reference"], models[name])
        lines += [
            f"**{TITLES[name]}:**",
            f"implicit reward on held-out pairs: {against(share(margins > 0), 0.5, 'chance', percent)};",
            f"margin {against(mean(margins), 0.0, 'zero', number)};",
            f"preference accuracy by log-probability: {moved(found['accuracy'], points)};",
            f"per token: {moved(found['accuracy_per_token'], points)};",
            f"tax, seen as nats per token on held-out instructions: {moved(found['nll'], number)}.",
            "",
        ]
    return "**Read with the intervals**\n\n" + "\n".join(lines)


def against(found: Interval, value: float, what: str, shown: Any) -> str:
    """Say whether an interval lies clear of a value."""
    if not found.excludes(value):
        return f"{shown(found)}, not distinguishable from {what}"
    return f"{shown(found)}, {'above' if found.estimate > value else 'below'} {what}"


def moved(found: Interval, shown: Any) -> str:
    """Say whether a paired difference is detectable."""
    if not found.excludes(0.0):
        return f"no detectable change ({shown(found)})"
    return f"{'up' if found.estimate > 0 else 'down'}, {shown(found)}"


def training(numbers: dict[str, Any]) -> str:
    """Curves, settings, drift and times."""
    recipe_, moved_ = numbers["recipes"]["dpo"], numbers["movement"]["policy"]
    optimizer = recipe_["optimizer"]
    alpha, p, count = optimizer["merge_weight"], optimizer["reserve_rate"], steps(numbers, "dpo")
    # Each entry collects a binomial number of draws of α: mean α·p·T, so the norm is α·√((pT)² + p(1−p)T) of τ's.
    drift = alpha * math.sqrt((p * count) ** 2 + p * (1 - p) * count)
    control = numbers["movement"].get("control")
    aside = f" (AdamW: {control['along_tau']:+.3f})" if control else ""
    return f"""
## Training

![Loss of SFT, loss and margin of DPO, step by step]({PICTURE})

SFT: AdamW, lr {numbers["recipes"]["sft"]["optimizer"]["lr"]:g}, batches of
{numbers["recipes"]["sft"]["training"]["per_device_train_batch_size"]},
{minutes(numbers, "sft"):.1f} minutes. DPO: OnDARE, lr {optimizer["lr"]:g}, p = {p:g}, α = {alpha:g},
β = {recipe_["loss"]["beta"]:g}, batches of {recipe_["training"]["per_device_train_batch_size"]} pairs,
{minutes(numbers, "dpo"):.1f} minutes of steps. {machine(numbers)}

**Drift.** ‖τ‖ is {moved_["tau_norm"]:.3f}, {moved_["tau_norm"] / moved_["base_norm"]:.2%} of the length of the weights.
α and p were chosen so that Σ α·F(τ) comes to about {drift:.3f} ‖τ‖ over the run (α·p·T = {alpha * p * count:.3f}). In the
end the policy lies {moved_["distance_in_tau"]:.2f} ‖τ‖ from the reference; along τ itself it moved by
{moved_["along_tau"]:+.3f} τ{aside}, the preference gradient's own part included."""


def minutes(numbers: dict[str, Any], run: str) -> float:
    """Minutes from the first logged step to the last."""
    times = numbers["curves"][run]["time"]
    return (times[-1] - times[0]) / 60


def machine(numbers: dict[str, Any]) -> str:
    """One sentence on hardware and versions."""
    return json.dumps(numbers["environment"])


def answers(numbers: dict[str, Any]) -> str:
    """Greedy answers of every model to the same questions."""
    models = numbers["models"]
    parts = ["## Answers\n\nGreedy, at most 64 new tokens, cut where the limit cut them."]
    for at, first in enumerate(models["base"]["answers"]):
        parts.append(f"### {first['prompt']}")
        for name, model in models.items():
            text = model["answers"][at]["answer"]
            quoted = "\n".join(f"    {line}".rstrip() for line in text.splitlines()) or "    (nothing)"
            parts.append(f"{TITLES[name]}:\n\n{quoted}")
    return "\n\n".join(parts)


def limits(numbers: dict[str, Any]) -> str:
    """What this run cannot show."""
    return """
## What this cannot show

One model, one seed, one small set of pairs, most of them harmful questions with two poor answers. Preference accuracy
by log-probability measures which of two given texts a model finds more likely, not how well it answers. The tax is seen
through one number, the likelihood of held-out human answers; abilities were not tested."""


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def percent(found: Interval) -> str:
    """A share as 57.9 % [51.2, 64.4]."""
    return f"{found.estimate:.1%} [{found.low * 100:.1f}, {found.high * 100:.1f}]".replace("%", " %")


def points(found: Interval) -> str:
    """A difference of shares in percentage points."""
    return f"{found.estimate * 100:+.1f} [{found.low * 100:+.1f}, {found.high * 100:+.1f}]"


def number(found: Interval) -> str:
    """A signed number."""
    return f"{found.estimate:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


# -- the picture ------------------------------------------------------------------------------------------------


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Draw the training curves: single steps pale, a running mean of ten on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    dpo = {"OnDARE": numbers["curves"]["dpo"], "AdamW": numbers["curves"].get("control")}
    panel(axes[0], "SFT: loss (nats per token)", {"AdamW": numbers["curves"]["sft"]}, "loss", ["#666666"])
    panel(axes[1], "DPO: loss", dpo, "loss", ["#0b6e8a", "#c0722b"])
    panel(axes[2], "DPO: reward margin of the batch", dpo, "rewards/margins", ["#0b6e8a", "#c0722b"])
    axes[2].legend(frameon=False)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def panel(axis: Any, title: str, runs: dict[str, Any], key: str, colours: list[str]) -> None:
    """One panel with every run's curve."""
    for (name, curve), colour in zip(runs.items(), colours, strict=True):
        if curve is None:
            continue
        values = np.array(curve[key], dtype=np.float64)
        axis.plot(curve["step"], values, color=colour, alpha=0.25, linewidth=1)
        axis.plot(curve["step"], running_mean(values), color=colour, linewidth=2, label=name)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)


def running_mean(values: np.ndarray, width: int = 10) -> np.ndarray:
    """Mean of the last ``width`` values (fewer at the start)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)


if __name__ == "__main__":
    sys.exit(main())
