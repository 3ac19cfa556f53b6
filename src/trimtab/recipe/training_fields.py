"""The ``training`` section: names and types checked against the trainer's own config class, values cast."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic_core import PydanticCustomError

from trimtab.errors import UserError, nearest
from trimtab.recipe.values import as_count, as_flag, as_number
from trimtab.yaml_file import Places, Problem, refusal, spelled

OWNED: dict[str, str] = {
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.name",
    "optim_args": "optimizer",
    "optim_target_modules": "optimizer.groups",
    "lr_scheduler_type": "schedule.lr.type",
    "lr_scheduler_kwargs": "schedule.lr",
    "warmup_steps": "schedule.lr.warmup_steps",
    "warmup_ratio": "schedule.lr.warmup_ratio",
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "beta": "loss.beta",
    "loss_type": "loss.type",
    "loss_weights": "loss.sft_weight",
    "label_smoothing": "loss.label_smoothing",
    "desirable_weight": "loss.desirable_weight",
    "undesirable_weight": "loss.undesirable_weight",
    "center_rewards_coefficient": "loss.center_rewards",
    "max_completion_length": "loss.max_new_tokens",
    **{
        name: f"loss.{name}"
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "num_generations",
            "num_iterations",
            "epsilon",
            "epsilon_high",
            "scale_rewards",
            "normalize_advantages",
        )
    },
    "reward_weights": "loss.rewards",
    "completion_only_loss": "loss.completion_only",
    "packing": "loss.packing",
    "max_length": "data.max_length",
    "truncation_mode": "data.overlong",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "eval_on_start": "evaluation.at_start",
}
"""Fields of the trainer's config that another key of the recipe owns."""

REFUSED: dict[str, str] = {
    "trust_remote_code": "is off and stays off: a model may not bring code along",
    "resume_from_checkpoint": "is not a setting: run trimtab train with --resume",
    "do_train": "is not a setting: trimtab train trains",
    "do_eval": "is not a setting: give data.eval",
    "do_predict": "is not a setting: give evaluation.samples",
    "deepspeed": "is not supported: its optimizers hide the parameters that merging needs",
    "local_rank": "is not a setting: torchrun sets it",
}
"""Fields of the trainer's config that no recipe may set, and why."""

LEAST: dict[str, int] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_total_limit": 1,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
}
"""The least that makes sense in fields whose config class takes any number and fails on it later."""

ABOVE_ZERO = ("num_train_epochs", "max_steps", "save_steps", "logging_steps")
"""Fields that count what must happen; -1 for max_steps is transformers' word for "by epochs"."""

ALSO: dict[str, type] = {"fsdp": bool}
"""Types a field takes beyond its annotation: transformers' docs say ``fsdp=True``."""


def cast_training_arguments(
    values: Mapping[str, Any], config_class: type, owned: Mapping[str, str] = OWNED
) -> dict[str, Any]:
    """Return ``values`` with the types that ``config_class`` declares, ready to be passed to it.

    Args:
        values: what a recipe's ``training`` section holds.
        config_class: the dataclass of the trainer, such as TRL's DPOConfig.
        owned: fields that are written elsewhere in the recipe, and where.

    Raises:
        UserError: naming every unknown, owned or mistyped field.

    Examples:
        >>> @dataclasses.dataclass
        ... class Config:
        ...     max_grad_norm: float = 1.0
        >>> cast_training_arguments({"max_grad_norm": "1e-1"}, Config)
        {'max_grad_norm': 0.1}
    """
    cast, problems = check_training_fields(values, config_class, owned)
    if problems:
        raise refusal("recipe", problems, Places())
    return cast


def owned_problems(values: Mapping[str, Any], owned: Mapping[str, str] = OWNED) -> Iterator[Problem]:
    """Yield the fields that are not for the training section; needs no trainer to know."""
    for name in values:
        if name in REFUSED:
            yield Problem(("training", name), REFUSED[name])
        elif name in owned:
            yield Problem(("training", name), f"is written as {owned[name]}")


def check_training_fields(
    values: Mapping[str, Any], config_class: type, owned: Mapping[str, str] = OWNED
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the cast fields and everything that is wrong with the others."""
    problems = list(owned_problems(values, owned))
    hints = get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class) if field.init and field.name[0] != "_"]
    usable = [name for name in known if name not in owned and name not in REFUSED]
    cast: dict[str, Any] = {}
    for name, value in values.items():
        if name in owned or name in REFUSED:
            continue
        if name not in known:
            problems.append(Problem(("training", name), _unknown(name, config_class, usable, owned)))
            continue
        try:
            cast[name] = _cast(value, hints[name] | ALSO[name] if name in ALSO else hints[name])
            problems += _out_of_range(name, cast[name])
        except UserError as error:
            problems.append(Problem(("training", name), str(error)))
    return cast, problems


def _out_of_range(name: str, value: Any) -> list[Problem]:
    if isinstance(value, bool) or not isinstance(value, int | float) or (name, value) == ("max_steps", -1):
        return []
    if name in LEAST and value < LEAST[name]:
        return [Problem(("training", name), f"must be at least {LEAST[name]}, not {value}")]
    if name in ABOVE_ZERO and value <= 0:
        return [Problem(("training", name), f"must be above 0, not {value}")]
    return []


def _unknown(name: str, config_class: type, usable: list[str], owned: Mapping[str, str]) -> str:
    close = nearest(name, [*usable, *owned])
    hint = ""
    if close is not None:
        hint = f"; did you mean {owned.get(close, f'training.{close}')}?"
    return f"is not a field of {config_class.__name__}{hint}"


def _cast(value: Any, hint: Any) -> Any:
    """Return ``value`` as the first of the hint's types that takes it."""
    options = _options(hint)
    for option in options:
        taken, result = _taken(value, option)
        if taken:
            return result
    words = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
    if words and isinstance(value, str):
        known = [str(member.value) for word in words for member in word]
        close = nearest(value, known)
        hint_text = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"must be one of {words[0].__name__}'s words, not {value!r}; {hint_text}")
    raise UserError(f"must be {' or '.join(_spoken(option) for option in options)}, not {spelled(value)}")


def _options(hint: Any) -> list[Any]:
    """The members of a union; text last, and not at all beside an enumeration, whose words are the texts."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
        members = [member for member in members if member is not str]
    return sorted(members, key=lambda member: (member is str, member is float, member is int))


def _taken(value: Any, option: Any) -> tuple[bool, Any]:
    scalar = {bool: as_flag, int: as_count, float: _as_number_kept}.get(option)
    try:
        if scalar is not None:
            return True, scalar(value)
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return True, option(value).value
    except (PydanticCustomError, ValueError):
        return False, None
    if get_origin(option) is Literal:
        return value in get_args(option), value
    if get_origin(option) is list or option is list:
        return _taken_list(value, get_args(option))
    if get_origin(option) is tuple:
        return _taken_tuple(value, get_args(option))
    if option is type(None):
        return value is None, None
    plain = get_origin(option) or option
    return option is Any or (isinstance(plain, type) and isinstance(value, plain)), value


def _taken_list(value: Any, items: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    if not items:
        return True, list(value)
    taken = [_taken(item, items[0]) for item in value]
    return all(ok for ok, _ in taken), [item for _, item in taken]


def _as_number_kept(value: Any) -> int | float:
    """A number for a float field; whole numbers stay whole, since fields such as save_steps count steps."""
    number = as_number(value)
    return value if isinstance(value, int) else number


def _taken_tuple(value: Any, items: tuple[Any, ...]) -> tuple[bool, Any]:
    """As many values as there are types; they stay a list, as YAML writes and reads it."""
    if not isinstance(value, list | tuple) or len(value) != len(items):
        return False, None
    taken = [_taken(item, kind) for item, kind in zip(value, items, strict=True)]
    return all(ok for ok, _ in taken), [item for _, item in taken]


def _spoken(option: Any) -> str:
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        list: "a list",
        type(None): "null",
    }
    kind = get_origin(option) or option
    if kind is tuple:
        return f"a list of {len(get_args(option))}"
    if kind is Literal:
        return " or ".join(spelled(word) for word in get_args(option))
    return names.get(kind) or str(getattr(kind, "__name__", kind))
