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
TEMPLATE = Path(__file__).with_name("real_run_page.md")
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


# -- collecting ---


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
        "environment": read_json(options.dpo / "environment.json"),
        "recipes": {name: recipe(folder) for name, folder in runs.items()},
        "data": {name: read_json(folder / "results" / "data.json") for name, folder in runs.items()},
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


def curves(folder: Path) -> dict[str, list[float]]:
    """The training curves, and when each step was logged (seconds since the first)."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [row for row in map(json.loads, lines) if "loss" in row]
    names = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm")
    found = {name: [row[name] for row in logs] for name in names if all(name in row for row in logs)}
    arrived_ = [row["merge/arrived_delta"] for row in logs if "merge/arrived_delta" in row]
    return {
        "step": [row["step"] for row in logs],
        "time": [round(row["time"] - logs[0]["time"], 1) for row in logs],
        "arrived": arrived_,
        **found,
    }


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


# -- numbers ---


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


# -- the page ---


def page(numbers: dict[str, Any]) -> str:
    """The whole page: the template with every number filled in."""
    template = TEMPLATE.read_text(encoding="utf-8")
    fields = {
        "numbers_file": NUMBERS,
        "picture": PICTURE,
        **described(numbers),
        **drift(numbers),
        **again(numbers),
    }
    return template.format(
        **fields,
        measured=measured(numbers),
        changes=changes(numbers),
        reading=reading(numbers),
        answers=answers(numbers),
    )


def described(numbers: dict[str, Any]) -> dict[str, Any]:
    """Sizes and settings of the two trainings."""
    sft, dpo = numbers["recipes"]["sft"], numbers["recipes"]["dpo"]
    base = numbers["models"]["base"]
    return {
        "pairs": len(base["chosen"]),
        "instructions": len(base["instructions"]),
        "sft_lr": sft["optimizer"]["lr"],
        "dpo_lr": dpo["optimizer"]["lr"],
        "sft_batch": sft["training"]["per_device_train_batch_size"],
        "dpo_batch": dpo["training"]["per_device_train_batch_size"],
        "beta": dpo["loss"]["beta"],
        "machine": machine(numbers["environment"]),
        **{f"{run}_steps": steps(numbers, run) for run in ("sft", "dpo")},
        **{f"{run}_kept": kept(numbers, run) for run in ("sft", "dpo")},
        **{f"{run}_minutes": minutes(numbers, run) for run in ("sft", "dpo")},
        **{f"{run}_seconds": seconds(numbers, run) for run in ("sft", "dpo")},
        "alone": sum(steps(numbers, run) * seconds(numbers, run)[0] for run in ("sft", "dpo")) / 60,
    }


def steps(numbers: dict[str, Any], run: str) -> int:
    """How many steps a run took."""
    return int(max(numbers["curves"][run]["step"]))


def kept(numbers: dict[str, Any], run: str) -> str:
    """How many rows were kept, in words."""
    report = numbers["data"][run]["train"]
    fit, read = (sum(source[key] for source in report["sources"]) for key in ("kept", "read"))
    return f"{fit:,} of {read:,} rows fit whole in {report['max_length']} tokens"


def minutes(numbers: dict[str, Any], run: str) -> float:
    """Minutes from the first logged step to the last."""
    times = numbers["curves"][run]["time"]
    return (times[-1] - times[0]) / 60


def seconds(numbers: dict[str, Any], run: str) -> tuple[float, float]:
    """Seconds of the fastest tenth of the steps (at most), and of the median step."""
    taken = np.diff(numbers["curves"][run]["time"])
    return float(np.quantile(taken, 0.1)), float(np.median(taken))


def machine(environment: dict[str, Any]) -> str:
    """One sentence on hardware and versions."""
    versions = environment["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("trimtab", "torch", "transformers", "trl"))
    where = f"{environment['device']}, {environment['threads']} threads ({environment['cpu_capability']})"
    return f"Device: {where}. {named}, Python {versions['python']}."


def drift(numbers: dict[str, Any]) -> dict[str, Any]:
    """What α·F(τ) added up to, and how far the policy went."""
    recipe_, went = numbers["recipes"]["dpo"], numbers["movement"]["policy"]
    alpha, p = recipe_["optimizer"]["merge_weight"], recipe_["optimizer"]["reserve_rate"]
    # A warm-up starts at lr 0, and that step moves nothing.
    count = steps(numbers, "dpo") - bool(recipe_["schedule"]["lr"]["warmup_steps"])
    control = numbers["movement"].get("control")
    return {
        "alpha": alpha,
        "p": p,
        "tau_norm": went["tau_norm"],
        "tau_share": went["tau_norm"] / went["base_norm"],
        "expected_drift": alpha * p * count,
        # Each entry collects a binomial number of draws of α: of τ's norm that is α·√((pT)² + p(1−p)T).
        "drift": alpha * math.sqrt((p * count) ** 2 + p * (1 - p) * count),
        "arrived": arrived(numbers),
        "distance": went["distance_in_tau"],
        "along": went["along_tau"],
        "control_moved": control_moved(control) if control else "",
    }


def control_moved(control: dict[str, float]) -> str:
    """How far the comparison went."""
    return f" (AdamW: {control['distance_in_tau']:.2f} ‖τ‖ and {control['along_tau']:+.4f} τ)"


def arrived(numbers: dict[str, Any]) -> str:
    """How much of α·F(τ) was not lost to rounding, at the steps where that was measured."""
    shares = numbers["curves"]["dpo"]["arrived"]
    if not shares:
        return ""
    times = "once" if len(shares) == 1 else f"{len(shares)} times"
    return f"Of α·F(τ) at least {min(shares):.1%} arrived (measured {times}); fp32 rounding took the rest."


def again(numbers: dict[str, Any]) -> dict[str, str]:
    """The commands that depend on whether there was a comparison with AdamW."""
    control = "control" in numbers["models"]
    runs = ["sft", "dpo", *(["adamw"] if control else [])]
    models = [("models/smollm2-135m-instruct", "runs/smollm2-base/results")]
    models += [(f"runs/smollm2-{run}/model", f"runs/smollm2-{run}/results") for run in runs]
    measure = [
        f"python scripts/measure_preferences.py {model} {out} \\\n"
        "    --pairs runs/data/hh/heldout.jsonl --instructions runs/data/dolly/heldout.jsonl"
        for model, out in models
    ]
    return {
        "measure_commands": "\n".join(measure),
        "control_option": " --control runs/smollm2-adamw" if control else "",
        "control_command": CONTROL if control else "",
    }


CONTROL = """
trimtab train recipes/smollm2-dpo.yaml data.train=runs/data/hh/train.jsonl output=runs/smollm2-adamw \\
    delta=null 'optimizer={name: adamw, lr: 1e-5}'     # the comparison: the same DPO with AdamW"""


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
    return markdown_table(head, body)


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
    return markdown_table(head, body)


def reading(numbers: dict[str, Any]) -> str:
    """What the intervals allow to say, each sentence decided by an interval."""
    models, beta = numbers["models"], numbers["recipes"]["dpo"]["loss"]["beta"]
    reference = Pairs(models["reference"])
    lines = []
    for name in (name for name in TUNED if name in models):
        margins = Pairs(models[name]).margins(reference, beta)
        found = change(models["reference"], models[name])
        lines += [
            f"Read with the intervals, {TITLES[name]}:",
            "",
            f"- Implicit reward prefers chosen: {against(share(margins > 0), 0.5, 'chance', percent)}.",
            f"- Its margin is {against(mean(margins), 0.0, 'zero', number)}.",
            f"- Preference accuracy by log-probability: {moved(found['accuracy'], points)}.",
            f"- Per token: {moved(found['accuracy_per_token'], points)}.",
            f"- Tax, as nats per token on held-out instructions: {tax(models, found)}.",
            "",
        ]
    return "\n".join(lines).strip()


def tax(models: dict[str, Any], found: dict[str, Interval]) -> str:
    """The tax, and as a share of what SFT had gained on the same rows where both are detectable."""
    said = moved(found["nll"], number)
    gained = change(models["base"], models["reference"])["nll"]
    if not gained.high < 0.0 < found["nll"].low:
        return said
    return f"{said}, which is {found['nll'].estimate / -gained.estimate:.1%} of what SFT had gained there"


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


def answers(numbers: dict[str, Any]) -> str:
    """Greedy answers of every model to the same questions."""
    models = numbers["models"]
    parts = []
    for at, first in enumerate(models["base"]["answers"]):
        parts.append(f"### {first['prompt']}")
        for name, model in models.items():
            text = model["answers"][at]["answer"]
            quoted = "\n".join(f"    {line}".rstrip() for line in text.splitlines()) or "    (nothing)"
            parts.append(f"{TITLES[name]}:\n\n{quoted}")
    return "\n\n".join(parts)


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


# -- the picture ---


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
