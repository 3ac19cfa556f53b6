"""What a parameter is for one tensor: the precedence of levels, filters by name, gradients over the layers.

The rules are mergekit's, so that its configurations mean here what they mean there. ``ratio`` alone, which
mergekit does not have, is constant over blocks of layers where it is a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import UserError
from trimtab.merge.methods import Parameter
from trimtab.yaml_file import Key, Problem, WrongValue, flag_in, number_in, spelled

if TYPE_CHECKING:
    from trimtab.merge.config import MergeConfig, Slice, Source

Scalar = float | bool


@dataclass(frozen=True)
class Condition:
    """A value for the tensors that a filter lets through.

    Args:
        filter: a part of the tensor's name; None or ``*`` for every tensor.
        value: a value, or a list of them over the layers.
    """

    filter: str | None
    value: Scalar | tuple[Scalar, ...]

    def holds_for(self, tensor_name: str) -> bool:
        """Whether the filter lets a tensor of this name through."""
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


Setting = Scalar | tuple[Scalar, ...] | tuple[Condition, ...]
"""A value, a list of them over the layers, or conditions, the first of which that holds counts."""


@dataclass(frozen=True)
class Position:
    """Where a tensor stands among the layers of a slice.

    Args:
        index: the layer's place, from 0.
        count: how many layers the slice has.
        where: in a layer, or before the first one, or after the last one.
    """

    index: int = 0
    count: int = 1
    where: Literal["layer", "before", "after"] = "layer"

    @property
    def t(self) -> float:
        """Where on a gradient the layer stands: 0 for the first, 1 for the last and for an only one.

        What stands before or after the layers is at 0, as in mergekit.
        """
        if self.where != "layer":
            return 0.0
        return self.index / (self.count - 1) if self.count > 1 else 1.0

    def block(self, blocks: int) -> int:
        """Return which of ``blocks`` blocks of equally many consecutive layers the layer is in.

        What stands before the layers is in the first block, and what stands after them in the last.

        Examples:
            >>> [layer_position(index, 4).block(3) for index in range(4)]
            [0, 0, 1, 2]
        """
        if self.where != "layer":
            return 0 if self.where == "before" else blocks - 1
        return self.index * blocks // self.count


BEFORE_LAYERS = Position(where="before")
"""Of what stands before a model's layers: its embeddings, tied ones too."""

AFTER_LAYERS = Position(where="after")
"""Of what stands after a model's layers: its last norm and its head."""


def layer_position(index: int, count: int) -> Position:
    """Return the position of layer ``index`` among the ``count`` layers of its slice.

    Examples:
        >>> [layer_position(index, 3).t for index in range(3)], layer_position(0, 1).t
        ([0.0, 0.5, 1.0], 1.0)
    """
    assert 0 <= index < count, (index, count)
    return Position(index, count)


def value_of(
    config: MergeConfig,
    slice_: Slice,
    source: Source | None,
    parameter: Parameter,
    tensor_name: str,
    position: Position,
) -> Scalar:
    """Return what ``parameter`` is for one tensor.

    The source's parameters come first (for what has a value for each input), then the slice's, then those of
    the whole configuration; a level whose conditions all fail is passed over. Then comes the default.

    Args:
        config: the configuration.
        slice_: one of its slices.
        source: the input; None for a shared parameter, which is never looked for there.
        parameter: as :func:`trimtab.merge.methods.parameters_of` gives it.
        tensor_name: what filters look into: the input's own tensor's name for a parameter of an input, the
            output's for a shared one.
        position: where the tensor stands in the slice.

    Raises:
        UserError: no level gives a value and there is no default, or a list of blocks is longer than the
            layers are many.
    """
    for level in _levels(config, slice_, source, parameter):
        if parameter.name in level:
            value = value_at(level[parameter.name], parameter, tensor_name, position)
            if value is not None:
                return value
    if parameter.default is None:
        whose = f" of {str(source.model)!r}" if source is not None and parameter.scope != "shared" else ""
        raise UserError(
            f"{parameter.name} has no value for the tensor {tensor_name!r}{whose}: no filter lets it "
            f"through; add a last item without a filter, such as - value: 1.0, or {parameter.name} under "
            "parameters"
        )
    return parameter.default


def _levels(
    config: MergeConfig, slice_: Slice, source: Source | None, parameter: Parameter
) -> Iterator[Mapping[str, Setting]]:
    if source is not None and parameter.scope != "shared":
        yield source.parameters
    yield slice_.parameters
    yield config.parameters


def value_at(setting: Setting, parameter: Parameter, tensor_name: str, position: Position) -> Scalar | None:
    """Return what ``setting`` says for one tensor; None if none of its conditions holds.

    Examples:
        >>> density = Parameter("density", "number", "non_base")
        >>> value_at((0.2, 0.4, 1.0), density, "layers.1.mlp", layer_position(1, 5))
        0.30000000000000004
        >>> value_at((Condition("mlp", 0.5),), density, "layers.1.norm", layer_position(1, 5)) is None
        True
    """
    if not isinstance(setting, tuple):
        return setting
    for item in setting:
        if not isinstance(item, Condition):
            break
        if item.holds_for(tensor_name):
            return value_at(item.value, parameter, tensor_name, position)
    values = tuple(item for item in setting if not isinstance(item, Condition))
    return _on(values, parameter, position) if values else None


def _on(values: tuple[Scalar, ...], parameter: Parameter, position: Position) -> Scalar:
    """The value of a list at a position."""
    if parameter.kind == "blocks":
        if position.where == "layer" and len(values) > position.count:
            raise UserError(
                f"{parameter.name} lists {len(values)} blocks, and there are {position.count} layers; give "
                "at most one value for each layer"
            )
        return values[position.block(len(values))]
    scaled = position.t * (len(values) - 1)
    low = int(scaled)
    if parameter.kind == "flag":
        return values[low]
    share = scaled - low
    return (1 - share) * values[low] + share * values[min(len(values) - 1, low + 1)]


def read_setting(value: Any, parameter: Parameter, key: Key, problems: list[Problem]) -> Setting:
    """Read what was written for a parameter.

    Args:
        value: a value, a list of values, a condition (``{filter, value}``) or a list of conditions.
        parameter: whose it is.
        key: where it was written.
        problems: takes what is wrong.

    Returns:
        The setting; an empty tuple where it is wrong.
    """
    if isinstance(value, dict):
        read = [_read_condition(value, parameter, key, problems)]
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        read = [_read_condition(item, parameter, (*key, place), problems) for place, item in enumerate(value)]
    else:
        return _read_values(value, parameter, key, problems)
    return tuple(condition for condition in read if condition is not None)


def _read_condition(item: Any, parameter: Parameter, key: Key, problems: list[Problem]) -> Condition | None:
    if not isinstance(item, dict):
        message = f"must be a mapping with value and filter, as its neighbours are, not {spelled(item)}"
        problems.append(Problem(key, message))
        return None
    for name in item:
        if name not in ("filter", "value"):
            message = "is not a key of a condition; known here: filter, value"
            problems.append(Problem((*key, str(name)), message))
    name = item.get("filter")
    if name is not None and (not isinstance(name, str) or not name):
        message = f"must be text that a tensor's name holds, or '*' for all, not {spelled(name)}"
        problems.append(Problem((*key, "filter"), message))
    if "value" not in item:
        problems.append(Problem((*key, "value"), "is missing"))
        return None
    return Condition(name, _read_values(item["value"], parameter, (*key, "value"), problems))


def _read_values(
    value: Any, parameter: Parameter, key: Key, problems: list[Problem]
) -> Scalar | tuple[Scalar, ...]:
    if not isinstance(value, list | tuple):
        read = _read_scalar(value, parameter, key, problems)
        return () if read is None else read
    if not value:
        problems.append(Problem(key, "must not be empty"))
    items = [_read_scalar(item, parameter, (*key, index), problems) for index, item in enumerate(value)]
    return tuple(item for item in items if item is not None)


def _read_scalar(value: Any, parameter: Parameter, key: Key, problems: list[Problem]) -> Scalar | None:
    try:
        if parameter.kind == "flag":
            return _flag(value)
        number = number_in(value)
        if number < parameter.low:
            raise WrongValue(f"must be at least {parameter.low:g}", value)
        if number > parameter.high:
            raise WrongValue(f"must be at most {parameter.high:g}", value)
    except WrongValue as error:
        problems.append(Problem(key, str(error)))
        return None
    return number


def _flag(value: Any) -> bool:
    """A boolean; 0, 1 and text that spells a boolean count too, as they do in mergekit."""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return flag_in(value)
