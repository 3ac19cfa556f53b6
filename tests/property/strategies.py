"""What the property tests draw from: tensors of every shape, layout, dtype and content, and settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (),
    (0,),
    (0, 3),
    (2, 0, 2),
    (1,),
    (1, 1, 1),
    (2,),
    (7,),
    (64,),
    (3, 5),
    (4, 1, 6),
    (2, 3, 2, 2),
    (129,),
]
RATES = [1.0, 0.999, 0.5, 1 / 3, 0.29, 0.07, 5e-4, 1e-9]
LAYOUTS = ["contiguous", "transposed", "every second", "expanded", "offset"]
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf]


def bounded(max_examples: int = 100) -> Callable[..., Any]:
    """The same examples in every run, without a clock."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


rates = st.sampled_from(RATES) | st.floats(1e-12, 1.0)
dtypes = st.sampled_from(DTYPES)
shapes = st.sampled_from(SHAPES)
ties = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
ordinary = st.floats(-4.0, 4.0, width=16)
wild = st.sampled_from(SPECIAL) | ordinary


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a tensor equal to ``x`` in the given memory layout (``expanded`` repeats the first slice)."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second" and x.ndim > 0:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 99.0, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded" and x.ndim > 0 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if layout == "offset":
        return torch.cat([torch.full((3,), 99.0, dtype=x.dtype), x.reshape(-1)])[3:].view(x.shape)
    return x


@st.composite
def tensors(
    draw: st.DrawFn,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    content: st.SearchStrategy[float] | None = None,
) -> Tensor:
    """Draw a tensor: entries are drawn from ``content``, or from ties, ordinary or wild values."""
    shape = draw(shapes) if shape is None else shape
    dtype = draw(dtypes) if dtype is None else dtype
    content = draw(st.sampled_from([ties, ordinary, wild])) if content is None else content
    count = math.prod(shape)
    few = draw(st.lists(content, min_size=min(count, 1), max_size=min(count, 24)))
    # Long tensors repeat what was drawn, scaled by powers of two, so that they hold both ties and an order.
    values = [few[i % len(few)] * 2.0 ** -(i // len(few) % 3) for i in range(count)]
    x = torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)
    return laid_out(x, draw(st.sampled_from(LAYOUTS)))


def as_float64(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The exact values of ``x`` (every dtype here is a subset of float64)."""
    return x.detach().to(torch.float64).numpy().copy()


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (NaN equals NaN, 0 differs from -0)."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    numbers = x.is_floating_point()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    equal = x.contiguous().view(width) == y.contiguous().view(width)
    return bool((equal | (x.isnan() & y.isnan()) if numbers else equal).all())


def same_values(x: Tensor, y: Tensor) -> bool:
    """As :func:`same_bits`, but 0 equals -0."""
    return x.dtype == y.dtype and x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())


def within(x: Tensor, expected: Any, units: float) -> None:
    """Assert that ``x`` is ``expected`` (float64) rounded to x's dtype, up to ``units`` in the last place."""
    target = torch.as_tensor(np.asarray(expected, dtype=np.float64)).reshape(x.shape)
    info = torch.finfo(x.dtype)
    rounded = target.to(x.dtype).to(torch.float64)
    got = x.detach().to(torch.float64)
    slack = units * (info.eps * rounded.abs() + info.smallest_normal * info.eps)
    fine = (got == rounded) | (got.isnan() & rounded.isnan()) | ((got - rounded).abs() <= slack)
    assert bool(fine.all()), f"{got[~fine]} is not {target[~fine]} ({x.dtype}, {units} units)"
