"""The model card of a run: what was trained, on what, from what, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from trimtab.train.folder import RunFolder
from trimtab.train.parts import Parts

_NAMES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimization (arXiv 2305.18290)",
    "ipo": "Identity preference optimization (arXiv 2310.12036)",
    "kto": "Kahneman-Tversky optimization (arXiv 2402.01306)",
    "reward": "A reward model",
    "grpo": "Group relative policy optimization (arXiv 2402.03300)",
    "rloo": "REINFORCE leave-one-out (arXiv 2402.14740)",
    "rrhf": "Ranking responses by their log-probability (RRHF, arXiv 2304.05302)",
    "ppo": "Proximal policy optimization (PPO, arXiv 1707.06347)",
}
_MEASURED = (
    "loss",
    "loss/rank",
    "loss/ft",
    "rewards/accuracies",
    "rewards/margins",
    "kl",
    "accuracy",
    "margin",
    "mean_token_accuracy",
    "reward",
    "entropy",
    "response_length",
    "ended_by_eos",
    "completions/mean_length",
)


_OPTIMIZERS = {
    "adamw": "AdamW",
    "adafactor": "Adafactor (arXiv 1804.04235)",
    "adamw_8bit": "AdamW with 8-bit moments (arXiv 2110.02861)",
    "galore": "GaLore's AdamW (arXiv 2403.03507)",
    "ondare": "OnDARE",
    "onties": "OnTIES",
    "online_merging": "online merging",
}
_OF_TRL = "TRL's own numbers on the held-out rows: means of batch means"
_KINDS = {
    "rrhf": "means over the held-out prompts",
    "ppo": "means over sampled answers to the held-out prompts",
}
_TELLS_APART = (
    "They say how well the model tells the preferred answers apart, not how well it answers, and nothing of "
    "what it may have unlearnt."
)
_SCORED = (
    "They say what the reward that was trained for thinks of the model's answers, not how good these are, "
    "and nothing of what it may have unlearnt."
)


def model_card(folder: RunFolder, parts: Parts) -> str:
    """Return the text of the run's ``README.md``.

    Args:
        folder: the run folder, with its metrics and results.
        parts: what was trained.
    """
    recipe = parts.recipe
    head = yaml.safe_dump(
        {
            "library_name": "peft" if recipe.adapter or parts.policy.is_adapter else "transformers",
            "tags": ["trimtab", recipe.method],
        }
    )
    sections = [
        f"---\n{head}---\n\n# {folder.path.name}\n",
        f"{_NAMES[recipe.method]} of `{parts.policy.label}` with {_optimizer(parts)}, trained by trimtab.\n",
        _origin(parts),
        _data(folder.read_result("data")),
        _metrics(folder.metrics, _KINDS.get(recipe.method, _OF_TRL)),
        folder.read_result("rewards").get("summary", ""),
        "## Recipe\n\n```yaml\n"
        + yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)
        + "```\n",
    ]
    return "\n".join(section for section in sections if section)


def _optimizer(parts: Parts) -> str:
    section = parts.recipe.optimizer
    name = _OPTIMIZERS[section.name]
    if section.name == "online_merging":
        name += f" around {_OPTIMIZERS[section.plain]}"
    text = f"{name} (lr {section.lr:g}"
    if section.merges:
        text += f", merge weight {section.merge_weight:g}, reserve rate {section.reserve_rate or 1:g}"
        text += f", a merge every {section.merge_every or 1} steps, arXiv 2405.17931"
    text += ")"
    if section.ema is not None:
        text += f" and an EMA of the weights (c {section.ema.coefficient:g}), which is what `model/` holds"
    return text


def _origin(parts: Parts) -> str:
    """Where the reference, the base and the delta come from, with fingerprints where they were computed."""
    lines = []
    if parts.reference is not None:
        lines.append(f"- reference: `{parts.reference.label}`")
    if parts.delta is not None:
        for name, model in (("delta's reference", parts.delta.reference), ("delta's base", parts.delta.base)):
            lines.append(f"- {name}: `{model.source}`, fingerprint `{model.fingerprint}`")
        lines.append(f"- reference delta: fingerprint `{parts.delta.fingerprint}`")
    return "## Models\n\n" + "\n".join(lines) + "\n" if lines else ""


def _data(counts: dict[str, Any]) -> str:
    lines = [
        "## Data\n",
        "Rows that do not fit whole are dropped or truncated as the recipe says, and counted:\n",
    ]
    lines.append("```json\n" + json.dumps(counts, indent=2, ensure_ascii=False) + "\n```\n")
    return "\n".join(lines)


def _metrics(path: Path, kind: str) -> str:
    """The first and the last evaluation side by side; without any, the last training loss."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines()]
    evaluated = [record for record in records if not {"eval_loss", "eval_reward"}.isdisjoint(record)]
    lines = ["## Measured\n"]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        lines += [f"| held-out | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        for name in _MEASURED:
            if f"eval_{name}" in last:
                lines.append(f"| {name} | {_spell(first, name)} | {_spell(last, name)} |")
        lines.append("")
        says = _SCORED if "eval_reward" in last else _TELLS_APART
        lines.append(f"These are {kind}, without intervals. {says}\n")
        return "\n".join(lines)
    losses = [record for record in records if "loss" in record]
    if losses:
        lines.append(
            f"Training loss {losses[-1]['loss']:.4g} at step {losses[-1]['step']}. Nothing was held out.\n"
        )
        return "\n".join(lines)
    return ""


def _spell(record: dict[str, Any], name: str) -> str:
    value = record.get(f"eval_{name}")
    return "–" if value is None else f"{value:.4g}"
