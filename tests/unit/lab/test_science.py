"""What the tiny world must go on showing, on one seed and with slack over what all three seeds showed.

Measured at step 60 with one thread (seeds 0, 1, 2): AdamW gains .255 .219 .245 of reward for 7.0 9.8 6.7
points of tax; β = 1 pays .1 .6 1.5 points; the average with a quarter of AdamW's change 0 .2 .4; OnDARE and
OnTIES differ from AdamW by at most .006 of reward and .8 points of tax. Nothing here says that one
optimizer is better than another: at equal tax no such difference was seen.
"""

import copy

import pytest

from trimtab.lab.dpo import tune
from trimtab.lab.measure import Score, measure
from trimtab.lab.methods import ADAMW, ONDARE, ONTIES, Plan, build_optimizer, interpolate, prepare

SEED, STEPS = 2, 60
pytestmark = pytest.mark.xdist_group("lab science")  # one worker, so that the AdamW run is made once


@pytest.fixture(scope="module")
def start():
    return prepare(SEED)


@pytest.fixture(scope="module")
def reference(start) -> Score:
    return measure(start.sft)


def tuned(start, method: str, beta: float = 0.1):
    model = copy.deepcopy(start.sft)
    optimizer = build_optimizer(method, model, start.delta, Plan())
    steps = tune(model, optimizer, start.pairs, start.reference_logps, steps=STEPS, beta=beta, seed=SEED)
    assert list(steps) == list(range(1, STEPS + 1))
    return model


@pytest.fixture(scope="module")
def adamw(start):
    return tuned(start, ADAMW)


@pytest.fixture(scope="module")
def adamw_score(adamw) -> Score:
    return measure(adamw)


def test_preference_training_gains_reward_and_pays_a_tax(reference, adamw_score):
    assert adamw_score.reward - reference.reward >= 0.12
    assert adamw_score.tax(reference) >= 3


def test_averaging_a_quarter_of_the_way_more_than_halves_the_tax(start, reference, adamw, adamw_score):
    mixed = copy.deepcopy(start.sft)
    interpolate(mixed, start.sft, adamw, 0.25)
    assert measure(mixed).tax(reference) < adamw_score.tax(reference) / 2


def test_a_strong_pull_to_the_reference_more_than_halves_the_tax(start, reference, adamw_score):
    strong = measure(tuned(start, ADAMW, beta=1.0))
    assert strong.tax(reference) < adamw_score.tax(reference) / 2
    assert strong.reward > reference.reward + 0.05


@pytest.mark.parametrize("method", [ONDARE, ONTIES])
def test_online_merging_of_a_small_delta_stays_close_to_adamw(method, start, reference, adamw_score):
    online = measure(tuned(start, method))
    assert online.reward == pytest.approx(adamw_score.reward, abs=0.03)
    assert online.tax(reference) == pytest.approx(adamw_score.tax(reference), abs=3)
