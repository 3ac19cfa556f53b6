"""How many bytes each optimizer keeps of its own, from the shapes of what it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trimtab.ops.formats import INT8_BLOCK
from trimtab.ops.moments import BLOCK, SMALLEST
from trimtab.optim.galore import PLAIN, is_projected
from trimtab.recipe import Optimizer

FP32 = 4
STORED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / INT8_BLOCK}
"""Bytes per entry of what the optimizer stores; int8 with its scales."""
CODES = 256
"""Numbers that a torchao moment of 8 bits can take; each moment carries their table."""

Shapes = Mapping[str, Sequence[int]]


def state_sizes(optimizer: Optimizer, trained: Shapes) -> dict[str, int]:
    """Bytes of the optimizer's state by what it is for, without that of merging.

    Args:
        optimizer: a recipe's section.
        trained: shapes of the trained parameters by name.

    Examples:
        >>> shapes = {"mlp.up_proj.weight": (576, 1536), "norm.weight": (576,)}
        >>> for name in ("adamw", "adafactor", "galore"):
        ...     print(name, state_sizes(Optimizer.model_validate({"name": name, "lr": 1e-6}), shapes))
        adamw {"Adam's moments": 7082496}
        adafactor {"Adafactor's averages": 10752}
        galore {"Adam's moments": 1577472, "GaLore's projectors": 294912}
    """
    if optimizer.plain == "adafactor":
        return {"Adafactor's averages": FP32 * sum(map(_factors, trained.values()))}
    if optimizer.plain == "adamw_8bit":
        return {"Adam's moments": 2 * sum(map(_blocks, trained.values()))}
    if optimizer.plain == "galore":
        return _in_subspace(optimizer, trained)
    entries = sum(map(math.prod, trained.values()))
    return {"Adam's moments": int(2 * STORED[optimizer.state_dtype or "float32"] * entries)}


def _factors(shape: Sequence[int]) -> int:
    """Entries of Adafactor's second moment: of a matrix a row and a column."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def _blocks(shape: Sequence[int]) -> int:
    """Bytes of one torchao moment: codes, a scale per block and the table; fp32 where blocks do not fit."""
    entries = math.prod(shape)
    if entries < SMALLEST or entries % BLOCK:
        return FP32 * entries
    return entries + FP32 * (entries // BLOCK + CODES)


def _in_subspace(optimizer: Optimizer, trained: Shapes) -> dict[str, int]:
    assert optimizer.galore is not None
    plain = PLAIN if optimizer.galore.plain is None else optimizer.galore.plain
    moments = projectors = 0
    for name, shape in trained.items():
        if is_projected(name, shape, plain):
            rank = min(optimizer.galore.rank, *shape)
            moments += 2 * rank * max(shape)
            projectors += rank * min(shape)
        else:
            moments += 2 * math.prod(shape)
    return {"Adam's moments": FP32 * moments, "GaLore's projectors": FP32 * projectors}
