"""From a file and overrides to a checked recipe: all that is wrong is said at once, before a model loads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from trimtab.errors import nearest
from trimtab.recipe.combinations import combination_problems
from trimtab.recipe.paths import path_problems
from trimtab.recipe.problems import problems_of
from trimtab.recipe.reading import lay_over, read_recipe_file
from trimtab.recipe.recipe import METHODS, Recipe, SFTRecipe
from trimtab.recipe.training_fields import check_training_fields, owned_problems
from trimtab.yaml_file import Key, Places, Problem, refusal, spelled

ConfigClass = Callable[[str], type]
"""From a method's name to the trainer's config class (only ``trimtab.train`` knows it)."""

_STAND_INS: dict[str | int, Any] = {
    "data": {"train": "org/name"},
    "train": "org/name",
    "path": "org/name",
    "pattern": ".",
    "output": "output",
}


def load_recipe(
    path: str | os.PathLike[str], overrides: Iterable[str] = (), *, config_class: ConfigClass | None = None
) -> Recipe:
    """Read a recipe's file, lay the overrides over it, and check it in full.

    Args:
        path: a YAML file.
        overrides: ``key=value`` texts, dotted keys, values in YAML.
        config_class: gives the trainer's config class of a method, against which the ``training`` section is
            checked and cast; without it only the fields that belong elsewhere are refused there.

    Raises:
        UserError: naming everything that is wrong, each with its line or override and the nearest valid name.
    """
    file = read_recipe_file(path)
    values = lay_over(file.values, file.places, overrides)
    return _checked(values, str(path), Places(file.places), file.twice, config_class)


def make_recipe(values: dict[str, Any], *, config_class: ConfigClass | None = None) -> Recipe:
    """Check a recipe given as plain values, as :func:`load_recipe` checks one from a file.

    Examples:
        >>> values = {"method": "sft", "model": "org/model", "data": {"train": "org/rows"}, "output": "out"}
        >>> recipe = make_recipe(values)
        >>> recipe.loss.packing, make_recipe(recipe.resolved()) == recipe
        (False, True)
    """
    return _checked(values, "recipe", Places(), [], config_class)


def _checked(
    values: dict[str, Any],
    source: str,
    places: Places,
    known: Sequence[Problem],
    config_class: ConfigClass | None,
) -> Recipe:
    problems = [*known]
    model, values, wrong_method = _method(values)
    problems += wrong_method
    recipe, wrong, touched = _validated(model, values)
    problems += wrong
    if wrong_method:
        touched.append(("method",))
    if recipe is not None:
        cast, mistyped = _training(recipe, None if wrong_method else config_class)
        later = [*_later(recipe, bool(wrong_method)), *mistyped]
        problems += [problem for problem in later if not _doubtful(problem, touched)]
        recipe = recipe.model_copy(update={"training": cast})
    if problems or recipe is None:
        raise refusal(source, problems, places)
    return recipe


def _later(recipe: Recipe, method_unknown: bool) -> Iterator[Problem]:
    if not method_unknown:
        yield from combination_problems(recipe)
    yield from path_problems(recipe)


def _method(values: dict[str, Any]) -> tuple[type[Recipe], dict[str, Any], list[Problem]]:
    """Return the class of the method; for an unknown one a stand-in, so that the rest is checked too."""
    name = values.get("method")
    if isinstance(name, str) and name in METHODS:
        return METHODS[name], values, []
    known = ", ".join(METHODS)
    if name is None:
        message = f"is missing; known: {known}"
    elif not isinstance(name, str):
        message = f"must be text, not {spelled(name)}; known: {known}"
    else:
        close = nearest(name, METHODS)
        message = f"{spelled(name)} is not known; " + (
            f"did you mean {close}?" if close else f"known: {known}"
        )
    rest = {key: value for key, value in values.items() if key not in ("method", "loss")}
    return SFTRecipe, {**rest, "method": "sft"}, [Problem(("method",), message)]


def _validated(model: type[Recipe], values: dict[str, Any]) -> tuple[Recipe | None, list[Problem], list[Key]]:
    """Validate ``values``; where keys are wrong, validate once more without them.

    So that everything can be said at once, what is wrong is taken out (and what is missing stood in for) and
    the rest goes on to the later checks; ``touched`` are the keys that those must not speak about.
    """
    problems: list[Problem] = []
    touched: list[Key] = []
    for _ in range(4):
        try:
            return model.model_validate(values), problems, touched
        except ValidationError as error:
            found = [problem for problem in problems_of(error, model) if not _doubtful(problem, touched)]
            problems += found
            for details in reversed(error.errors(include_url=False)):  # from the end: places in lists stay
                key = tuple(details["loc"])
                values = _repaired(values, key, missing=details["type"] == "missing")
                touched.append(key)
            touched += [key for problem in found for key in problem.also]
    return None, problems, touched


def _repaired(values: Any, key: Key, *, missing: bool) -> Any:
    """Return ``values`` without ``key``, or with a stand-in for a missing one."""
    if not key:
        return values
    part, rest = key[0], key[1:]
    if isinstance(part, int) and not isinstance(values, list | tuple):
        return _repaired(values, rest, missing=missing)
    if isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
        repaired = [_repaired(values[part], rest, missing=missing)] if rest else []
        return [*values[:part], *repaired, *values[part + 1 :]]
    if not isinstance(values, dict):
        return values
    without = {name: value for name, value in values.items() if name != part}
    if rest and part in values:
        return {**without, part: _repaired(values[part], rest, missing=missing)}
    return {**without, part: _STAND_INS.get(part)} if missing else without


def _doubtful(problem: Problem, touched: Sequence[Key]) -> bool:
    """Whether a problem speaks of a key that was itself wrong, so that it may only be an echo."""
    keys = (problem.key, *problem.also)
    return any(one[: len(other)] == other[: len(one)] for one in keys for other in touched)


def _training(recipe: Recipe, config_class: ConfigClass | None) -> tuple[dict[str, Any], list[Problem]]:
    if config_class is None or not recipe.training:
        return recipe.training, list(owned_problems(recipe.training))
    return check_training_fields(recipe.training, config_class(recipe.method))
