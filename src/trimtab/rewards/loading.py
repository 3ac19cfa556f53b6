"""From what a recipe or a command line names to a reward: everything is found before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from trimtab.errors import UserError
from trimtab.model_folder import ModelFolder, find_model, load_model, load_tokenizer
from trimtab.named_function import function_named, names_function
from trimtab.recipe import RewardSource
from trimtab.recipe.problems import problems_of
from trimtab.rewards.likelihood import RRHFScorer
from trimtab.rewards.model import check_reward_model, load_reward_model
from trimtab.rewards.reward import Reward, WeightedSum
from trimtab.rewards.rule import Rule
from trimtab.yaml_file import dotted

Sources = str | RewardSource | Mapping[str, Any] | Sequence[str | RewardSource | Mapping[str, Any]]
"""One source or several: as a recipe writes them, or as :class:`~trimtab.recipe.RewardSource`."""


def load_reward(
    source: Sources,
    *,
    key: str = "reward",
    device: str | torch.device | None = None,
    dtype: Any = torch.float32,
    batch_size: int = 8,
) -> Reward:
    """Load a reward: a reward model, a likelihood scorer, a rule, or the weighted sum of several.

    Args:
        source: one source or several; a text is a rule where it is written ``module:function``, else the
            folder or hub id of a reward model.
        key: where the user named it, for errors.
        device: where models are put; the GPU where there is one when None.
        dtype: of the models' weights. In bf16, what a row is batched with moves its score a little.
        batch_size: rows (for a likelihood: prompts) in one forward pass.

    Returns:
        The reward; for several sources, or a weight other than 1, a :class:`WeightedSum`.

    Raises:
        UserError: if a source is not there or is no reward, before any model is loaded.

    Examples:
        >>> load_reward("operator:concat").name
        'operator:concat'
    """
    total = load_rewards(source, key=key, device=device, dtype=dtype, batch_size=batch_size)
    return total.parts[0] if total.weights == (1.0,) else total


def load_rewards(
    sources: Sources,
    *,
    key: str = "rewards",
    device: str | torch.device | None = None,
    dtype: Any = torch.float32,
    batch_size: int = 8,
) -> WeightedSum:
    """Load rewards as :func:`load_reward` does, always as a sum, for whoever logs the parts' means."""
    given = reward_sources(sources)
    loaders = find_rewards(given, key=key)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = [load(device=device, dtype=dtype, batch_size=batch_size) for load in loaders]
    return WeightedSum(tuple(parts), tuple(source.weight for source in given))


def find_rewards(sources: Sources, *, key: str = "rewards") -> list[Callable[..., Reward]]:
    """Find what sources name: rules are imported, of models only the configuration and headers are read.

    Args:
        sources: as for :func:`load_reward`.
        key: where the user named them, for errors.

    Returns:
        What loads each, called with ``device``, ``dtype`` and ``batch_size``.

    Raises:
        UserError: if a source is not there or is no reward.
    """
    given = reward_sources(sources)
    names = model_names([source.source for source in given])
    return [_find(source, name, key) for source, name in zip(given, names, strict=True)]


def reward_sources(sources: Sources) -> tuple[RewardSource, ...]:
    """Return sources in whatever way they are written as :class:`~trimtab.recipe.RewardSource`.

    Raises:
        UserError: if there is none, or one is written wrongly.
    """
    several = isinstance(sources, Sequence) and not isinstance(sources, str)
    listed = list(sources) if several else [sources]
    if not listed:
        raise UserError("no reward is named; name a reward model, a likelihood scorer or a rule")
    try:
        return tuple(RewardSource.model_validate(one) for one in listed)
    except ValidationError as error:
        problem = next(problems_of(error, RewardSource))
        raise UserError(f"{dotted(('reward', *problem.key))} {problem.message}") from None


def model_names(paths: Sequence[str]) -> list[str]:
    """Return what to call models: the last part of a path; the whole where two share that; then numbers.

    Examples:
        >>> model_names(["runs/a/model", "org/judge", "x/rm", "y/rm"])
        ['a/model', 'judge', 'x/rm', 'y/rm']
    """
    short = [path if names_function(path) else _last(path) for path in paths]
    names = [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name}#{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def _last(path: str) -> str:
    """The name of a model folder; ``model`` of a run folder says nothing, so the run's name comes before."""
    parts = Path(path).parts
    return "/".join(parts[-2:]) if parts[-1:] == ("model",) else (parts[-1] if parts else path)


def _find(source: RewardSource, name: str, key: str) -> Callable[..., Reward]:
    if source.rule is not None:
        rule = Rule(function_named(source.rule, key), name)
        return lambda **_: rule
    found = find_model(source.source, key)
    if source.model is not None:
        check_reward_model(found)
        return partial(load_reward_model, found, name=name)
    return partial(_load_likelihood, found, name=name)


def _load_likelihood(
    found: ModelFolder, *, device: str | torch.device, dtype: Any, name: str, batch_size: int
) -> RRHFScorer:
    tokenizer = load_tokenizer(found)
    model = load_model(found, {"dtype": dtype}, trainable=False)
    model.to(device)
    try:
        return RRHFScorer(model, tokenizer, name=name, batch_size=batch_size)
    except UserError:  # it cannot read a prompt once for all its responses
        return RRHFScorer(model, tokenizer, name=name, batch_size=batch_size, layout="repeated")
