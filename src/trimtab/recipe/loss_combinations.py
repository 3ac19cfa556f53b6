"""What a method's loss asks of the data, the batches and the evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.recipe.losses import DPOLoss, KTOLoss, PPOLoss, RewardLoss, RRHFLoss, SampledLoss
from trimtab.recipe.recipe import Recipe
from trimtab.yaml_file import Problem

NOT_FOR_PPO = {
    "torch_compile": "is not supported for method ppo, which reads hidden states inside of the model",
    "ddp_find_unused_parameters": "must be false for method ppo: its value head stands behind the model",
    "neftune_noise_alpha": "is not for method ppo: a response would have other probabilities at each reading",
}
"""Fields of the training section that PPO cannot honour, and why."""


def loss_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not fit together in a recipe's loss, data, training and evaluation."""
    loss = recipe.loss
    if isinstance(loss, DPOLoss) and loss.type == "exo_pair" and not loss.label_smoothing:
        yield Problem(("loss", "label_smoothing"), "must be above 0 for the loss exo_pair, e.g. 1e-3")
    if isinstance(loss, RewardLoss):
        yield from _scores_only(recipe)
    if isinstance(loss, RRHFLoss):
        yield from _ranked_responses(recipe)
    if isinstance(loss, SampledLoss):
        yield from _sampled_responses(recipe, loss)
    if isinstance(loss, PPOLoss):
        yield from _policy_optimization(recipe, loss)
    if isinstance(loss, KTOLoss):
        yield from _labelled_answers(recipe)
    elif _streams(recipe) and not _positive(recipe.training.get("max_steps")):
        yield Problem(
            ("training", "max_steps"),
            "is missing: with data.streaming the number of rows is not known beforehand",
        )
    if recipe.data.eval is None:
        if recipe.evaluation.every is not None:
            yield Problem(
                ("evaluation", "every"),
                "needs data.eval: there is nothing to measure on",
                also=(("data", "eval"),),
            )
        if recipe.evaluation.samples and not recipe.evaluation.prompts:
            yield Problem(
                ("evaluation", "samples"), "needs data.eval (or evaluation.prompts) to take prompts from"
            )


def _streams(recipe: Recipe) -> bool:
    return recipe.data.streaming and not isinstance(recipe.loss, RRHFLoss | SampledLoss)


def _labelled_answers(recipe: Recipe) -> Iterator[Problem]:
    """KTO's reference point is estimated from the other rows of the same batch, drawn up beforehand."""
    if recipe.data.streaming:
        yield Problem(
            ("data", "streaming"), "cannot go with method kto, whose rows are put into a random order first"
        )
    if _number(recipe.training.get("per_device_train_batch_size", 8)) == 1:
        yield Problem(
            ("training", "per_device_train_batch_size"),
            "must be at least 2 for method kto, which pairs each prompt with another row's answer",
        )
    strategy = recipe.training.get("train_sampling_strategy", "sequential")
    if strategy != "sequential":
        yield Problem(
            ("training", "train_sampling_strategy"),
            "must be sequential for method kto; its rows are shuffled once, by the seed",
        )


def _scores_only(recipe: Recipe) -> Iterator[Problem]:
    """A reward model gives no answers, and what is cut off an answer would not be scored."""
    for name in ("samples", "prompts"):
        if getattr(recipe.evaluation, name):
            yield Problem(
                ("evaluation", name), "is not for method reward, whose model scores and does not answer"
            )
    if recipe.data.overlong == "truncate":
        yield Problem(
            ("data", "overlong"),
            "must be drop for method reward: TRL leaves out what is too long, and never cuts",
        )


def _ranked_responses(recipe: Recipe) -> Iterator[Problem]:
    """A prompt's responses have different numbers of tokens, and a score is about a whole response."""
    if recipe.data.streaming:
        yield Problem(("data", "streaming"), "is not supported for method rrhf, whose rows are read at once")
    if recipe.data.overlong == "truncate":
        yield Problem(
            ("data", "overlong"), "must be drop for method rrhf: a score is about the whole response"
        )


def _sampled_responses(recipe: Recipe, loss: SampledLoss) -> Iterator[Problem]:
    """A prompt and its response share the room of one row; a loss on samples says nothing of their worth."""
    data, method = recipe.data, recipe.method
    if recipe.training.get("load_best_model_at_end") and not recipe.training.get("metric_for_best_model"):
        yield Problem(
            ("training", "metric_for_best_model"),
            f"is missing: method {method} has no loss that tells how good answers to held-out prompts are; "
            "name reward to keep the best",
            also=(("training", "load_best_model_at_end"),),
        )
    for name in ("train_sampling_strategy", "dataloader_drop_last"):
        if recipe.training.get(name):
            yield Problem(
                ("training", name),
                f"has no effect with method {method}, which orders prompts by itself",
            )
    if data.streaming:
        yield Problem(
            ("data", "streaming"), f"is not supported for method {method}, whose prompts are read at once"
        )
    if loss.max_new_tokens >= data.max_length:
        yield Problem(
            ("loss", "max_new_tokens"),
            f"is {loss.max_new_tokens} and leaves no room for a prompt; it must be below data.max_length, "
            f"{data.max_length}",
            also=(("data", "max_length"),),
        )


def _policy_optimization(recipe: Recipe, loss: PPOLoss) -> Iterator[Problem]:
    """A coefficient of 0 cannot be adapted, and the value head must be reached, by gradients and by masks."""
    child = recipe.optimizer.child_tuning
    if child is not None and child.variant == "D":
        yield Problem(
            ("optimizer", "child_tuning", "variant"),
            "must be F for method ppo: no instructions tell which weights of the value head matter, so that "
            "D would keep it where it starts",
        )
    if loss.kl_target is not None and loss.beta == 0:
        yield Problem(
            ("loss", "kl_target"),
            "cannot be reached from a beta of 0, which stays 0; start above it",
            also=(("loss", "beta"),),
        )
    for name, why in NOT_FOR_PPO.items():
        if recipe.training.get(name):
            yield Problem(("training", name), why)


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def _positive(value: object) -> bool:
    return (_number(value) or 0) > 0
