"""What rounding would lose: the exact split of an fp32 master, and rounding that is right on average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.property.strategies import SHAPES, bounded, laid_out, same_bits, same_values
from trimtab.ops import ROUNDING, MaskKey, join_master, split_master, stochastic_round, uniform_u32

patterns = st.lists(
    st.integers(0, 2**32 - 1)
    | st.builds(
        lambda high, low: (high << 16) | low,
        st.integers(0, 2**16 - 1),
        st.sampled_from([0, 1, 0x0FFF, 0x1FFF, 0x2FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF]),
    ),
    min_size=1,
    max_size=40,
)


def float32(bits: list[int]) -> Tensor:
    return torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32).view(torch.float32)


@bounded(300)
@given(bits=patterns)
def test_bf16_and_residual_are_the_fp32_master_bit_for_bit(bits: list[int]) -> None:
    master = float32(bits)
    weight, residual = split_master(master, torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert residual.dtype == torch.int16
    assert same_bits(join_master(weight, residual), master)


@bounded(200)
@given(bits=patterns)
def test_the_weight_is_the_master_rounded_to_nearest(bits: list[int]) -> None:
    master = float32(bits)
    master = master[master.isfinite()]
    weight, _ = split_master(master, torch.bfloat16)
    by_torch = master.to(torch.bfloat16)
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000  # torch rounds ties to even
    assert same_bits(weight[~tie], by_torch[~tie])
    assert bool(
        (
            (weight.double() - master.double()).abs()[tie] == (by_torch.double() - master.double()).abs()[tie]
        ).all()
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["transposed", "every second"])
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str) -> None:
    master = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(2)), layout)
    for dtype in (torch.bfloat16, torch.float16):
        weight, residual = split_master(master, dtype)
        assert weight.shape == residual.shape == master.shape
        error = (join_master(weight, residual) - master).abs()
        assert bool((error <= (0 if dtype == torch.bfloat16 else 2**-20) * master.abs()).all())


@pytest.mark.parametrize(
    ("wide", "narrow", "bits"), [(torch.float32, torch.float16, 21), (torch.float64, torch.float32, 31)]
)
def test_compensation_keeps_the_bits_it_states(wide: torch.dtype, narrow: torch.dtype, bits: int) -> None:
    master = torch.randn(100_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(wide)
    master = master[master.abs() > 2**-4]
    weight, residual = split_master(master, narrow)
    assert residual.element_size() == 2
    assert same_bits(weight, master.to(narrow))
    assert bool(((join_master(weight, residual) - master).abs() <= 2.0**-bits * master.abs()).all())


@bounded(200)
@given(bits=patterns)
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.float32)],
)
def test_splitting_what_was_joined_changes_nothing(
    wide: torch.dtype, narrow: torch.dtype, bits: list[int]
) -> None:
    """A step that adds nothing leaves weight and residual alone, also where the residual was rounded up."""
    master = float32(bits)
    if narrow == torch.float16:  # bring them into its range
        master = float32([0x3F800000 | b & 0x807FFFFF for b in bits])
    if wide == torch.float64:  # give it bits below fp32's: a little less than half a unit, among others
        master = master.double() * (1 + 2.0**-24 * (1 - 2.0**-10))
    weight, residual = split_master(master, narrow)
    again = split_master(join_master(weight, residual), narrow)
    assert same_values(again[0], weight)
    assert torch.equal(again[1][~weight.isnan()], residual[~weight.isnan()])


@bounded(150)
@given(bits=patterns)
def test_stochastic_rounding_picks_a_neighbour(bits: list[int]) -> None:
    master = float32(bits)
    random = uniform_u32(master.shape, MaskKey(1, ROUNDING, 1, "w"))
    rounded = stochastic_round(master, torch.bfloat16, random)
    assert rounded.dtype == torch.bfloat16
    special = ~master.isfinite()
    assert same_bits(rounded[special].float(), master[special]) or bool(master[special].isnan().any())
    assert torch.equal(rounded.isnan(), master.isnan())
    pattern = master.view(torch.int32)
    toward_zero = (pattern & -65536).view(torch.float32)
    away = ((pattern & -65536) + 65536).view(torch.float32)
    exact = (pattern & 0xFFFF) == 0
    got = rounded.float()
    assert bool(((got == toward_zero) | ((got == away) & ~exact) | master.isnan()).all())


@pytest.mark.parametrize("dropped", [0, 1, 2, 0x1234, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("upper", [0x3F80, 0xBF80, 0x0000, 0x0080, 0x477F])
def test_the_chance_of_rounding_away_is_exactly_the_dropped_share(dropped: int, upper: int) -> None:
    """Every 16-bit number once (in both halves of the random word): ``dropped`` of 65,536 round away."""
    master = float32([(upper << 16) | dropped]).expand(2**16)
    numbers = torch.arange(2**16)
    rounded = stochastic_round(master, torch.bfloat16, (numbers << 16) | numbers)
    away = rounded.view(torch.int16).long() & 0xFFFF
    assert int((away == upper + 1).sum()) == dropped
    assert int((away == upper).sum()) == 2**16 - dropped


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.float32)],
)
def test_stochastic_rounding_is_unbiased(wide: torch.dtype, narrow: torch.dtype) -> None:
    """The summed error of 2^18 entries, in units of its own standard deviation."""
    n = 2**18
    master = (1 + torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).to(wide)
    rounded = stochastic_round(master, narrow, uniform_u32((n,), MaskKey(5, ROUNDING, 2, "w")))
    gap = torch.finfo(narrow).eps  # the distance of neighbours in [1, 2)
    share = (master.double() / gap) % 1
    error = (rounded.double() - master.double()) / gap
    assert float(error.abs().max()) < 1
    assert abs(float(error.sum())) < 5 * math.sqrt(float((share * (1 - share)).sum()))
    # so it is for the entries that rounding to nearest would treat alike
    low = share < 0.5
    assert abs(float(error[low].sum())) < 5 * math.sqrt(float((share * (1 - share))[low].sum()))
