"""Whole merges, from files to files, against the float64 oracle: every method and fidelity.

The grid's numbers are multiples of 1/16 below 8, so that differences of two of them are exact in every dtype
and ties and sums of 0 are what they are in float64. Of other numbers, entries that rounding can move over a
threshold or a vote are left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import merging as oracle
from tests.property.strategies import as_float64, bounded
from tests.unit.merge import made
from trimtab.errors import UserError
from trimtab.merge import arithmetic
from trimtab.ops import bernoulli_mask

LAYERS = 3
NAMES = sorted(
    ["lm_head.weight", "model.embed_tokens.weight", *(f"model.layers.{i}.mlp.weight" for i in range(LAYERS))]
)
SHAPES: list[tuple[int, ...]] = [(), (0,), (0, 3), (1,), (1, 1), (7,), (3, 5), (2, 3, 4), (129,)]
SPARSE = ("ties", "dare_linear", "dare_ties")
FIDELITIES = pytest.mark.parametrize("fidelity", ["paper", "mergekit"])
NORMALIZED = {("linear", f) for f in ("paper", "mergekit")} | {
    ("ties", "paper"),
    ("ties", "mergekit"),
    ("dare_ties", "paper"),
}
"""The methods that divide by the sum of the weights where the configuration does not say."""

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
weights = st.sampled_from([0.25, 1.0, 0.5, 0.3, 1.7, 0.0, -0.5, -0.3])
densities = st.sampled_from([0.1, 0.37, 0.5, 1.0, 1e-6, 0.0])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Case:
    """Models, and what is done with them."""

    models: list[dict[str, Tensor]] = field(repr=False)  # the base first, where there is one
    method: str
    fidelity: str
    on_grid: bool
    weights: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    scale: float = 1.0
    normalize: bool | None = None
    rescale: bool | None = None
    t: float = 0.0
    ratio: list[float] = field(default_factory=list)
    out_dtype: torch.dtype | None = None
    seed: int = 0

    @property
    def anchored(self) -> bool:
        return self.method in ("task_arithmetic", *SPARSE)

    @property
    def normalized(self) -> bool:
        return (self.method, self.fidelity) in NORMALIZED if self.normalize is None else self.normalize

    @property
    def promoted(self) -> torch.dtype:
        return reduce(torch.promote_types, (next(iter(model.values())).dtype for model in self.models))

    @property
    def eps(self) -> float:
        """The unit of the arithmetic: mergekit's deltas are in the dtype of the models."""
        stored = self.anchored and self.fidelity == "mergekit"
        wide = torch.promote_types(self.promoted, torch.float32)
        return torch.finfo(self.promoted if stored else wide).eps

    @property
    def exact(self) -> bool:
        """Whether weighted deltas and their sums are exact, so that a sum of 0 is one."""
        dyadic = all(w in (0.25, 1.0, 0.5, 0.0, -0.5) for w in self.weights)
        plain = self.method == "ties" and not self.rescale
        return self.on_grid and dyadic and plain and self.eps < 1e-6

    def rescaling(self) -> str:
        if self.rescale is False or (self.method == "ties" and not self.rescale):
            return "none"
        return "expected" if self.fidelity == "paper" and self.method != "ties" else "l1"

    def values(self, folders: Sequence[Path]) -> dict[str, Any]:
        """The configuration."""
        shared: dict[str, Any] = {}
        if self.normalize is not None:
            shared["normalize"] = self.normalize
        if self.rescale is not None:
            shared["rescale"] = self.rescale
        if self.anchored:
            shared["lambda"] = self.scale
        if self.method == "slerp":
            shared["t"] = self.t
        if self.method == "hma":
            shared["ratio"] = self.ratio
        based = self.method != "linear"
        each: list[dict[str, float]] = [{} for _ in folders[based:]]
        if self.weights:
            each = [{"weight": w} for w in self.weights]
        for own, density in zip(each, self.densities, strict=bool(self.densities)):
            own["density"] = density
        top: dict[str, Any] = {"fidelity": self.fidelity, "random_seed": self.seed, "parameters": shared}
        if self.out_dtype:
            top["out_dtype"] = name_of(self.out_dtype)
        return made.values_of(self.method, folders[0] if based else None, folders[based:], each, **top)


Arrays = dict[str, oracle.Array]


def random_model(seed: int, shapes: Sequence[tuple[int, ...]], on_grid: bool) -> Arrays:
    chance = np.random.default_rng(seed)
    result = {}
    for name, shape in zip(NAMES, shapes, strict=True):
        values = chance.standard_normal(shape)
        if on_grid:
            result[name] = np.clip(np.round(values * 16) / 16, -4, 4)
        else:
            result[name] = values * 10.0 ** chance.uniform(-2, 0.5)
    return result


@st.composite
def cases(draw: st.DrawFn, method: str, fidelity: str) -> Case:
    based = method != "linear"
    others = 1 if method in ("slerp", "hma") else draw(st.integers(1, 4))
    shapes = [draw(st.sampled_from(SHAPES)) for _ in NAMES[1:]] + [(129,)]
    on_grid, seed = draw(st.booleans()), draw(st.integers(0, 10**6))
    kinds = [draw(dtypes)] * (others + based)
    if draw(st.integers(0, 3)) == 0:
        kinds = [draw(dtypes) for _ in kinds]
    models: list[dict[str, Tensor]] = []
    first: Arrays = {}
    for number, kind in enumerate(kinds):
        values = random_model(seed + number, shapes, on_grid)
        if models and not on_grid and draw(st.booleans()):  # tuned a little: nearly parallel
            near = 10.0 ** draw(st.integers(-3, 0))
            values = {name: first[name] + near * value for name, value in values.items()}
        first = first if models else values
        models.append({name: torch.tensor(value).to(kind) for name, value in values.items()})
    case = Case(models, method, fidelity, on_grid)
    if method not in ("slerp", "hma"):
        case.weights = [draw(weights) for _ in range(others)]
        case.normalize = draw(st.sampled_from([None, True, False]))
    if case.anchored:
        case.scale = draw(st.sampled_from([1.0, 0.7, -1.5, 0.0]))
    if method in SPARSE:
        case.densities = [draw(densities) for _ in range(others)]
        case.rescale = draw(st.sampled_from([None, True, False]))
        case.seed = draw(st.integers(0, 2**32))
    case.t = draw(st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0, 1))
    case.ratio = draw(st.lists(st.sampled_from([0.0, 1.0, 0.25, 0.3]), min_size=1, max_size=LAYERS))
    case.out_dtype = draw(st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]))
    return case


# what it has to be


def wide(model: Mapping[str, Tensor]) -> dict[str, oracle.Array]:
    return {name: as_float64(model[name]) for name in NAMES}


def layer_of(name: str) -> int:
    """A layer's number; what is before them counts with the first, what is after them with the last."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2])
    return LAYERS - 1 if name == "lm_head.weight" else 0


def sparse_deltas(case: Case) -> list[dict[str, oracle.Array]]:
    """F(δ) of each model."""
    base, *models = [wide(model) for model in case.models]
    result = []
    for number, delta in enumerate(oracle.deltas(base, models)):
        density = case.densities[number] if case.densities else 1.0
        if density == 1:
            result.append(delta)
            continue
        if case.method == "ties":
            trim = oracle.trimmed_together if case.fidelity == "paper" else oracle.trimmed_apart
            sparse = trim(delta, density)
        elif density == 0:
            sparse = {name: np.zeros_like(values) for name, values in delta.items()}
        else:
            masks = {}
            for name, values in delta.items():
                key = arithmetic.mask_key(case.seed, number + 1, name)
                masks[name] = bernoulli_mask(values.shape, density, key).numpy()
            sparse = oracle.dropped(delta, masks)
        if case.rescaling() == "expected":
            sparse = oracle.divided_by_rate(sparse, density)
        elif case.rescaling() == "l1":
            sparse = oracle.norm_restored(sparse, delta)
        result.append(sparse)
    return result


def elects(case: Case) -> bool:
    return case.method in ("ties", "dare_ties")


def expected(case: Case) -> dict[str, oracle.Array]:
    models = [wide(model) for model in case.models]
    if case.method == "linear":
        return oracle.linear(models, case.weights, case.normalized)
    if case.method == "slerp":
        return oracle.slerp(*models, lambda name: case.t)
    if case.method == "hma":
        blocks = len(case.ratio)
        return oracle.hma(*models, lambda n: case.ratio[oracle.block_of(layer_of(n), LAYERS, blocks)])
    terms = sparse_deltas(case)
    if elects(case):
        zero: oracle.Zero = "nothing" if case.fidelity == "paper" else "plus"
        return oracle.elected(models[0], terms, case.weights, case.scale, case.normalized, zero)
    divided = case.normalized and sum(case.weights) != 0  # mergekit's deltas are divided by 1 there
    sparse = [{n: models[0][n] + term[n] for n in NAMES} for term in terms]
    return oracle.task_arithmetic(models[0], sparse, case.weights, case.scale, divided)


def sizes(case: Case, terms: Sequence[Mapping[str, oracle.Array]], name: str) -> oracle.Array:
    """What rounding errors are in proportion to: the sum of the magnitudes, weights brought to their sum."""
    spread: Any = sum(np.abs(w * term[name]) for w, term in zip(case.weights, terms, strict=True))
    base = as_float64(case.models[0][name])
    if not case.normalized:
        return np.abs(base) + abs(case.scale) * spread
    heavy = sum(abs(w) for w in case.weights)
    if not elects(case):
        votes = np.full(base.shape, abs(sum(case.weights)))
    else:
        zero: oracle.Zero = "nothing" if case.fidelity == "paper" else "plus"
        columns = zip(*(term[name].reshape(-1) for term in terms), strict=True)
        found = [abs(oracle.vote(column, case.weights, True, zero)[1]) for column in columns]
        votes = np.array(found, dtype=np.float64).reshape(base.shape)
    return np.abs(base) + abs(case.scale) * spread * np.where(
        votes > 0, heavy / np.where(votes, votes, 1) ** 2, 1
    )


def decided(case: Case, terms: Sequence[Mapping[str, oracle.Array]], name: str) -> np.ndarray:
    """Which entries rounding cannot move over a threshold or a vote."""
    base = as_float64(case.models[0][name])
    fine = np.ones(base.shape, dtype=bool)
    if case.method == "ties" and not case.on_grid:
        whole, *models = [wide(model) for model in case.models]
        for delta, density in zip(oracle.deltas(whole, models), case.densities, strict=True):
            at = oracle.thresholds(delta, density, together=case.fidelity == "paper")[name]
            fine &= np.abs(np.abs(delta[name]) - at) > 4 * case.eps * at
    if elects(case) and not case.exact:
        weighted = [w * term[name] for w, term in zip(case.weights, terms, strict=True)]
        total, spread = np.abs(sum(weighted)), sum(np.abs(a) for a in weighted)
        fine &= (total > 64 * case.eps * spread) | (spread == 0)
    return fine


def assert_follows(case: Case, got: Mapping[str, Tensor]) -> None:
    assert sorted(got) == NAMES
    truth = expected(case)
    terms = sparse_deltas(case) if case.anchored else [wide(model) for model in case.models]
    if case.method in ("slerp", "hma"):
        case.weights = [1.0, 1.0]
    for name in NAMES:
        out = got[name]
        assert out.dtype == (case.out_dtype or case.promoted)
        assert out.shape == case.models[0][name].shape
        info, fine = torch.finfo(out.dtype), np.ones(tuple(out.shape), dtype=bool)
        if case.anchored:
            size, fine = sizes(case, terms, name), decided(case, terms, name)
        elif case.method == "linear":
            spread = sum(np.abs(w * term[name]) for w, term in zip(case.weights, terms, strict=True))
            size = spread * (sum(map(abs, case.weights)) / sum(case.weights) ** 2 if case.normalized else 1)
        else:
            size = sum(np.abs(term[name]) for term in terms) * steepness(case, name)
        slack = 8 * case.eps * size + info.eps * np.abs(truth[name]) + info.smallest_normal * info.eps
        if case.eps > 1e-6:
            slack = slack + 4 * torch.finfo(case.promoted).smallest_normal
        error = np.abs(as_float64(out) - truth[name])
        wrong = fine & ~(error <= slack)
        assert not wrong.any(), f"{name}: {error[wrong]} where {slack[wrong]} is allowed"


def steepness(case: Case, name: str) -> float:
    """How much errors of the angle grow in a slerp: it is no straight line only far enough from 0 and π."""
    if case.method != "slerp":
        return 1.0
    a, b = (as_float64(model[name]) for model in case.models)
    long = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    cosine = abs(float((a * b).sum() / long)) if long > 1e-6 else 1.0
    assume(abs(cosine - 0.9995) > 1e-5)
    return 8.0 if cosine > 0.9995 else 8.0 / (1 - cosine**2) ** 1.5


@FIDELITIES
@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "hma"]
)
def test_merges_follow_the_oracle(method: str, fidelity: str) -> None:
    seen: set[str] = set()

    @bounded(45 if method in SPARSE else 25)
    @given(case=cases(method, fidelity))
    def check(case: Case) -> None:
        if not divisible(case):
            seen.add("refused")
            with pytest.raises(UserError, match="sum to 0"):
                merged(case)
            return
        if (case.out_dtype or case.promoted) == torch.float16 or case.promoted == torch.float16:
            assume(max(np.abs(x).max(initial=0) for x in expected(case).values()) < 60000)
        assert_follows(case, merged(case))
        seen.add("followed")

    check()
    assert "followed" in seen


def divisible(case: Case) -> bool:
    """Whether a sum of weights by which all is divided is not 0; mergekit's deltas are divided by 1 then."""
    by_sum = bool(case.weights) and case.normalized and not elects(case)
    stored = case.fidelity == "mergekit" and case.anchored
    return not by_sum or stored or sum(case.weights) != 0


def merged(case: Case) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folders = [
            made.folder(place / str(number), model, num_hidden_layers=LAYERS)
            for number, model in enumerate(case.models)
        ]
        return made.merged(place / "out", case.values(folders))
