"""The sums of a measuring step against loops over entries, and their additivity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.ops import agreeing_terms
from trimtab.ops.kernels.sums import SUMS, measure, squared_norm

ALPHA = 0.25


def chunk(n: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    base, update, tau = draw(1.0), draw(1e-7), draw(3e-7)
    kept = [torch.where(torch.rand(n, generator=generator) < 0.6, x, 0.0) for x in (update, tau)]
    return {"base": base, "update": update, "kept_update": kept[0], "kept_tau": kept[1]}


def sums_of(
    given: dict[str, torch.Tensor], consensus: str = "sign", stored=torch.float32
) -> dict[str, float]:
    parts = agreeing_terms([given["kept_update"], given["kept_tau"]], [1 - ALPHA, ALPHA], consensus)
    return dict(zip(SUMS, measure(**given, parts=parts, stored=stored).tolist(), strict=True))


def by_loop(given: dict[str, torch.Tensor], consensus: str, store) -> dict[str, float]:
    """Written from the definitions, entry by entry; float32 sums as NumPy rounds them."""
    total = dict.fromkeys(SUMS, 0.0)
    for base, update, kept, tau in zip(*(x.numpy() for x in given.values()), strict=True):
        a, b = kept * np.float32(1 - ALPHA), tau * np.float32(ALPHA)
        if consensus == "sign":
            vote = np.sign(a + b)
            a, b = (x if vote != 0 and np.sign(x) == vote else np.float32(0) for x in (a, b))
        total["update"] += float(update) ** 2
        total["kept_update"] += float(kept) ** 2
        total["kept_tau"] += float(tau) ** 2
        total["surviving_tau"] += float(b) ** 2
        total["product"] += float(kept) * float(tau)
        total["both"] += kept != 0 and tau != 0
        total["conflicts"] += np.sign(kept) * np.sign(tau) < 0
        after = store(base + (a + b))
        for part, other, which in ((a, b, "update"), (b, a, "tau")):
            moved = math.copysign(1, part) * (after - store(base + other)) if part else 0.0
            total[f"wanted_{which}"] += abs(float(part))
            total[f"arrived_{which}"] += min(max(moved, 0.0), abs(float(part)))
    return total


def bf16(x: np.float32) -> float:
    return float(torch.tensor(x).to(torch.bfloat16))


@pytest.mark.parametrize("consensus", ["linear", "sign"])
@pytest.mark.parametrize(("stored", "store"), [(torch.float32, float), (torch.bfloat16, bf16)])
def test_every_sum_is_what_its_name_says(consensus, stored, store):
    given = chunk(600, seed=1)
    if stored == torch.bfloat16:  # so that something arrives
        given = {k: v if k == "base" else v * 3e4 for k, v in given.items()}
    got, expected = sums_of(given, consensus, stored), by_loop(given, consensus, store)
    for name in SUMS:
        assert got[name] == pytest.approx(expected[name], rel=1e-12), name
    assert 0 < got["conflicts"] < got["both"] < 600
    for which in ("update", "tau"):  # some is lost, some arrives: the test sees both
        assert 0.05 < got[f"arrived_{which}"] / got[f"wanted_{which}"] < 0.95
    if consensus == "sign":
        assert got["surviving_tau"] < ALPHA**2 * got["kept_tau"]


def test_sums_add_up_over_chunks():
    given = chunk(1000, seed=2)
    pieces = [
        {k: v[cut] for k, v in given.items()} for cut in (slice(0, 333), slice(333, 333), slice(333, None))
    ]
    whole, parts = sums_of(given), [sums_of(piece) for piece in pieces]
    for name in SUMS:
        assert whole[name] == pytest.approx(sum(part[name] for part in parts), rel=1e-12)
    assert set(parts[1].values()) == {0.0}


def test_tiny_numbers_of_both_signs_are_conflicts():
    """1e-30 · 1e-25 is no fp32 number: products are formed in float64."""
    one = torch.tensor([1e-30, 1e-30, 0.0])
    tau = torch.tensor([-1e-25, 1e-25, 1.0])
    got = measure(torch.zeros(3), one, one, tau, [one, tau], torch.float32)
    found = dict(zip(SUMS, got.tolist(), strict=True))
    assert (found["both"], found["conflicts"]) == (2, 1)


def test_a_rounding_help_brings_everything_home():
    given = chunk(500, seed=3, dtype=torch.float32)
    wide = given | {"base": given["base"].double()}
    lost, kept = sums_of(given, "linear", torch.float32), sums_of(wide, "linear", torch.float64)
    assert lost["arrived_tau"] < 0.9 * lost["wanted_tau"]
    assert kept["arrived_tau"] == pytest.approx(kept["wanted_tau"], rel=1e-6)


def test_squared_norm_in_chunks():
    values = torch.randn(700, 900, generator=torch.Generator().manual_seed(4))
    expected = math.fsum(x * x for x in values.double().flatten().tolist())
    assert squared_norm(values) == pytest.approx(expected, rel=1e-13)
    assert squared_norm(values.T.to(torch.bfloat16)[:3, :2]) > 0
    assert squared_norm(torch.zeros(0, 3)) == 0
