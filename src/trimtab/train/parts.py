"""What a training is put together from, found and checked before any weights are loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from trimtab.data import PreparedData, load_data
from trimtab.delta import ReferenceDelta
from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder, find_model, load_tokenizer
from trimtab.recipe import Recipe, SampledLoss
from trimtab.rewards.ranked_batches import encode_ranked
from trimtab.terminal import is_first_process
from trimtab.train.arguments import training_arguments
from trimtab.train.models import load_delta, refuse_other_shape
from trimtab.train.optimizers import OptimizerPlan
from trimtab.train.prompt_checks import check_sampling
from trimtab.train.regularisers import Regularisers


@dataclass(frozen=True)
class Parts:
    """The parts of one training.

    Args:
        recipe: the recipe.
        arguments: the trainer's arguments.
        tokenizer: the policy's tokenizer.
        policy: where the policy starts.
        reference: what the policy is compared with; None for methods without one.
        delta: the reference delta; None for optimizers that do not merge.
        data: training rows and what was dropped.
        held_out_data: the same for the held-out rows; None without them.
        plan: the optimizer to build.
    """

    recipe: Recipe
    arguments: Any
    tokenizer: Any
    policy: ModelFolder
    reference: ModelFolder | None
    delta: ReferenceDelta | None
    data: PreparedData
    held_out_data: PreparedData | None
    plan: OptimizerPlan

    @property
    def train(self) -> Any:
        """The training rows."""
        return self.data.dataset

    @property
    def held_out(self) -> Any:
        """The held-out rows, or None."""
        return None if self.held_out_data is None else self.held_out_data.dataset

    @property
    def model_settings(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that the recipe gives."""
        return dict(self.recipe.training.get("model_init_kwargs") or {})


def gather_parts(recipe: Recipe, *, resumes: bool) -> Parts:
    """Find and check everything a training needs; reads data, tokenizer and the headers of weights.

    Args:
        recipe: a checked recipe.
        resumes: whether a checkpoint is to be continued.

    Raises:
        UserError: for whatever is missing or does not fit.
    """
    policy, reference = find_models(recipe)
    tokenizer = load_tokenizer(policy)
    arguments = training_arguments(recipe, evaluates=recipe.data.eval is not None, resumes=resumes)
    if recipe.data.streaming and arguments.max_steps <= 0:
        raise UserError(
            "data.streaming reads rows as they come, so training.max_steps must say how many steps to take"
        )
    with arguments.distributed_state.main_process_first():  # the first fills the cache that the others read
        data = _load(recipe, "train", tokenizer)
        held_out = _load(recipe, "eval", tokenizer) if recipe.data.eval else None
        regularisers = Regularisers.from_recipe(recipe, tokenizer)
    if isinstance(recipe.loss, SampledLoss):
        check_sampling(recipe.loss, arguments, policy, data, *([held_out] if held_out else []))
    delta = load_delta(recipe, policy)
    return Parts(
        recipe=recipe,
        arguments=arguments,
        tokenizer=tokenizer,
        policy=policy,
        reference=reference,
        delta=delta,
        data=data,
        held_out_data=held_out,
        plan=OptimizerPlan.from_recipe(recipe, delta, regularisers),
    )


def find_models(recipe: Recipe) -> tuple[ModelFolder, ModelFolder | None]:
    """Find the policy and, where the method has one, the reference."""
    if recipe.model is None:
        raise UserError(f"model is missing: method {recipe.method} needs the model to start from")
    policy = find_model(recipe.model, recipe.key_of_model(), recipe.base)
    if policy.is_adapter and recipe.adapter is not None:
        raise UserError(
            f"model {policy.label!r} is an adapter already, so the recipe's adapter cannot be added to it; "
            "leave adapter out to train it further, or merge it into its model first"
        )
    if policy.is_adapter and recipe.optimizer.plain == "galore":
        raise UserError(
            f"galore projects whole matrices to a low rank, and those of the adapter {policy.label!r} are of "
            "low rank already; take adamw"
        )
    if policy.is_adapter and recipe.method == "reward":
        raise UserError(
            f"model {policy.label!r} is an adapter of a language model, which has no place for a score; "
            "merge it into its model first, and make a reward model of that"
        )
    if not recipe.needs_reference or recipe.reference is None:
        return policy, None
    same = recipe.reference == recipe.model
    reference = policy if same else find_model(recipe.reference, "reference", recipe.base)
    refuse_other_shape(policy, reference)
    return policy, reference


def _load(recipe: Recipe, part: str, tokenizer: Any) -> PreparedData:
    loss = recipe.loss
    return load_data(
        recipe.data,
        method=recipe.method,
        part=part,
        tokenizer=tokenizer,
        seed=recipe.seed,
        progress=sys.stderr.isatty() and is_first_process(),
        encode=encode_ranked,
        response_budget=loss.max_new_tokens if isinstance(loss, SampledLoss) else 0,
    )
