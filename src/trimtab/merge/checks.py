"""What is wrong with the values of the models that are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.merge.arithmetic import Read, is_finite
from trimtab.merge.plan import Origin, Output, Plan

_FIRST = 1 << 10
_MOST = 1 << 17


def not_finite(plan: Plan, output: Output, low: int, high: int) -> UserError:
    """The error for a range of an output tensor in which something read or written is NaN or infinite."""
    for origin in output.origins():
        model = plan.inputs[origin.model]
        values = model.read(origin.key, low, high)
        if not is_finite(values):
            wrong = values[~values.isfinite()][0].item()
            return UserError(
                f"tensor {origin.key!r} of {model.label} holds {wrong}; a merge needs finite weights"
            )
    dtype = str(output.entry.dtype).removeprefix("torch.")
    return UserError(
        f"merging {output.entry.key!r} gives values that {dtype} cannot hold; set out_dtype to a wider one, "
        "or give smaller weights"
    )


def same_whole_numbers(plan: Plan, output: Output) -> Read:
    """Read a tensor of whole numbers, which has to be equal in all models.

    Raises:
        UserError: when read, if it is not.
    """
    reads = [(plan.inputs[one.model], one.key) for one in output.origins()]

    def read(low: int, high: int) -> Tensor:
        values = [model.read(key, low, high) for model, key in reads]
        for (model, _), other in zip(reads[1:], values[1:], strict=True):
            if not torch.equal(values[0], other):
                raise UserError(
                    f"{output.entry.key!r} holds whole numbers, which are not merged, and they differ "
                    f"between {reads[0][0].label} and {model.label}"
                )
        return values[0]

    return read


def check_different(plan: Plan) -> None:
    """Refuse a model that is the base: it has no delta.

    Raises:
        UserError: names it.
    """
    if not plan.preset.anchored:
        return
    waiting = {part.origin.model for output in plan.outputs if output.base for part in output.parts}
    for output in plan.outputs:
        for part in output.parts:
            if part.origin.model in waiting and output.base is not None:
                one, other = _plain(plan, output.base), _plain(plan, part.origin)
                if not _equal(one, other, output.entry.count):
                    waiting.discard(part.origin.model)
        if not waiting:
            return
    base = next(plan.inputs[output.base.model].label for output in plan.outputs if output.base)
    names = ", ".join(plan.inputs[place].label for place in sorted(waiting))
    raise UserError(
        f"{names} equals the base {base} in every entry, so there is nothing to merge in; give the model "
        "that was tuned from it"
    )


def _plain(plan: Plan, origin: Origin) -> Read:
    model = plan.inputs[origin.model]
    return lambda low, high: model.read(origin.key, low, high)


def _equal(one: Read, other: Read, count: int) -> bool:
    """Whether two tensors are equal; a difference is mostly found at once."""
    low, size = 0, _FIRST
    while low < count:
        high = min(low + size, count)
        if not torch.equal(one(low, high).to(torch.float64), other(low, high).to(torch.float64)):
            return False
        low, size = high, min(size * 4, _MOST)
    return True
