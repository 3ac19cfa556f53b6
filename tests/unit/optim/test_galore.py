"""GaLore against its paper's algorithm in float64, alone and inside online merging."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.oracle import galore as oracle
from tests.oracle.reference import Method, Parameter
from trimtab import OnlineMerging, ReferenceDelta, UserError
from trimtab.optim import GaLoreAdamW, ProjectorWarning
from trimtab.optim import galore as module
from trimtab.optim.precision import anchor_like
from trimtab.optim.subspace import leading_vectors

SHAPES = {"wide": (5, 9), "high": (9, 5), "square": (6, 6)}
RANK, GAP, SCALE = 3, 4, 0.25


class Policy(nn.Module):
    """Three matrices, an embedding and a vector."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {**SHAPES, "embed": (7, 5), "bias": (6,)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(values.to(torch.bfloat16).to(dtype)))


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Random gradients of a step that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(p.shape, generator=generator).to(torch.bfloat16).to(p.dtype)
        for name, p in model.named_parameters()
    }


def take_step(model: nn.Module, optimizer: Any, step: int) -> None:
    for name, grad in gradients(model, step).items():
        model.get_parameter(name).grad = grad
    optimizer.step()


def built(model: nn.Module, **settings: Any) -> GaLoreAdamW:
    given = {"lr": 0.05, "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, **settings}
    return GaLoreAdamW(model.named_parameters(), **given)


def expected_inner(place: int, shape: tuple[int, int]) -> oracle.GaLore:
    return oracle.GaLore(shape, RANK, GAP, SCALE, offset=place * GAP // len(SHAPES))


def as_array(p: Tensor) -> Any:
    return p.detach().to(torch.float64).numpy()


# -- the step


def test_steps_are_the_paper_s() -> None:
    model = Policy()
    optimizer = built(model, weight_decay=0.1)
    plain = Policy()
    adamw = torch.optim.AdamW(plain.named_parameters(), lr=0.05, weight_decay=0.1)
    twins = {
        name: Parameter(
            list(as_array(getattr(model, name)).reshape(-1)), None, expected_inner(i, shape), NONE
        )
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for step in range(11):
        for name, twin in twins.items():
            twin.step(list(as_array(gradients(model, step)[name]).reshape(-1)), lr=0.05, decay=0.1)
        take_step(model, optimizer, step)
        take_step(plain, adamw, step)
        for name, shape in SHAPES.items():
            wanted = np.array(twins[name].theta).reshape(shape)
            np.testing.assert_allclose(as_array(getattr(model, name)), wanted, rtol=0, atol=1e-12)
        assert torch.equal(model.embed, plain.embed)  # by its name
        assert torch.equal(model.bias, plain.bias)  # no matrix
    shapes = {name: tuple(optimizer.state[getattr(model, name)]["exp_avg"].shape) for name in SHAPES}
    assert shapes == {"wide": (3, 9), "high": (9, 3), "square": (3, 6)}


NONE = Method("none", "linear")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Method("top", "sign"), {"sparsify": "top", "consensus": "sign"}),
        (NONE, {"sparsify": "none", "consensus": "linear"}),
    ],
    ids=["top and sign", "all and linear"],
)
@pytest.mark.parametrize("every", [1, 3])
def test_merged_in_full_space_as_the_papers_say(method: Method, settings: dict[str, Any], every: int) -> None:
    """F acts on the update of the whole matrix, not in the subspace."""
    model, base = Policy(), Policy(1)
    delta = ReferenceDelta.between(reference=model, base=base)
    rate = 0.5 if method.kind == "top" else 1.0
    optimizer = OnlineMerging(
        built(model, weight_decay=0.1), delta, **settings, reserve_rate=rate, merge_weight=0.2,
        merge_every=every,
    )  # fmt: skip
    twins = {
        name: Parameter(
            list(as_array(getattr(model, name)).reshape(-1)),
            list(delta.tensor(name).to(torch.float64).numpy().reshape(-1)),
            expected_inner(i, shape),
            method,
        )
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for step in range(7):
        for name, twin in twins.items():
            grad = list(as_array(gradients(model, step)[name]).reshape(-1))
            twin.step(grad, lr=0.05, decay=0.1, merge_weight=0.2, reserve_rate=rate, merge_every=every)
        take_step(model, optimizer, step)
        for name, shape in SHAPES.items():
            wanted = np.array(twins[name].theta).reshape(shape)
            np.testing.assert_allclose(as_array(getattr(model, name)), wanted, rtol=0, atol=1e-12)


def test_at_full_rank_it_is_adamw_in_turned_coordinates() -> None:
    """With scale 1 and one projector P: P'W moves as AdamW moves it with the gradients P'G."""
    model = Policy()
    start = {name: getattr(model, name).detach().clone() for name in SHAPES}
    optimizer = built(model, rank=99, scale=1.0, update_proj_gap=1000, weight_decay=0.1)
    take_step(model, optimizer, 0)
    turn = {name: optimizer.state[getattr(model, name)]["projector"] for name in SHAPES}

    def turned(name: str, value: Tensor) -> Tensor:
        return turn[name].T @ value if value.shape[0] <= value.shape[1] else value @ turn[name]

    mirrored = {name: nn.Parameter(turned(name, value)) for name, value in start.items()}
    adamw = torch.optim.AdamW(mirrored.items(), lr=0.05, weight_decay=0.1)
    for step in range(6):
        for name, p in mirrored.items():
            p.grad = turned(name, gradients(model, step)[name])
        adamw.step()
        if step:
            take_step(model, optimizer, step)
    for name, p in mirrored.items():
        torch.testing.assert_close(turned(name, getattr(model, name)), p, rtol=0, atol=1e-12)
        assert not torch.allclose(getattr(model, name), p, atol=1e-3)


def test_where_the_first_gradient_is_diagonal_full_rank_is_adamw() -> None:
    """The projector is the identity then, and stays so until it is renewed."""
    ours, theirs = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    galore = GaLoreAdamW([("w", ours)], lr=0.1, rank=4, scale=1.0)
    adamw = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    for step in range(4):
        grad = torch.diag(torch.tensor([4.0, -3.0, 2.0, 1.0])) if step == 0 else torch.randn(4, 4)
        ours.grad, theirs.grad = grad, grad.clone()
        galore.step()
        adamw.step()
    assert torch.equal(galore.state[ours]["projector"], torch.eye(4))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float16, 1e-6)])
def test_below_fp32_the_master_is_the_fp32_run_s(dtype: torch.dtype, tolerance: float) -> None:
    """Exactly for bf16; fp16 and its residual have fewer bits than fp32."""
    wide, narrow = Policy(dtype=torch.float32), Policy(dtype=dtype)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    optimizers = [built(model, lr=1e-3) for model in (wide, narrow)]
    for step in range(6):
        for model, optimizer in zip((wide, narrow), optimizers, strict=True):
            for name, grad in gradients(wide, step).items():
                p = model.get_parameter(name)
                p.grad = grad.to(p.dtype)
            optimizer.step()
    for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
        state = optimizers[1].state[q]
        master = anchor_like(q, state["merge_residual"], "residual")
        torch.testing.assert_close(master, p.detach(), rtol=0, atol=tolerance)
        assert state["exp_avg"].dtype == torch.float32


# -- projectors


def test_singular_vectors_are_numpy_s_with_their_signs_fixed() -> None:
    for shape in ((4, 9), (9, 4), (5, 5)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        wide = matrix if shape[0] <= shape[1] else matrix.T
        found = leading_vectors(matrix, 3)
        assert found is not None
        np.testing.assert_allclose(
            found[0].numpy(), oracle.leading_left_vectors(wide.numpy(), 3), rtol=0, atol=1e-12
        )


def test_each_matrix_renews_its_projector_at_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [(f"layers.{i}.weight", nn.Parameter(torch.ones(3, 3))) for i in range(6)]
    optimizer = GaLoreAdamW(matrices, lr=0.1, rank=2, update_proj_gap=3)
    renewed: list[list[str]] = []
    numbers = {id(p): name.split(".")[1] for name, p in matrices}
    owner: dict[int, str] = {}

    def spied(matrix: Tensor, rank: int) -> Any:
        renewed[-1].append(owner[matrix.data_ptr()])
        return leading_vectors(matrix, rank)

    monkeypatch.setattr(module, "leading_vectors", spied)
    for _ in range(7):
        renewed.append([])
        for _, p in matrices:
            p.grad = torch.randn(3, 3)
            owner[p.grad.data_ptr()] = numbers[id(p)]
        optimizer.step()
    by_time = [["0", "1"], ["2", "3"], ["4", "5"]]
    assert renewed == [["0", "1", "2", "3", "4", "5"], *by_time[1:], *by_time, by_time[0]]


def test_matrices_that_are_added_later_do_not_move_the_others_times() -> None:
    model = Policy()
    optimizer = built(model)
    take_step(model, optimizer, 0)
    more = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    optimizer.add_param_group({"params": [("more", more)]})
    more.grad = torch.randn_like(more)
    take_step(model, optimizer, 1)
    offsets = [optimizer.state[p]["projector_offset"] for p in (model.wide, model.high, model.square, more)]
    assert offsets == [0, 1, 2, 3]  # of three in a gap of 4, and the last of four


def failing(*_: Any, **__: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def test_where_the_svd_fails_the_gram_matrix_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, other = Policy(), Policy()
    optimizers = [built(usual), built(other)]
    for step in range(5):
        take_step(usual, optimizers[0], step)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(5):
            take_step(other, optimizers[1], step)
    sentence = (
        "the SVD of the gradient of wide failed, and they were taken from its Gram matrix; this is said once "
        "and counted in the optimizer's fallbacks"
    )
    assert [(str(one.message), one.category) for one in said] == [(sentence, ProjectorWarning)]
    assert optimizers[1].fallbacks == {"eigh": 6}  # three at the first step, then each at its own
    assert not optimizers[0].fallbacks
    for p, q in zip(usual.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_where_nothing_converges_the_projector_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Policy()
    optimizer = built(model, update_proj_gap=1)
    take_step(model, optimizer, 0)
    before = optimizer.state[model.wide]["projector"].clone()
    monkeypatch.setattr(torch.linalg, "svd", failing)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.warns(
        ProjectorWarning,
        match=r"of wide failed, and its last projector was kept \(the axes, where it had none\)",
    ):
        take_step(model, optimizer, 1)
    assert torch.equal(optimizer.state[model.wide]["projector"], before)
    assert optimizer.fallbacks == {"kept": 3}
    fresh = Policy()
    optimizer = built(fresh)
    with pytest.warns(ProjectorWarning):
        take_step(fresh, optimizer, 0)
    assert torch.equal(optimizer.state[fresh.high]["projector"], torch.eye(5, 3, dtype=torch.float64))


def test_a_gradient_that_is_not_finite_goes_on_as_in_adamw() -> None:
    model = Policy()
    optimizer = built(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with pytest.warns(ProjectorWarning):
        optimizer.step()
    assert all(bool(p.isnan().all()) for p in (model.wide, model.embed))


def test_gradients_of_zeros_leave_the_projector_for_later() -> None:
    """A LoRA A whose B is 0 has none at the first step."""
    model = Policy()
    optimizer = built(model, weight_decay=0.5, update_proj_gap=1000)
    start = model.wide.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert "projector" not in optimizer.state[model.wide]
    torch.testing.assert_close(model.wide.detach(), start * (1 - 0.05 * 0.5), rtol=0, atol=1e-15)
    take_step(model, optimizer, 1)
    found = leading_vectors(gradients(model, 1)["wide"], RANK)
    assert found is not None
    assert torch.equal(optimizer.state[model.wide]["projector"], found[0])


# -- saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True], ids=["alone", "merged"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype: torch.dtype, merged: bool) -> None:
    delta = ReferenceDelta.between(reference=Policy(dtype=dtype), base=Policy(1, dtype=dtype))

    def optimizer_of(model: nn.Module) -> Any:
        inner = built(model, lr=1e-2)
        if not merged:
            return inner
        return OnlineMerging(
            inner, delta, sparsify="top", consensus="sign", merge_weight=0.1, merge_every=2, reserve_rate=0.5
        )

    whole = Policy(dtype=dtype)
    straight = optimizer_of(whole)
    for step in range(5):
        take_step(whole, straight, step)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    again, other = copy.deepcopy(whole), io.BytesIO(file.getvalue())
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(other, weights_only=True))
    assert resumed.state[again.wide]["exp_avg"].dtype == torch.float32
    for step in range(5, 12):
        take_step(whole, straight, step)
        take_step(again, resumed, step)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_deepcopy_and_lr_of_zero() -> None:
    model = Policy()
    optimizer = built(model)
    take_step(model, optimizer, 0)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for _, group in enumerate(twin.param_groups):
        group["lr"] = 0.0
    before = [p.detach().clone() for p in twin_model.parameters()]
    take_step(twin_model, twin, 1)
    assert all(torch.equal(p, q) for p, q in zip(twin_model.parameters(), before, strict=True))


# -- refusals


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "rank must be a whole number ≥ 1, got 0"),
        ({"rank": 2.5}, r"rank must be a whole number ≥ 1, got 2\.5"),
        ({"update_proj_gap": True}, "update_proj_gap must be a whole number ≥ 1, got True"),
        ({"scale": 0.0}, r"scale must be above 0, got 0\.0"),
        ({"lr": -1.0}, r"lr must be ≥ 0, got -1\.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"plain": "("}, r"plain pattern '\(' is no regular expression"),
        ({"plain": ["head"]}, "plain pattern 'head' finds none of the 5 parameters; .* like 'wide'"),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        built(Policy(), **settings)


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"tells by name what it projects: pass model.named_parameters"):
        GaLoreAdamW(Policy().parameters())  # type: ignore[arg-type]


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match=r"weight has a sparse gradient; GaLore needs dense ones"):
        GaLoreAdamW(table.named_parameters()).step()


def test_a_closure_s_loss_is_returned_and_its_gradient_used() -> None:
    model, twin = Policy(), Policy()
    ours, theirs = built(model), built(twin)

    def closure() -> Any:
        loss = model.wide.square().sum()
        loss.backward()
        return loss.detach()

    twin.wide.square().sum().backward()
    theirs.step()
    start = float(model.wide.detach().square().sum())
    assert float(ours.step(closure) or 0) == start
    assert torch.equal(model.wide, twin.wide)


@pytest.fixture
def two_processes() -> Iterator[Any]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def test_sharded_matrices_are_refused(two_processes: Any) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), two_processes, [Shard(0)]))
    p.grad = torch.zeros_like(p)
    with pytest.raises(
        UserError, match=r"w is sharded, and GaLore needs whole matrices .* DDP instead of FSDP2"
    ):
        GaLoreAdamW([("w", p)]).step()
