"""What a resumed run may change: how often it reports and saves, never what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import IncompatibleState
from trimtab.recipe.losses import GRPOLoss, RLOOLoss
from trimtab.recipe.recipe import Recipe
from trimtab.yaml_file import Key, dotted, spelled

MAY_DIFFER: tuple[Key, ...] = (
    ("output",),
    # Not evaluation.every: each pass over the held-out rows draws from the random state that dropout uses.
    *(("evaluation", name) for name in ("samples", "prompts", "max_new_tokens")),
    *(
        ("training", name)
        for name in (
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "disable_tqdm",
            "report_to",
            "run_name",
            "project",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "skip_memory_metrics",
            "push_to_hub",
            "hub_model_id",
            "hub_token",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "ddp_timeout",
        )
    ),
)
"""Keys a resumed run may set otherwise: reporting, saving, measuring, and where the run folder is now."""


@dataclass(frozen=True)
class Difference:
    """One key on which two recipes differ."""

    key: str
    before: Any
    after: Any
    allowed: bool
    """Whether a resumed run may differ here."""


def recipe_differences(before: Recipe, after: Recipe) -> list[Difference]:
    """Return the keys on which two recipes differ, and whether a resumed run may differ there.

    Args:
        before: the recipe the run was started with.
        after: the recipe it is to be resumed with.

    Examples:
        >>> from trimtab.recipe.loading import make_recipe
        >>> values = {"method": "sft", "model": "org/model", "data": {"train": "org/rows"}, "output": "out"}
        >>> other = {**values, "optimizer": {"lr": 1e-3}, "training": {"logging_steps": 5}}
        >>> [(d.key, d.allowed) for d in recipe_differences(make_recipe(values), make_recipe(other))]
        [('optimizer.lr', False), ('training.logging_steps', True)]
    """
    old, new = _leaves(before.resolved()), _leaves(after.resolved())
    return [
        Difference(dotted(key), old.get(key), new.get(key), _may_differ(key, after))
        for key in sorted({*old, *new}, key=dotted)
        if old.get(key) != new.get(key)
    ]


def refuse_differences(before: Recipe, after: Recipe) -> None:
    """Refuse to resume a run with a recipe that would train otherwise.

    Raises:
        IncompatibleState: naming every key that differs and may not.
    """
    refused = [difference for difference in recipe_differences(before, after) if not difference.allowed]
    if refused:
        listed = ", ".join(
            f"{item.key} (was {spelled(item.before)}, now {spelled(item.after)})" for item in refused
        )
        raise IncompatibleState(
            f"the run cannot be resumed with another recipe: {listed}; set them back or start anew"
        )


def _may_differ(key: Key, recipe: Recipe) -> bool:
    draws_while_measuring = isinstance(recipe.loss, GRPOLoss | RLOOLoss)  # from the training's random numbers
    if draws_while_measuring and key == ("training", "per_device_eval_batch_size"):
        return False
    return any(key[: len(allowed)] == allowed for allowed in MAY_DIFFER)


def _leaves(value: Any, key: Key = ()) -> dict[Key, Any]:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return {key: value}
    return {leaf: item for part, inner in items for leaf, item in _leaves(inner, (*key, part)).items()}
