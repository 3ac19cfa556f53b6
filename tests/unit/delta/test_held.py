"""τ as an optimizer holds it: read once and in part, freed, rebuilt where p moves, the same on shards."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from trimtab import ReferenceDelta
from trimtab.delta.held import DoubleBuffer, HeldDelta
from trimtab.errors import UserError
from trimtab.ops import MaskKey, bernoulli_mask
from trimtab.ops.formats import DenseTau, Int8Tau, SparseTau, hold_dense, hold_int8, hold_sparse
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place

SHAPES = {"a.weight": (24, 300), "a.bias": (24,), "b.weight": (3, 8, 128), "scalar": (), "nothing": (0, 4)}


class CountingDelta:
    """A delta in memory that notes what was read, and hands out copies, so that what is freed can be seen."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.tau = {n: torch.randn(s, generator=generator, dtype=dtype) * 1e-3 for n, s in SHAPES.items()}
        self.reads: list[tuple[str, int]] = []
        self.alive: list[weakref.ref] = []

    def tensor(self, name, dtype=None):
        return self._handed_out(name, self.tau[name], dtype)

    def slice(self, name, slices, dtype=None):
        return self._handed_out(name, self.tau[name][slices], dtype)

    def _handed_out(self, name, values, dtype):
        values = values.to(dtype or values.dtype, copy=True)
        self.reads.append((name, values.numel()))
        self.alive.append(weakref.ref(values.untyped_storage()))
        return values

    def still_alive(self):
        gc.collect()
        return sum(ref() is not None for ref in self.alive)


def whole(name):
    return Layout.whole(SHAPES[name])


def get(held, name, layout=None, dtype=torch.float32, **settings):
    return held.get(name, layout or whole(name), device="cpu", dtype=dtype, **settings)


def dense(tau):
    return tau.dense(0, tau.numel)


def drawn(name, p, layout=None):
    """F(τ) of a Bernoulli mask drawn once."""
    layout = layout or whole(name)
    key = MaskKey(0, 1, 0, name)

    def mask(values, at=layout):
        keep = bernoulli_mask(values.shape, p, key, place=Place(at), device=values.device)
        return torch.where(keep, values, 0.0)

    return mask


@pytest.fixture
def delta():
    return CountingDelta()


# -- formats


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("storage", "hold"),
    [
        ("auto", hold_dense),
        ("float32", hold_dense),
        ("bfloat16", lambda x: hold_dense(x, torch.bfloat16)),
        ("int8", hold_int8),
    ],
)
def test_storages_hold_what_their_formats_hold(delta, name, storage, hold):
    tau, wanted = get(HeldDelta(delta, storage), name), hold(delta.tau[name])
    assert type(tau) is type(wanted)
    assert not tau.masked
    assert torch.equal(dense(tau), dense(wanted))


def test_fp64_parameters_get_fp64(delta):
    delta = CountingDelta(torch.float64)
    for storage in ("auto", "float32"):
        tau = get(HeldDelta(delta, storage), "a.weight", dtype=torch.float64)
        assert dense(tau).dtype == torch.float64
        assert torch.equal(dense(tau), delta.tau["a.weight"].reshape(-1))
    tau = get(
        HeldDelta(delta, "sparse"), "a.weight", dtype=torch.float64, mask=drawn("a.weight", 0.1), key=0.1
    )
    assert tau.values.dtype == torch.float64


@pytest.mark.parametrize(
    ("storage", "p", "kind"),
    [
        ("auto", 0.1, SparseTau),
        ("auto", 0.5, DenseTau),
        ("float32", 0.1, DenseTau),
        ("bfloat16", 0.1, DenseTau),
        ("int8", 0.1, Int8Tau),
        ("sparse", 0.5, SparseTau),
    ],
)
def test_masked_once_the_mask_is_in_what_is_held(delta, storage, p, kind):
    mask = drawn("a.weight", p)
    tau = get(HeldDelta(delta, storage), "a.weight", mask=mask, key=p)
    wanted = mask(delta.tau["a.weight"].reshape(-1))
    assert type(tau) is kind
    assert tau.masked
    assert torch.equal(dense(tau) == 0, wanted == 0) or storage == "int8"
    assert bool((dense(tau)[wanted == 0] == 0).all())
    if storage in ("auto", "float32", "sparse"):
        assert torch.equal(dense(tau), wanted)
    else:
        assert torch.allclose(dense(tau), wanted, rtol=2.0**-8, atol=float(wanted.abs().max()) / 254)


def test_auto_goes_sparse_up_to_a_quarter():
    delta = CountingDelta()
    delta.tau["a.bias"] = torch.ones(24)
    for kept, kind in ((6, SparseTau), (7, DenseTau)):
        tau = get(HeldDelta(delta), "a.bias", mask=lambda x, k=kept: x * (torch.arange(24) < k), key=0)
        assert type(tau) is kind


# -- reading, keeping, freeing


def test_what_is_read_is_read_once_and_only_the_part_asked_for(delta):
    held, part = HeldDelta(delta), Layout((24, 300), start=(6, 0), local=(6, 300))
    one = get(held, "a.weight", part)
    assert get(held, "a.weight", Layout((24, 300), start=(6, 0), local=(6, 300))) is one
    assert delta.reads == [("a.weight", 1800)]
    get(held, "a.weight", Layout((24, 300), start=(12, 0), local=(6, 300)))
    assert delta.reads == [("a.weight", 1800)] * 2


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "sparse"])
def test_what_was_read_is_freed_when_it_is_held_otherwise(delta, storage):
    held = HeldDelta(delta, storage)
    for name in SHAPES:
        mask = drawn(name, 0.1) if storage == "sparse" else None
        get(held, name, mask=mask, key=None if mask is None else 0.1)
    assert len(delta.reads) == len(SHAPES)
    assert delta.still_alive() == 0


def test_dense_fp32_is_the_tensor_that_was_read(delta):
    held = HeldDelta(delta)
    tau = get(held, "a.weight")
    assert delta.still_alive() == 1
    assert tau.values.untyped_storage().data_ptr() == delta.alive[0]().data_ptr()


def test_bytes_are_counted(delta):
    n = 24 * 300
    sizes = {"auto": 4 * n, "bfloat16": 2 * n, "int8": n + 4 * (n // 128 + 1)}
    for storage, size in sizes.items():
        held = HeldDelta(delta, storage)
        assert held.nbytes() == 0
        get(held, "a.weight")
        assert held.nbytes() == size
    held = HeldDelta(delta)
    tau = get(held, "a.weight", mask=drawn("a.weight", 0.1), key=0.1)
    assert held.nbytes() == tau.nbytes == 6 * tau.values.numel() + 16
    held.clear()
    assert held.nbytes() == 0


def test_another_p_rebuilds_and_keeps_tau_from_then_on(delta):
    held = HeldDelta(delta)
    calls = []

    def at(p):
        mask = drawn("a.weight", p)

        def counted(values):
            calls.append(p)
            return mask(values)

        tau = get(held, "a.weight", mask=counted, key=p)
        assert torch.equal(dense(tau), mask(delta.tau["a.weight"].reshape(-1)))
        return tau

    at(0.1), at(0.1)
    assert (calls, len(delta.reads), delta.still_alive()) == ([0.1], 1, 0)
    at(0.2)
    assert (calls, len(delta.reads), delta.still_alive()) == ([0.1, 0.2], 2, 1)
    size = held.nbytes()
    tau = at(0.05)
    assert (calls, len(delta.reads)) == ([0.1, 0.2, 0.05], 2)  # τ is not read again
    assert held.nbytes() == 4 * 24 * 300 + tau.nbytes < size


def test_another_dtype_or_layout_is_read_anew(delta):
    held = HeldDelta(delta)
    get(held, "a.weight")
    assert dense(get(held, "a.weight", dtype=torch.float64)).dtype == torch.float64
    assert len(delta.reads) == 2


def test_another_device_is_read_anew_and_nothing_more_is_kept(delta):
    held = HeldDelta(delta)
    for device in ("cpu", "meta"):
        tau = held.get("a.weight", whole("a.weight"), device=device, dtype=torch.float32)
        assert tau.device.type == device
        assert held.nbytes() == tau.nbytes
    assert len(delta.reads) == 2


def test_a_copy_holds_nothing_and_reads_again(delta):
    held = HeldDelta(delta, "bfloat16", "host")
    get(held, "a.weight")
    other = copy.deepcopy(held)
    assert (other.storage, other.device, other.nbytes()) == ("bfloat16", "host", 0)
    assert torch.equal(dense(get(other, "a.weight")), dense(get(held, "a.weight")))


def test_a_real_delta_is_held(tmp_path):
    torch.manual_seed(0)
    base, reference = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    live = ReferenceDelta.between(reference=reference, base=base)
    stored = ReferenceDelta.load(live.save(tmp_path / "delta"))
    layout = Layout((30, 40), start=(10, 5), local=(7, 30))
    for delta in (live, stored):
        for storage in ("auto", "int8"):
            tau = HeldDelta(delta, storage).get("weight", layout, device="cpu", dtype=torch.float32)
            all_of_it = HeldDelta(delta, storage).get(
                "weight", Layout.whole((30, 40)), device="cpu", dtype=torch.float32
            )
            wanted = dense(all_of_it).view(30, 40)[10:17, 5:35].reshape(-1)
            assert torch.equal(dense(tau), wanted)
            assert torch.allclose(wanted, live.tensor("weight")[10:17, 5:35].reshape(-1), atol=2e-3)


@pytest.mark.parametrize("storage", ["auto", "bfloat16", "int8", "sparse"])
def test_the_default_device_does_not_matter(delta, storage):
    mask, wanted = drawn("a.weight", 0.1), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            wanted.append(dense(get(HeldDelta(delta, storage), "a.weight", mask=mask, key=0.1)))
    assert torch.equal(*wanted)


# -- shards


def shards(shape):
    yield Layout.whole(shape)
    if len(shape) == 1:
        for start in range(0, shape[0], 7):
            yield Layout(shape, (start,), (min(7, shape[0] - start),))
        return
    for at in (0, 1, len(shape) - 1):
        size = -(-shape[at] // 3)
        for start in range(0, shape[at], size):
            starts, local = [0] * len(shape), list(shape)
            starts[at], local[at] = start, min(size, shape[at] - start)
            yield Layout(shape, tuple(starts), tuple(local))


@pytest.mark.parametrize(
    ("storage", "masked"),
    [(s, m) for s in ("auto", "float32", "bfloat16", "int8") for m in (False, True)] + [("sparse", True)],
)
@pytest.mark.parametrize("name", ["a.weight", "a.bias", "b.weight"])
def test_shards_hold_the_values_of_the_whole(delta, storage, masked, name):
    def values(layout):
        settings = {}
        if masked:
            mask = drawn(name, 0.2, layout)
            settings = {"mask": mask, "key": 0.2, "mask_at": mask}
        return dense(get(HeldDelta(delta, storage), name, layout, **settings))

    full = values(whole(name)).view(SHAPES[name])
    layouts = list(shards(SHAPES[name]))
    assert len(layouts) > 3
    for layout in layouts:
        assert torch.equal(values(layout), full[layout.slices()].reshape(-1))


def test_a_row_shard_of_int8_reads_little_more_than_its_rows(delta):
    get(HeldDelta(delta, "int8"), "a.weight", Layout((24, 300), start=(8, 0), local=(8, 300)))
    assert delta.reads == [("a.weight", 300 * (8 + 2))]  # blocks begin in row 7 and end in row 16


def test_empty_shards_are_held_and_masked(delta):
    layout, seen = Layout((24, 300), start=(24, 0), local=(0, 300)), []

    def mask(values):
        seen.append(values.numel())
        return values

    for storage in ("auto", "int8", "sparse", "bfloat16"):
        tau = get(HeldDelta(delta, storage), "a.weight", layout, mask=mask, key=0)
        assert dense(tau).numel() == 0
    assert seen == [0] * 4  # a mask that communicates is called on every process


# -- identity and refusals


def test_exact_storages_are_one_identity():
    described = {s: HeldDelta(CountingDelta(), s).describe() for s in ("auto", "float32", "sparse")}
    assert set(described.values()) == {"exact"}
    others = {HeldDelta(CountingDelta(), s).describe() for s in ("bfloat16", "int8")}
    assert len(others | {"exact"}) == 3
    assert not any(" " in text or "=" in text for text in others)  # a word of the identity string


def test_sparse_without_a_mask_is_refused(delta):
    with pytest.raises(UserError, match=r"delta_storage 'sparse'.*redraw=False"):
        get(HeldDelta(delta, "sparse"), "a.weight")
    assert delta.reads == []


def test_int8_of_a_masked_shard_that_cuts_blocks_wants_to_know_the_neighbours(delta):
    layout = Layout((24, 300), start=(8, 0), local=(8, 300))
    with pytest.raises(UserError, match=r"cuts its blocks .*'bfloat16'"):
        get(HeldDelta(delta, "int8"), "a.weight", layout, mask=drawn("a.weight", 0.5, layout), key=0.5)


@pytest.mark.parametrize(("argument", "value"), [("storage", "int4"), ("device", "disk")])
def test_unknown_words_are_refused(delta, argument, value):
    with pytest.raises(UserError, match=f"unknown delta_{argument} '{value}'"):
        HeldDelta(delta, **{argument: value})


# -- host memory


def test_on_the_cpu_host_is_parameter(delta):
    held = HeldDelta(delta, "bfloat16", "host")
    held.prefetch(["a.weight", "a.bias"])
    one = get(held, "a.weight")
    held.prefetch(["a.weight", "a.bias"])
    assert get(held, "a.weight") is one
    assert not held.streams
    assert held.nbytes() == one.nbytes


@pytest.fixture
def on_host(delta, monkeypatch):
    """A held delta that takes the CPU for a GPU whose memory is not the host's."""
    monkeypatch.setattr(HeldDelta, "_belongs_on_host", lambda self, device: self.device == "host")
    for kind in (DenseTau, SparseTau, Int8Tau):
        monkeypatch.setattr(kind, "pin_memory", lambda tau: tau.map(torch.Tensor.clone))
    return HeldDelta(delta, "bfloat16", "host")


def test_from_the_host_every_tau_is_a_copy_of_its_own(delta, on_host):
    taken = {name: get(on_host, name) for name in SHAPES}
    assert on_host.streams
    for name, tau in taken.items():
        assert torch.equal(dense(tau), delta.tau[name].reshape(-1).to(torch.bfloat16).float())
        assert tau.values.data_ptr() != on_host._entries[name].tau.values.data_ptr() or tau.numel == 0
    assert on_host.nbytes() == sum(tau.nbytes for tau in taken.values())
    assert delta.still_alive() == 0


def test_after_the_promise_two_are_on_the_device(delta, on_host):
    sizes = [get(on_host, name).nbytes for name in SHAPES]
    for _ in range(2):
        on_host.prefetch(list(SHAPES))
        for name in SHAPES:
            tau = get(on_host, name)
            assert torch.equal(dense(tau), delta.tau[name].reshape(-1).to(torch.bfloat16).float())
        copies = on_host.nbytes() - sum(sizes)
        assert max(sizes) <= copies <= 2 * (max(sizes) + 256)
    on_host.prefetch([])
    first, second, third = (get(on_host, name) for name in ("a.weight", "b.weight", "a.weight"))
    assert torch.equal(dense(first), dense(third))
    assert first.values.data_ptr() != third.values.data_ptr()
    assert dense(second).numel() == 3 * 8 * 128
    assert len(delta.reads) == len(SHAPES)


def test_from_the_host_another_p_is_still_rebuilt(delta, on_host):
    for p in (0.1, 0.2, 0.3):
        mask = drawn("a.weight", p)
        on_host.prefetch(["a.weight"])
        tau = get(on_host, "a.weight", mask=mask, key=p)
        wanted = mask(delta.tau["a.weight"].reshape(-1)).to(torch.bfloat16).float()
        assert torch.equal(dense(tau), wanted)
    assert len(delta.reads) == 2


def test_two_places_take_turns():
    """What a GPU gets: each τ in order, never more than two, and the one in use is never written to."""
    torch.manual_seed(0)
    x = [torch.randn(n) * (torch.rand(n) < 0.3) for n in (1000, 70_000, 33, 5000, 0)]
    held = [
        hold_dense(x[0]),
        hold_sparse(x[1]),
        hold_int8(x[2]),
        hold_dense(x[3], torch.bfloat16),
        hold_sparse(x[4]),
    ]
    buffer = DoubleBuffer(torch.device("cpu"))
    largest = max(tau.nbytes for tau in held)
    for _ in range(3):
        buffer.start(held[0])
        for tau, following in zip(held, [*held[1:], None], strict=True):
            copied = buffer.take(tau, following)
            assert type(copied) is type(tau)
            assert torch.equal(dense(copied), dense(tau))
            ours = {t.untyped_storage().data_ptr() for t in copied.tensors() if t.numel()}
            theirs = {t.untyped_storage().data_ptr() for t in tau.tensors() if t.numel()}
            assert len(ours) <= 1
            assert not ours & theirs
    assert largest < buffer.nbytes <= 2 * (largest + 3 * 256)


def test_places_survive_another_order():
    held = [hold_dense(torch.full((n,), float(n))) for n in (100, 200, 300)]
    buffer = DoubleBuffer(torch.device("cpu"))
    for i, following in ((0, 1), (2, 0), (2, 1), (1, None), (0, 1), (1, 0)):
        copied = buffer.take(held[i], None if following is None else held[following])
        assert torch.equal(copied.values, held[i].values)
