"""The loop of preference training: its loss by hand, its log-probabilities, its order of the data."""

import math

import pytest
import torch

from trimtab.lab.documents import IGNORED
from trimtab.lab.dpo import ROWS, PairTensors, all_logps, answer_logps, batches, dpo_loss, tune
from trimtab.lab.model import new_model
from trimtab.lab.preferences import draw_pairs


def test_loss_by_hand():
    policy = torch.tensor([-1.0, -3.0, -2.0, -2.0])
    reference = torch.tensor([-2.0, -2.0, -2.0, -2.0])
    # Log-ratios: chosen +1, rejected -1; then 0 and 0. β = 0.5: margins 1 and 0.
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert dpo_loss(policy, reference, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_answer_logps_are_sums_over_the_answer_alone():
    model, pairs = new_model(0), PairTensors.of(draw_pairs(0, 3))
    together = all_logps(model, pairs)
    for row in range(6):
        length = int(pairs.lengths[row])
        logps = model(input_ids=pairs.ids[row : row + 1, :length]).logits[0].double().log_softmax(-1)
        labels = pairs.labels[row, :length].tolist()
        by_hand = sum(logps[i - 1, word].item() for i, word in enumerate(labels) if word != IGNORED)
        assert together[row].item() == pytest.approx(by_hand, abs=1e-4)


def test_rows_alternate_chosen_and_rejected():
    drawn = draw_pairs(0, 5)
    pairs = PairTensors.of(drawn)
    assert len(pairs) == 5
    lengths = [len(p.prompt) + len(answer) for p in drawn for answer in (p.chosen, p.rejected)]
    assert pairs.lengths.tolist() == lengths
    ids, labels = pairs.rows(torch.tensor([0, 1]))
    assert ids.shape == labels.shape == (2, max(lengths[:2]))


def test_an_epoch_takes_every_pair_once_and_orders_differ():
    order = batches(ROWS * 3, seed=0)
    epoch = torch.cat([next(order) for _ in range(3)])
    assert sorted(epoch.tolist()) == list(range(2 * ROWS * 3))
    assert torch.equal(epoch[0::2] + 1, epoch[1::2])
    again, other = batches(ROWS * 3, seed=0), batches(ROWS * 3, seed=0, order=1)
    assert torch.equal(next(again), epoch[: 2 * ROWS])
    assert not torch.equal(next(other), epoch[: 2 * ROWS])


def test_tuning_warms_up_and_lowers_the_loss():
    pairs = PairTensors.of(draw_pairs(0, ROWS))
    model = new_model(0)
    reference = all_logps(model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    assert dpo_loss(all_logps(model, pairs), reference, 0.1).item() == pytest.approx(math.log(2), abs=1e-6)
    rates = [
        optimizer.param_groups[0]["lr"]
        for _ in tune(model, optimizer, pairs, reference, steps=8, beta=0.1, seed=0)
    ]
    # Read after the scheduler's step: the rate of the next step.
    assert rates == pytest.approx([1e-3 * min(1, (step + 2) / 6) for step in range(8)])
    assert dpo_loss(all_logps(model, pairs), reference, 0.1).item() < 0.6
    assert answer_logps(model, pairs.ids[:2], pairs.labels[:2]).shape == (2,)
