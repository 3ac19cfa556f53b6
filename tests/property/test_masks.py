"""The counter-based masks on their own: a pure function of their key, unbiased, independent, exact to 2⁻³².

Statistical bounds are 5 standard deviations and the keys are fixed, so a test passes always or never.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.property.strategies import RATES, bounded, rates, shapes
from trimtab.ops import DELTA, GRADIENT, ROUNDING, UPDATE, MaskKey, bernoulli_mask, uniform_u32

KEY = MaskKey(seed=0, stream=UPDATE, step=1, name="model.layers.0.mlp.up_proj.weight")
STREAMS = [UPDATE, DELTA, DELTA + 1, DELTA + 2, GRADIENT, ROUNDING]
N = 1 << 19
SIGMA = 5.0

keys = st.builds(
    MaskKey,
    seed=st.sampled_from([0, 1, 2**32, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    stream=st.integers(0, 63),
    step=st.integers(0, 2**40),
    name=st.sampled_from(["weight", "model.embed_tokens.weight", "ä.β"]),
)
# around the places where an index could be cut short: chunks, 16 bits, 31, 32 and 33 bits
offsets = st.builds(
    lambda edge, shift: max(0, edge + shift),
    st.sampled_from([0, 2**16, 2**18, 2**31, 2**32, 2**33, 2**40]),
    st.integers(-9, 9),
)


def correlation(x: Tensor, y: Tensor, p: float) -> float:
    """Correlation of two masks of rate p, in standard deviations of independent ones."""
    a, b = x.reshape(-1).double() - p, y.reshape(-1).double() - p
    return float((a * b).sum() / (p * (1 - p) * math.sqrt(a.numel())))


def mixed(x: int, key0: int, key1: int) -> int:
    """The hash of the masks' documentation in Python's integers."""
    low = 2**32 - 1
    x = (x + key0) & low
    x ^= x >> 16
    x = x * 0x7FEB352D & low
    x ^= x >> 15
    x ^= key1
    x = x * 0x846CA68B & low
    return x ^ x >> 16


@bounded(100)
@given(key=keys, offset=offsets, n=st.integers(0, 9))
def test_the_numbers_are_those_the_documentation_defines(key: MaskKey, offset: int, n: int) -> None:
    expected = []
    for index in range(offset, offset + n):
        k0, k1, k2, k3 = key.words(index >> 32)
        words = mixed(index % 2**32, k0, k1), mixed(index % 2**32, k2, k3)
        coarse, fine = (word & 0xFFFF if key.stream % 2 else word >> 16 for word in words)
        expected.append(coarse << 16 | fine)
    assert uniform_u32((n,), key, offset=offset).tolist() == expected


@bounded(150)
@given(key=keys, p=rates, shape=shapes, offset=offsets)
def test_a_mask_is_a_threshold_on_those_numbers(
    key: MaskKey, p: float, shape: tuple[int, ...], offset: int
) -> None:
    mask = bernoulli_mask(shape, p, key, offset=offset)
    assert mask.dtype == torch.bool
    assert mask.shape == torch.Size(shape)
    assert torch.equal(mask, uniform_u32(shape, key, offset=offset) < round(p * 2**32))


@bounded(150)
@given(key=keys, index=st.integers(0, 499))
def test_the_rate_is_exact_to_its_last_bit(key: MaskKey, index: int) -> None:
    """An entry with number U is dropped at p = U/2³² and kept at p = (U + 1)/2³²."""
    number = int(uniform_u32((500,), key)[index])
    assert bool(bernoulli_mask((500,), (number + 1) / 2**32, key)[index])
    if number > 0:
        assert not bool(bernoulli_mask((500,), number / 2**32, key)[index])


def test_nested_rates_give_nested_masks_and_everything_is_kept_at_one() -> None:
    masks = [bernoulli_mask((4096,), p, KEY) for p in sorted(RATES)]
    for lower, higher in pairwise(masks):
        assert bool((higher | ~lower).all())
    assert bool(masks[-1].all())


@bounded(150)
@given(key=keys, p=rates, n=st.integers(1, 60), cut=st.integers(0, 60), offset=offsets)
def test_a_range_is_the_slice_of_the_whole(key: MaskKey, p: float, n: int, cut: int, offset: int) -> None:
    cut = min(cut, n)
    whole = bernoulli_mask((n,), p, key, offset=offset)
    parts = [bernoulli_mask((cut,), p, key, offset=offset)]
    parts.append(bernoulli_mask((n - cut,), p, key, offset=offset + cut))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(bernoulli_mask((1, n, 1), p, key, offset=offset).reshape(-1), whole)


@pytest.mark.parametrize("length", [997, 2**16, 2**18 - 1, 2**18, 2**18 + 1])
def test_pieces_of_any_length_give_the_whole(length: int) -> None:
    n = 2**19 + 5
    whole = bernoulli_mask((n,), 0.37, KEY)
    pieces = [bernoulli_mask((min(length, n - i),), 0.37, KEY, offset=i) for i in range(0, n, length)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("p", [0.999, 0.5, 1 / 3, 0.07, 0.01, 5e-4])
@pytest.mark.parametrize("stream", [UPDATE, DELTA])
def test_survivors_are_binomial(p: float, stream: int) -> None:
    """Unbiased (the sum over 40 masks), and scattered as much as chance does, no more and no less."""
    n, count = 1 << 16, 40
    scores = []
    for step in range(count):
        kept = int(bernoulli_mask((n,), p, replace(KEY, stream=stream, step=step)).sum())
        scores.append((kept - n * p) / math.sqrt(n * p * (1 - p)))
    assert abs(sum(scores)) < SIGMA * math.sqrt(count)
    assert abs(sum(z * z for z in scores) - count) < SIGMA * math.sqrt(2 * count)


@pytest.mark.parametrize("p", [1e-5, 1e-6])
def test_small_rates_are_unbiased_over_many_entries(p: float) -> None:
    """Below 2⁻¹⁶ every survivor is decided by the second 16 bits."""
    kept = sum(int(bernoulli_mask((1 << 22,), p, replace(KEY, step=step)).sum()) for step in range(4))
    assert abs(kept - p * 2**24) < SIGMA * math.sqrt(p * 2**24)


@pytest.mark.parametrize("stream", STREAMS)
def test_every_bit_is_a_fair_coin_and_bits_are_independent(stream: int) -> None:
    numbers = uniform_u32((N,), replace(KEY, stream=stream))
    assert int(numbers.min()) >= 0
    assert int(numbers.max()) < 2**32
    coins = torch.stack([(numbers >> bit) & 1 for bit in range(32)]).double() - 0.5
    assert float(coins.sum(1).abs().max()) < SIGMA * math.sqrt(N / 4)
    together = coins @ coins.T
    together.fill_diagonal_(0)
    assert float(together.abs().max()) < SIGMA * math.sqrt(N / 16)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_uniform(shift: int) -> None:
    counts = ((uniform_u32((N,), KEY) >> shift) & 255).bincount(minlength=256).double()
    statistic = float(((counts - N / 256) ** 2 / (N / 256)).sum())
    assert abs(statistic - 255) < SIGMA * math.sqrt(2 * 255)


@pytest.mark.parametrize("p", [0.5, 0.07])
def test_streams_are_independent(p: float) -> None:
    masks = {stream: bernoulli_mask((N,), p, replace(KEY, stream=stream)) for stream in STREAMS}
    for first, second in combinations(STREAMS, 2):
        assert abs(correlation(masks[first], masks[second], p)) < SIGMA, (first, second)


@pytest.mark.parametrize("p", [0.5, 0.07])
def test_steps_names_and_seeds_are_independent(p: float) -> None:
    others = [replace(KEY, step=step) for step in (0, 2, 3, 1001, 2**32 + 1)]
    others += [replace(KEY, seed=seed) for seed in (1, 2, 2**32, 2**63)]
    others += [replace(KEY, name=name) for name in ("weight", KEY.name + "x", KEY.name.replace("0", "1"))]
    masks = [bernoulli_mask((N,), p, key) for key in [KEY, *others]]
    for first, second in combinations(range(len(masks)), 2):
        assert abs(correlation(masks[first], masks[second], p)) < SIGMA, (first, second)


@pytest.mark.parametrize("p", [0.5, 0.07])
def test_neighbours_are_independent(p: float) -> None:
    """Within a mask at many distances, and between the masks of two steps at small shifts."""
    mask = bernoulli_mask((N,), p, KEY)
    for lag in [*range(1, 33), 64, 128, 576, 1024, 2**16, 2**17, 2**18]:
        assert abs(correlation(mask[lag:], mask[:-lag], p)) < SIGMA, lag
    following = bernoulli_mask((N,), p, replace(KEY, step=2))
    for lag in range(1, 17):
        assert abs(correlation(mask[lag:], following[:-lag], p)) < SIGMA, lag
        assert abs(correlation(mask[:-lag], following[lag:], p)) < SIGMA, lag


def test_update_and_delta_together_fall_into_their_four_cells() -> None:
    """The two masks of one entry come from one hash: their joint law must still be the product."""
    for p in (0.5, 0.07, 0.01):
        update, tau = (bernoulli_mask((N,), p, replace(KEY, stream=s)) for s in (UPDATE, DELTA))
        cells = (2 * update.long() + tau.long()).bincount(minlength=4).double()
        expected = N * torch.tensor([(1 - p) ** 2, p * (1 - p), p * (1 - p), p * p], dtype=torch.float64)
        assert float(((cells - expected) ** 2 / expected).sum()) < 3 + SIGMA * math.sqrt(6)


def test_indices_beyond_32_bits_have_their_own_bits() -> None:
    masks = [bernoulli_mask((N,), 0.5, KEY, offset=high << 32) for high in range(3)]
    for first, second in combinations(masks, 2):
        assert abs(correlation(first, second, 0.5)) < SIGMA


@bounded(100)
@given(key=keys)
def test_each_part_of_the_key_counts(key: MaskKey) -> None:
    others = [
        replace(key, seed=key.seed ^ 1),
        replace(key, seed=key.seed ^ (1 << 63)),
        replace(key, stream=key.stream ^ 1),
        replace(key, stream=(key.stream + 2) % 64),
        replace(key, step=key.step + 1),
        replace(key, step=key.step + 2**32),
        replace(key, name=key.name + ".x"),
    ]
    mask = bernoulli_mask((2048,), 0.5, key)
    assert torch.equal(mask, bernoulli_mask((2048,), 0.5, replace(key)))
    for other in others:
        differing = int((mask ^ bernoulli_mask((2048,), 0.5, other)).sum())
        assert abs(differing - 1024) < 6.5 * math.sqrt(512), other


def test_wrappers_do_not_change_masks() -> None:
    wrapped = "module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert torch.equal(
        bernoulli_mask((999,), 0.5, replace(KEY, name=wrapped)), bernoulli_mask((999,), 0.5, KEY)
    )


def test_names_and_numbers_cannot_run_into_each_other() -> None:
    """No two keys may hash the same bytes: the digits of one field next to the name, say."""
    names = ["1", "11", "1.1", ".1"]
    seen = {
        replace(KEY, seed=s, step=t, name=name).words() for s in (1, 11) for t in (1, 11) for name in names
    }
    assert len(seen) == 16


def test_pythons_string_hash_plays_no_part() -> None:
    program = f"from trimtab.ops import MaskKey; print(MaskKey(7, 1, 3, {KEY.name!r}).words(1))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # this process has another, random one
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == str(MaskKey(7, 1, 3, KEY.name).words(1)), ran.stderr


def test_torchs_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    first, state = bernoulli_mask((99,), 0.5, KEY), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(bernoulli_mask((99,), 0.5, KEY), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "drawing a mask advanced torch's generator"


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"seed": 2**64}, {"stream": -1}, {"stream": 64}, {"step": -1}], ids=str
)
def test_keys_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        replace(KEY, **wrong)


@pytest.mark.parametrize("p", [0.0, -1.0, 1.0000001, math.nan])
def test_rates_out_of_range_are_refused(p: float) -> None:
    with pytest.raises(ValueError):
        bernoulli_mask((3,), p, KEY)
