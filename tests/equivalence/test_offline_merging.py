"""Offline merging where it must be something else: step-K's merge, a model as it is, mergekit's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.equivalence.mergekit import make as mergekit
from tests.equivalence.test_identities import LR, SHAPES, make, steps
from tests.property.runs import Policy
from tests.property.strategies import as_float64, same_bits, same_values
from tests.unit.merge import made
from trimtab import OnlineMerging
from trimtab.merge import arithmetic
from trimtab.ops import DELTA, UPDATE, MaskKey, Operator
from trimtab.ops.combine import merge_range
from trimtab.ops.sparsify import Sparsifier, thinning

SEED, COUNT, ALPHA = 6, 7, 0.4
FIDELITIES = pytest.mark.parametrize("fidelity", ["paper", "mergekit"])


# step-K with K = all


def online_key(seed: int, place: int, name: str) -> MaskKey:
    """The key of step-K's masks: of the update for the policy, of the delta for the base."""
    return MaskKey(SEED, {1: UPDATE, 2: DELTA}[place], COUNT, name)


def trained(
    make_optimizer: Callable[[Policy], Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Policy]:
    """The weights after some steps, and the policy after it was merged once at the end."""
    policy = Policy.make(shapes, dtype=dtype, seed=20)
    plain = Policy.make(shapes, dtype=dtype, seed=20)
    optimizer = make_optimizer(policy)
    adamw = torch.optim.AdamW(plain.named(), lr=LR, weight_decay=0.0)
    for _ in steps([policy, plain], [optimizer, adamw], COUNT):
        pass
    before = plain.values()
    assert all(same_bits(policy.values()[name], before[name]) for name in shapes)
    assert optimizer.merge_now() == len(shapes)
    return before, policy


def base_of(policy: Policy) -> dict[str, Tensor]:
    """θ_b, of which θ_b − θ_r is exactly −τ: the numbers lie on a grid."""
    found = {}
    for name, reference in policy.start.items():
        tau = policy.delta.tensor(name, reference.dtype)
        found[name] = reference - tau
        assert same_values(found[name] - reference, -tau)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["onties", "ondare", "dare and ties"])
def test_merging_once_at_the_end_is_the_offline_merge_anchored_at_the_reference(
    kind: str, dtype: torch.dtype, p: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, as a user merges them: base_model is the reference, and the base comes in with weight −α."""
    shapes = {"w": SHAPES["w"]} if kind == "onties" else SHAPES  # TIES ranks all tensors of a model together

    def optimizer(policy: Policy) -> Any:
        merging = {"reserve_rate": p, "merge_weight": ALPHA, "merge_every": 1000, "seed": SEED}
        if kind != "dare and ties":
            return make(kind, policy, **merging)
        inner = torch.optim.AdamW(policy.named(), lr=LR, weight_decay=0.0)
        return OnlineMerging(inner, policy.delta, sparsify="bernoulli", consensus="sign", **merging)

    before, policy = trained(optimizer, shapes, dtype)
    paths = [
        made.folder(tmp_path / name, tensors)
        for name, tensors in (
            ("reference", policy.start),
            ("policy", before),
            ("base", base_of(policy)),
        )
    ]
    monkeypatch.setattr(arithmetic, "mask_key", online_key)
    method = {"onties": "ties", "ondare": "dare_linear", "dare and ties": "dare_ties"}[kind]
    each = [{"weight": 1 - ALPHA, "density": p}, {"weight": -ALPHA, "density": p}]
    shared = {"normalize": False, "rescale": False}
    values = made.values_of(method, paths[0], paths[1:], each, parameters=shared)
    offline = made.merged(tmp_path / "out", values)
    for name, value in policy.values().items():
        assert same_bits(offline[name].reshape(value.shape), value), name
        assert not torch.equal(value, before[name])


OPERATORS = [
    Operator(sparsify, rescale, consensus)
    for sparsify, rescale in (
        ("none", "none"),
        ("bernoulli", "none"),
        ("bernoulli", "expected"),
        ("bernoulli", "l1"),
        ("top", "none"),
        ("top", "l1"),
    )
    for consensus in ("linear", "sign")
]


def read(tensor: Tensor) -> arithmetic.Read:
    return lambda low, high: tensor.reshape(-1)[low:high]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: f"{o.sparsify}-{o.rescale}-{o.consensus}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operator_gives_the_same_online_and_offline(
    operator: Operator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ranges of a prime length, as no file has them."""

    def optimizer(policy: Policy) -> Any:
        inner = torch.optim.AdamW(policy.named(), lr=LR, weight_decay=0.0)
        chosen = {"sparsify": operator.sparsify, "rescale": operator.rescale, "consensus": operator.consensus}
        merging = {"reserve_rate": 0.3, "merge_weight": ALPHA, "merge_every": 1000, "seed": SEED}
        return OnlineMerging(inner, policy.delta, **chosen, **merging)

    before, policy = trained(optimizer, SHAPES, dtype)
    base = base_of(policy)
    monkeypatch.setattr(arithmetic, "mask_key", online_key)
    for name, value in policy.values().items():
        terms = (
            arithmetic.Term(read(before[name]), 1 - ALPHA, 0.3, 1),
            arithmetic.Term(read(base[name]), -ALPHA, 0.3, 2),
        )
        anchor = read(policy.start[name])
        task = arithmetic.Task(name, value.numel(), terms, anchor, operator, dtype)
        (ready,) = arithmetic.decided([task])
        bounds = [*range(0, task.count, 97), task.count]
        offline = torch.cat([arithmetic.computed(ready, low, high) for low, high in pairwise(bounds)])
        assert same_bits(offline.view(value.shape), value), name
        written = torch.empty(task.count, dtype=dtype)
        for low, high in pairwise(bounds):
            assert arithmetic.compute_into(ready, low, high, written[low:high])
        assert same_bits(written.view(value.shape), value), name


@pytest.mark.parametrize("sparsify", ["none", "bernoulli", "top"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vote_before_weighting_gives_the_same_online_and_offline(
    sparsify: Sparsifier, dtype: torch.dtype
) -> None:
    """Here −α·(−τ) will not do, since −τ would vote: the deltas themselves are merged."""

    def optimizer(policy: Policy) -> Any:
        inner = torch.optim.AdamW(policy.named(), lr=LR, weight_decay=0.0)
        merging = {"reserve_rate": 0.3, "merge_weight": ALPHA, "merge_every": 1000, "seed": SEED}
        return OnlineMerging(inner, policy.delta, sparsify=sparsify, consensus="sign_unweighted", **merging)

    before, policy = trained(optimizer, SHAPES, dtype)
    operator = Operator(sparsify, "none", "sign_unweighted")
    for name, value in policy.values().items():
        start = policy.start[name]
        deltas = [before[name] - start, policy.delta.tensor(name, dtype)]
        keys = [online_key(SEED, place, name) for place in (1, 2)]
        how = [thinning(d, sparsify, 0.3, key=key) for d, key in zip(deltas, keys, strict=True)]
        assert same_bits(merge_range(start, deltas, [1 - ALPHA, ALPHA], how, operator), value), name


# merges that are one of the models


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models tuned from it, in fp32."""
    place = tmp_path_factory.mktemp("three")
    shapes = {"model.embed_tokens.weight": (40, 16), "model.layers.0.w": (16, 16), "model.norm.weight": (16,)}
    base = made.random_tensors(shapes, 0)
    tuned = [base, made.moved(base, 1), made.moved(base, 2)]
    return [
        made.folder(place / str(number), model, num_hidden_layers=1) for number, model in enumerate(tuned)
    ]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_values(one[name], other[name]) for name in one)


@FIDELITIES
def test_one_model_with_weight_1_is_that_model_within_an_ulp(
    fidelity: str, three: list[Path], tmp_path: Path
) -> None:
    values = made.values_of("task_arithmetic", three[0], three[1:2], [{"weight": 1}], fidelity=fidelity)
    got, base, model = made.merged(tmp_path / "out", values), made.weights(three[0]), made.weights(three[1])
    for name, value in got.items():
        size = torch.maximum(base[name].abs(), model[name].abs())
        unit = torch.nextafter(size, torch.full_like(size, float("inf"))) - size
        assert bool(((value - model[name]).abs() <= unit).all())
        assert not torch.equal(value, base[name])


@FIDELITIES
@pytest.mark.parametrize("normalize", [True, False])
def test_a_mean_of_one_model_is_that_model(
    fidelity: str, normalize: bool, three: list[Path], tmp_path: Path
) -> None:
    each = [{"weight": 1}, {"weight": 0}]
    shared = {"normalize": normalize}
    values = made.values_of("linear", None, three[1:], each, fidelity=fidelity, parameters=shared)
    assert equal(made.merged(tmp_path / "out", values), made.weights(three[1]))


@FIDELITIES
@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("method", ["slerp", "hma"])
def test_the_ends_of_an_interpolation(
    method: str, t: int, fidelity: str, three: list[Path], tmp_path: Path
) -> None:
    name = {"slerp": "t", "hma": "ratio"}[method]
    values = made.values_of(method, three[0], three[1:2], fidelity=fidelity, parameters={name: t})
    assert equal(made.merged(tmp_path / "out", values), made.weights(three[t]))


@FIDELITIES
def test_ties_of_one_whole_model_is_task_arithmetic(fidelity: str, three: list[Path], tmp_path: Path) -> None:
    """Alone, it is elected everywhere; divided by its own weight its delta is whole, within an ulp."""
    outs = [
        made.merged(
            tmp_path / f"{method}-{normalize}",
            made.values_of(
                method,
                three[0],
                three[1:2],
                [{"weight": 0.5}],
                fidelity=fidelity,
                parameters={"normalize": normalize},
            ),
        )
        for method, normalize in (
            ("ties", False),
            ("task_arithmetic", False),
            ("ties", True),
            ("task_arithmetic", True),
        )
    ]
    assert equal(outs[0], outs[1])
    assert equal(outs[2], outs[3])
    assert not equal(outs[0], outs[2])


@FIDELITIES
def test_dare_that_drops_nothing_is_task_arithmetic(fidelity: str, three: list[Path], tmp_path: Path) -> None:
    outs = [
        made.merged(
            tmp_path / method,
            made.values_of(
                method,
                three[0],
                three[1:],
                [{"weight": 0.3}, {"weight": -0.9}],
                fidelity=fidelity,
                parameters={"lambda": 1.7},
            ),
        )
        for method in ("dare_linear", "task_arithmetic")
    ]
    assert all(same_bits(outs[0][name], outs[1][name]) for name in outs[0])


# mergekit


def stored(case: str, kind: str) -> dict[str, Tensor]:
    with safe_open(mergekit.OUTPUTS, framework="pt") as file:
        prefix = f"{case} {kind} "
        return {
            key.removeprefix(prefix): file.get_tensor(key)
            for key in file.offset_keys()
            if key.startswith(prefix)
        }


def made_on_this_kind_of_processor() -> bool:
    with safe_open(mergekit.OUTPUTS, framework="pt") as file:
        return bool(file.metadata()["processor"] == torch.backends.cpu.get_cpu_capability())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    place = tmp_path_factory.mktemp("written")
    return {kind: mergekit.write_models(place, kind) for kind in mergekit.DTYPES}


CASES = [
    (case, kind)
    for kind in ("fp32", "bf16")
    for case in mergekit.configurations(dict.fromkeys(mergekit.NAMES, Path()))
    if kind == "fp32" or case in mergekit.IN_BF16
]


def merged_here(case: str, kind: str, written: dict[str, dict[str, Path]], out: Path) -> dict[str, Tensor]:
    values = mergekit.configurations(written[kind])[case]
    return made.merged(out, {**values, "fidelity": "mergekit"})


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_mergekits_numbers(case: str, kind: str, written: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """Bit for bit, but for what mergekit leaves to chance: which of equal magnitudes torch.topk takes."""
    ours, theirs = merged_here(case, kind, written, tmp_path / "out"), stored(case, kind)
    assert ours.keys() == theirs.keys()
    assert len(theirs) == (30 if case == "slices" else 21)
    tied = differing = 0
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == mergekit.DTYPES[kind]
        if case == "slerp" and not made_on_this_kind_of_processor():  # the order in which torch adds up
            torch.testing.assert_close(ours[name], value, rtol=4e-6 if kind == "fp32" else 1.6e-2, atol=1e-7)
            continue
        different = (ours[name] != value).view(-1)
        may = at_the_cut(kind, name) if case.startswith("ties") else torch.zeros_like(different)
        assert not (different & ~may).any(), f"{name}: {int((different & ~may).sum())} entries differ"
        tied, differing = tied + int(may.sum()), differing + int(different.sum())
    if kind == "fp32" or not case.startswith("ties"):
        assert differing == 0
    else:
        assert 0 < differing < tied < 100  # of 4,432


def at_the_cut(kind: str, name: str) -> Tensor:
    """Which entries tie at the smallest magnitude that a trimmed delta keeps, and another is dropped."""
    dtype = mergekit.DTYPES[kind]
    base, one, two = (mergekit.model(which, dtype)[name].view(-1) for which in mergekit.NAMES)
    tied = torch.zeros(base.numel(), dtype=torch.bool)
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
    for delta, density in ((one - base, 0.37), (two - base, (0.9, 0.2)[layer])):
        sizes = delta.abs()
        k = max(1, int(density * sizes.numel()))
        ranked = sizes.sort(descending=True).values
        if ranked[k - 1] == ranked[k]:
            tied |= sizes == ranked[k - 1]
    return tied


def test_mergekits_dare_in_distribution(written: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """Its masks are drawn elsewhere: what is the same is the share kept, the norm, and the kept entries."""
    values = {**mergekit.dare(written["fp32"]), "fidelity": "mergekit"}
    base, one = (mergekit.model(name, torch.float32) for name in ("base", "one"))
    shares = []
    for got in (made.merged(tmp_path / "out", values), stored("dare_linear", "fp32")):
        kept = count = 0
        total = expected = 0.0
        for name, value in got.items():
            delta, found = as_float64(one[name] - base[name]), as_float64(value) - as_float64(base[name])
            mask = found != 0
            kept, count = kept + int(mask.sum()), count + mask.size
            total, expected = total + found.sum(), expected + delta.sum()
            assert np.abs(found).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-4)
            factor = np.abs(delta).sum() / np.abs(delta[mask]).sum()
            np.testing.assert_allclose(found[mask], delta[mask] * factor, rtol=0, atol=2e-8)
        spread = 0.02 * np.sqrt(count)  # of a sum of so many entries of about this size
        assert abs(total - expected) < 4 * spread
        shares.append(kept / count)
    for share in shares:
        assert abs(share - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 4432)
    assert shares[0] != shares[1]


def test_the_stored_outputs_are_those_of_the_models_here() -> None:
    """make.py's models have not changed since: a weighted sum of them is what mergekit wrote."""
    models = [mergekit.model(name, torch.float32) for name in ("one", "two")]
    for name, value in stored("linear", "fp32").items():
        mean = (0.7 * as_float64(models[0][name]) + 0.4 * as_float64(models[1][name])) / 1.1
        np.testing.assert_allclose(as_float64(value), mean, rtol=1e-5, atol=1e-8)
    with safe_open(mergekit.OUTPUTS, framework="pt") as file:
        assert file.metadata()["mergekit"] == "0.1.5"
