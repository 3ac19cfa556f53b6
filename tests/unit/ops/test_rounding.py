import pytest
import torch

from trimtab.ops import ROUNDING, MaskKey, join_master, split_master, stochastic_round, uniform_u32

EDGES = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 3.4028235e38, -3.4028235e38, 1e-45, 1.1754944e-38]


def random_bits(n: int, seed: int = 0) -> torch.Tensor:
    """fp32 numbers with uniformly random bit patterns, NaN excluded."""
    bits = torch.randint(
        -(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    values = bits.to(torch.int32).view(torch.float32)
    return values[~values.isnan()]


def test_bf16_and_residual_are_an_exact_fp32_master():
    master = torch.cat([random_bits(200_000), torch.tensor(EDGES)])
    weight, residual = split_master(master, torch.bfloat16)
    assert (weight.dtype, residual.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_master(weight, residual).view(torch.int32), master.view(torch.int32))


def test_the_bf16_weight_is_the_nearest():
    master = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    weight, _ = split_master(master, torch.bfloat16)
    ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties], master.to(torch.bfloat16)[~ties])
    assert torch.equal((weight - master).abs()[ties], (master.to(torch.bfloat16) - master).abs()[ties])


def test_nan_stays_nan_whatever_its_payload():
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32)
    weight, residual = split_master(payloads.view(torch.float32), torch.bfloat16)
    assert weight.isnan().all()
    assert join_master(weight, residual).isnan().all()


@pytest.mark.parametrize(
    ("wide", "narrow", "relative"),
    [(torch.float32, torch.float16, 2.0**-21), (torch.float64, torch.float32, 2.0**-31)],
)
def test_compensation_keeps_the_stated_bits(wide, narrow, relative):
    master = torch.randn(50_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(wide)
    weight, residual = split_master(master, narrow)
    assert residual.element_size() == 2
    error = (join_master(weight, residual) - master).abs() / master.abs()
    assert error.max() <= relative


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.float32)],
)
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(wide, narrow):
    n, value = 200_000, 0.1 + 1e-9
    master = torch.full((n,), value, dtype=wide)
    random = uniform_u32((n,), MaskKey(0, ROUNDING, 1, "w"))
    rounded = stochastic_round(master, narrow, random).to(torch.float64)
    low, high = rounded.min(), rounded.max()
    assert len(rounded.unique()) == 2
    exact = float(master[0].to(torch.float64))
    assert low < exact < high
    share = (exact - low) / (high - low)
    sigma = (high - low) * (share * (1 - share) / n) ** 0.5
    assert abs(rounded.mean() - exact) < 5 * sigma
    assert abs(exact - float(low)) < float(high - low)


def test_stochastic_rounding_keeps_what_is_representable_and_what_is_not_finite():
    master = torch.tensor([0.5, -2.0, float("inf"), -float("inf"), float("nan"), 0.0])
    random = uniform_u32((6,), MaskKey(0, ROUNDING, 1, "w"))
    rounded = stochastic_round(master, torch.bfloat16, random)
    assert torch.equal(rounded.float().nan_to_num(7), master.nan_to_num(7))


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="no 16-bit residual splits"):
        split_master(torch.ones(2, dtype=torch.float64), torch.bfloat16)
    with pytest.raises(ValueError, match="is no residual of"):
        join_master(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="stochastic rounding goes from"):
        stochastic_round(torch.ones(2), torch.float64, torch.zeros(2, dtype=torch.int64))
