"""The oracle against arithmetic done by hand; every number below is worked out in the comment beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracle import reference as oracle

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("n", "p", "k"),
    [
        (100, 0.07, 7),  # 0.07 * 100 is 7.000000000000001 in floating point, whose ceiling would be 8
        (10, 1.0, 10),
        (10, 0.11, 2),  # 1.1 rounds up
        (10, 5e-4, 1),  # never none of them
        (3000, 5e-4, 2),  # 1.5
        (3, 1 / 3, 1),  # 0.3333333333333333 * 3 = 0.9999999999999999
        (1, 0.5, 1),
        (0, 0.5, 0),  # min(n, ...)
        (10**9, 0.29, 290000000),  # exact, whatever the size
    ],
)
def test_top_count(n: int, p: float, k: int) -> None:
    assert oracle.top_count(n, p) == k


def test_released_top_count_truncates_and_falls_back_to_dense() -> None:
    assert oracle.released_top_count(10, 0.19) == 1  # 1.9
    assert oracle.released_top_count(10, 0.05) == 10  # 0.5 -> 0 -> dense


def test_top_mask_ranks_magnitude_then_lower_index_and_nan_first() -> None:
    assert oracle.top_mask([1.0, -3.0, 2.0, 3.0], 2) == [False, True, False, True]
    assert oracle.top_mask([2.0, -2.0, 2.0, -2.0], 3) == [True, True, True, False]
    assert oracle.top_mask([INF, 5.0, NAN, -INF], 2) == [True, False, True, False]
    assert oracle.top_mask([0.0, -0.0], 1) == [True, False]


def test_sparsify_and_its_rescalings() -> None:
    x, kept = [4.0, -2.0, 1.0, -1.0], [True, False, True, False]
    assert oracle.flat(oracle.sparsify(x, 0.25, kept)) == [4, 0, 1, 0]
    assert oracle.flat(oracle.sparsify(x, 0.25, kept, "expected")) == [16, 0, 4, 0]  # divided by 1/4
    # sum |x| = 8, sum |kept| = 5, factor 1.6
    assert oracle.flat(oracle.sparsify(x, 0.25, kept, "l1")) == [6.4, 0, 1.6, 0]


def test_l1_factor_is_one_where_a_sum_is_zero_or_not_finite() -> None:
    assert oracle.l1_factor([0.0, 0.0], [0.0, 0.0]) == 1
    assert oracle.l1_factor([3.0, 0.0], [0.0, 0.0]) == 1
    assert oracle.l1_factor([INF, 1.0], [0.0, 1.0]) == 1
    assert oracle.l1_factor([NAN, 1.0], [NAN, 0.0]) == 1


def test_linear_consensus() -> None:
    assert oracle.flat(oracle.consensus([[8.0, -4.0], [2.0, 6.0]], [0.75, 0.25], "linear")) == [6.5, -1.5]
    # normalized by 3 + 1
    assert oracle.flat(oracle.consensus([[8.0], [4.0]], [3.0, 1.0], "linear", normalize=True)) == [7.0]


def test_sign_consensus_is_equation_7_for_two_terms() -> None:
    # a = (6, -3, 1, -2) and b = (0.5, 1.5, 1, 2): sums 6.5, -1.5, 2, 0
    first, second = [8.0, -4.0, 4 / 3, -8 / 3], [2.0, 6.0, 4.0, 8.0]
    got = oracle.flat(oracle.consensus([first, second], [0.75, 0.25], "sign"))
    assert got == [6.5, -3.0, 2.0, 0.0]


def test_sign_consensus_of_three_terms_keeps_those_that_agree() -> None:
    # 3 - 2 - 2 = -1: the two negatives agree, -4; normalized by their weights 1 + 2, with a = w x
    assert oracle.flat(oracle.consensus([[3.0], [-2.0], [-1.0]], [1, 1, 2], "sign")) == [-4.0]
    assert oracle.flat(oracle.consensus([[3.0], [-2.0], [-1.0]], [1, 1, 2], "sign", True)) == [-4 / 3]


def test_unweighted_sign_lets_the_larger_raw_entry_decide() -> None:
    # weighted: 0.9 and -0.5, weighted sum +0.4; unweighted: 1 - 5 = -4, so the second alone survives
    terms, weights = [[1.0], [-5.0]], [0.9, 0.1]
    assert oracle.flat(oracle.consensus(terms, weights, "sign")) == [0.9 * 1.0]
    assert oracle.flat(oracle.consensus(terms, weights, "sign_unweighted")) == [-0.5]
    # an unweighted sum of 0 counts as +
    assert oracle.flat(oracle.consensus([[1.0], [-1.0]], [0.25, 0.75], "sign_unweighted")) == [0.25]


def test_consensus_carries_nan() -> None:
    for kind in ("linear", "sign", "sign_unweighted"):
        assert math.isnan(oracle.flat(oracle.consensus([[NAN], [1.0]], [0.5, 0.5], kind))[0])
        assert math.isnan(oracle.flat(oracle.consensus([[INF], [-INF]], [0.5, 0.5], kind))[0])


def test_sgd_update_with_momentum_and_nesterov() -> None:
    plain = oracle.SGD(momentum=0.5)
    assert plain.update([0.0], [1.0], 0.1) == [-0.1]
    assert plain.update([0.0], [2.0], 0.1) == [-0.25]  # v = 0.5 * 1 + 2 = 2.5
    ahead = oracle.SGD(momentum=0.5, nesterov=True)
    assert ahead.update([0.0], [1.0], 0.5) == [-0.75]  # 1 + 0.5 * 1
    assert oracle.SGD(l2=0.5).update([4.0], [1.0], 1.0) == [-3.0]  # g = 1 + 0.5 * 4


def test_adam_first_steps_by_hand() -> None:
    # after one step m_hat = g and v_hat = g^2, so the update is -lr g / (|g| + eps)
    assert oracle.Adam(eps=0.5).update([0.0], [2.0], 0.1) == pytest.approx([-0.1 * 2 / 2.5])
    # released, t = 1: -lr sqrt(1e-3)/0.1 * 0.1 g / (sqrt(1e-3) |g| + eps) = -lr g / (|g| + eps / sqrt(1e-3))
    outside = oracle.Adam(eps=1e-2, released=True).update([0.0], [2.0], 0.1)
    assert outside == pytest.approx([-0.1 * 2 / (2 + 1e-2 / math.sqrt(1e-3))])
    # second step with beta1 = beta2 = 0.5, g = 1 then 3: m = 1.75, c1 = 0.75; v = 4.75, c2 = 0.75
    twice = oracle.Adam(beta1=0.5, beta2=0.5, eps=0.0)
    twice.update([0.0], [1.0], 1.0)
    assert twice.update([0.0], [3.0], 1.0) == pytest.approx([-(1.75 / 0.75) / math.sqrt(4.75 / 0.75)])


def test_rmsprop_first_step() -> None:
    # v = 0.25 * 16 = 4; update -1 * 4 / 2
    assert oracle.RMSprop(alpha=0.75, eps=0.0).update([0.0], [4.0], 1.0) == [-2.0]
    # centred: mean 1, spread 4 - 1 = 3
    centered = oracle.RMSprop(alpha=0.75, eps=0.0, centered=True).update([0.0], [4.0], 1.0)
    assert centered == pytest.approx([-4 / math.sqrt(3)])


def test_adafactor_first_step_is_clipped_to_unit_rms() -> None:
    # t = 1: v = g^2, raw update = sign g of RMS 1, step = max(1e-3, RMS theta = 5) * min(0.1, 1)
    vector = oracle.Adafactor(shape=(2,))
    assert vector.update([3.0, -math.sqrt(41.0)], [2.0, -7.0], 0.1) == pytest.approx([-0.5, 0.5])
    # a matrix of rank one is factored exactly, so the raw update is the sign again
    matrix = oracle.Adafactor(shape=(2, 2))
    assert matrix.update([5.0] * 4, [1.0, 2.0, 2.0, 4.0], 0.1) == pytest.approx([-0.5] * 4)


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_one_step_of_ondare_by_hand(p: float) -> None:
    # theta = (1, 2), decay factor 1 - 0.5 * 0.25 = 0.875; SGD update -0.5 * (4, -8) = (-2, 4); tau = (8, 16)
    # alpha = 0.25; update kept at 0, tau kept at 1 (p = 1: both everywhere)
    run = oracle.Parameter([1.0, 2.0], [8.0, 16.0], oracle.SGD(), oracle.PAPER["ondare"])
    run.step(
        [4.0, -8.0],
        lr=0.5,
        decay=0.25,
        merge_weight=0.25,
        reserve_rate=p,
        update_kept=[True, False],
        tau_kept=[False, True],
    )
    expected = [0.875 - 1.5, 1.75 + 4.0] if p == 0.5 else [0.875 - 1.5 + 2.0, 1.75 + 3.0 + 4.0]
    assert run.theta == expected


def test_one_step_of_onties_by_hand() -> None:
    # update (-2, 4, 1, 1), top 2: (-2, 4, 0, 0); tau (8, -16, 4, 0), top 2: (8, -16, 0, 0); alpha = 0.25
    # a = (-1.5, 3, 0, 0), b = (2, -4, 0, 0): sums (0.5, -1, 0, 0), so b survives in both
    run = oracle.Parameter([0.0] * 4, [8.0, -16.0, 4.0, 0.0], oracle.SGD(), oracle.PAPER["onties"])
    run.step([4.0, -8.0, -2.0, -2.0], lr=0.5, merge_weight=0.25, reserve_rate=0.5)
    assert run.theta == [2.0, -4.0, 0.0, 0.0]


def test_step_k_rolls_back_to_the_decayed_anchor() -> None:
    # anchor 16, lr 0.5, decay 0.5: factor 0.75 a step. Step 1: 12 - 2 = 10, c = 0.75.
    # Step 2: theta 7.5, c = 0.5625, c anchor = 9; delta_c = (7.5 - 9) - 2 = -3.5; alpha 0.5, tau 1:
    # 9 - 1.75 + 0.5
    run = oracle.Parameter([16.0], [1.0], oracle.SGD(), oracle.PAPER["ondare"])
    for _ in range(2):
        run.step([4.0], lr=0.5, decay=0.5, merge_weight=0.5, merge_every=2)
    assert run.theta == [7.75]
    # A third step alone: 7.75 * 0.75 = 5.8125, - 2; merging what is pending: delta_c = -2, 5.8125 - 1 + 0.5
    run.step([4.0], lr=0.5, decay=0.5, merge_weight=0.5, merge_every=2)
    assert run.theta == [3.8125]
    run.merge_now(0.5, 1.0, None, None)
    assert run.theta == [5.3125]


def test_a_merge_that_falls_due_at_lr_zero_waits_for_the_next_step() -> None:
    # anchor 0, SGD -0.5 * 4 = -2 a step, alpha 0.5, tau 8, K = 2, lr 0 in the second step
    run = oracle.Parameter([0.0], [8.0], oracle.SGD(), oracle.PAPER["ondare"])
    for lr, theta in ((0.5, -2.0), (0.0, -2.0), (0.5, 0.5 * -4 + 4)):
        run.step([4.0], lr=lr, merge_weight=0.5, merge_every=2)
        assert run.theta == [theta]


def test_released_ondare_scales_clamps_and_decays_last() -> None:
    # SGD update -0.5 * 4 = -2, kept, / 0.5 -> -4; tau 0.75 / 0.5 = 1.5, clamped to 1; alpha 0.25: -3 + 0.25
    # theta = 8 - 2.75 = 5.25, then decay 1 - 0.5 * 0.5 = 0.75
    run = oracle.Parameter([8.0], [0.75], oracle.SGD(), oracle.RELEASED["ondare"])
    run.step(
        [4.0], lr=0.5, decay=0.5, merge_weight=0.25, reserve_rate=0.5, update_kept=[True], tau_kept=[True]
    )
    assert run.theta == [5.25 * 0.75]


def test_a_parameter_without_gradient_rests_and_lr_zero_moves_nothing() -> None:
    run = oracle.Parameter([3.0], [1.0], oracle.SGD(), oracle.PAPER["ondare"])
    run.step(None, lr=0.5, merge_weight=1.0)
    assert (run.theta, run.count) == ([3.0], 0)
    run.step([4.0], lr=0.0, decay=0.5, merge_weight=1.0)
    assert run.theta == [3.0]


def test_arrays_keep_their_shape() -> None:
    assert oracle.sparsify(np.zeros((0, 3)), 0.5, []).shape == (0, 3)
    assert oracle.consensus([np.ones((2, 1)), np.ones((2, 1))], [1, 1], "sign").shape == (2, 1)
    assert oracle.sparsify(np.float64(2.0), 0.5, [True], "expected") == 4.0


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (lambda q: torch.optim.SGD(q, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1), "SGD"),
        (lambda q: torch.optim.Adam(q, lr=0.1, weight_decay=0.1), "Adam"),
        (lambda q: torch.optim.RMSprop(q, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1), "RMSprop"),
        (lambda q: torch.optim.Adafactor(q, lr=0.1), "Adafactor"),
    ],
)
def test_updates_agree_with_torch_over_steps(make: Any, ours: str) -> None:
    inner = {
        "SGD": oracle.SGD(momentum=0.9, dampening=0.5, l2=0.1),
        "Adam": oracle.Adam(l2=0.1),
        "RMSprop": oracle.RMSprop(momentum=0.9, centered=True, l2=0.1),
        "Adafactor": oracle.Adafactor(shape=(3, 4)),
    }[ours]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    optimizer, theta = make([weight]), oracle.flat(weight.detach())
    for _ in range(4):
        weight.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        update = inner.update(theta, oracle.flat(weight.grad), 0.1)
        theta = [t + u for t, u in zip(theta, update, strict=True)]
        optimizer.step()
    np.testing.assert_allclose(oracle.flat(weight.detach()), theta, rtol=1e-12, atol=1e-14)
