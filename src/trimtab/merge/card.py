"""The model card of a merge: how it was made, from what, with which seed."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from trimtab import __version__
from trimtab.merge.plan import Plan

_TITLES = {
    "linear": "the weighted mean",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES merging",
    "dare_linear": "DARE",
    "dare_ties": "DARE with the election of TIES",
    "slerp": "spherical interpolation",
    "hma": "heterogeneous model averaging",
}


def model_card(plan: Plan, fingerprints: Sequence[str], name: str) -> str:
    """Return the text of the output's ``README.md``.

    Args:
        plan: the merge.
        fingerprints: of the plan's inputs.
        name: of the output.
    """
    config = plan.config
    head = {
        "library_name": "transformers",
        "tags": ["trimtab", "merge", config.method],
        "base_model": [str(model.label) for model in plan.inputs],
    }
    models = "\n".join(
        f"- `{model.label}`, fingerprint `{fingerprint}`"
        for model, fingerprint in zip(plan.inputs, fingerprints, strict=True)
    )
    seeded = f", masks drawn from seed {config.seed}" if config.method.startswith("dare") else ""
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}\n",
        f"Merged by trimtab {__version__}: {_TITLES[config.method]} ({plan.preset.source}), fidelity "
        f"`{config.fidelity}`{seeded}.\n",
        f"## Models\n\n{models}\n\nConfiguration and tokenizer are those of `{plan.inputs[plan.donor].label}`"
        + (", with the merge's vocabulary.\n" if plan.vocabulary is not None else ".\n"),
        "\n".join(["## Notes\n", *(f"- {note}" for note in plan.notes)]) + "\n" if plan.notes else "",
        f"## Recipe\n\n```yaml\n{config.text.rstrip()}\n```\n",
    ]
    return "\n".join(section for section in sections if section)
