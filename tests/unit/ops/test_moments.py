"""Moments as stored: what is exact, what is unbiased, what is keyed, and that torchao's state stays so."""

from __future__ import annotations

import copy
import importlib.util
import io
import subprocess
import sys

import pytest
import torch

from trimtab.ops import moments, stochastic_round, uniform_u32
from trimtab.ops.layout import Layout
from trimtab.ops.masks import Place

N = 3 * (1 << 16) + 512
CHUNK = 1 << 16
WHOLE = Place(Layout.whole((N,)))


def keys(step=1, name="a", seed=0):
    return moments.keys(seed, step, name)


def normal(n=N, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def write_in_chunks(state, values, key, layout):
    flat = moments.flat(state)
    for low in range(0, values.numel(), CHUNK):
        high = min(low + CHUNK, values.numel())
        moments.write(flat, low, high, values[low:high], key, Place(layout, low))


def read_all(state):
    return moments.read(moments.flat(state), 0, state.numel())


# -- fp32 and fp64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_moments_are_read_as_themselves(dtype):
    state = moments.new_moment(torch.empty(4, 6, dtype=dtype), "float32", signed=True)
    assert state.dtype == dtype
    part = moments.read(moments.flat(state), 6, 12, dtype)
    part.add_(3)
    moments.write(moments.flat(state), 6, 12, part, keys()[0], Place(Layout.whole((4, 6)), 6))
    assert state.tolist() == [[0] * 6, [3] * 6, [0] * 6, [0] * 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_fp32_moments(dtype):
    assert moments.new_moment(torch.empty(2, dtype=dtype), "float32", signed=False).dtype == torch.float32


def test_moments_are_contiguous_and_plain():
    p = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    state = moments.new_moment(p, "float32", signed=True)
    assert state.is_contiguous()
    assert not state.requires_grad
    assert type(state) is torch.Tensor


def test_a_state_in_another_memory_format_is_straightened_once():
    state = torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = state.clone()
    moments.read(moments.flat(state), 0, 10).add_(1)
    assert torch.equal(state.reshape(-1)[:10], before.reshape(-1)[:10] + 1)
    assert torch.equal(state.reshape(-1)[10:], before.reshape(-1)[10:])


def test_none_stays_none():
    assert moments.flat(None) is None


# -- bf16


def test_bf16_is_the_stochastic_rounding_of_ops():
    values = normal()
    values[:5] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e-42])
    values[5:6] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(
        torch.float32
    )  # a NaN that must not carry
    layout = Layout((N // 256, 512), start=(0, 100), local=(N // 256, 256))
    for key in keys(step=7):
        state = moments.new_moment(values, "bfloat16", signed=True)
        write_in_chunks(state, values, key, layout)
        random = uniform_u32(values.shape, key, place=Place(layout))
        wanted = stochastic_round(values, torch.bfloat16, random)
        assert torch.equal(state.view(torch.int16), wanted.view(torch.int16))


def test_bf16_is_unbiased_and_rounds_to_neighbours():
    value = torch.tensor(1.0 + 2.0**-7 * 0.3)  # 0.3 of the way from 1 to the next bf16
    state = moments.new_moment(torch.empty(N), "bfloat16", signed=True)
    write_in_chunks(state, value.expand(N).contiguous(), keys()[0], WHOLE.layout)
    assert set(state.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    share = (float(state.to(torch.float64).mean()) - 1) / 2.0**-7
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / N) ** 0.5


def test_a_bf16_second_moment_follows_the_fp32_one():
    """v ← 0.999·v + 0.001·g²: rounded to nearest it would stand still, from 1 on down and from 0 on up."""
    n, start = 1 << 14, torch.ones(1 << 14)
    exact, nearest = start.clone(), start.to(torch.bfloat16)
    state = moments.new_moment(start, "bfloat16", signed=False)
    state.fill_(1)
    flat = moments.flat(state)
    for step in range(1, 201):
        v = moments.read(flat, 0, n).mul_(0.999)
        moments.write(flat, 0, n, v, keys(step)[1], Place(Layout.whole((n,))))
        exact.mul_(0.999)
        nearest = nearest.to(torch.float32).mul_(0.999).to(torch.bfloat16)
    assert float(exact[0]) == pytest.approx(0.8186, abs=1e-3)
    assert float(nearest[0]) == 1.0
    # Each of the 200 roundings adds at most a unit (2⁻⁸), independent over entries.
    assert float(state.to(torch.float64).mean()) == pytest.approx(
        float(exact[0]), abs=5 * 200**0.5 * 2.0**-8 / 128
    )


def test_bf16_bits_depend_on_seed_step_name_and_moment_alone():
    values = normal(4096)

    def stored(key, layout=None, values=values):
        state = moments.new_moment(values, "bfloat16", signed=True)
        write_in_chunks(state, values, key, layout or Layout.whole(values.shape))
        return state

    first, second = keys()
    assert torch.equal(stored(first), stored(keys()[0]))
    others = [second, keys(step=2)[0], keys(name="b")[0], keys(seed=1)[0]]
    for other in others:
        assert float((stored(first) != stored(other)).to(torch.float32).mean()) > 0.2
    shard = Layout((64, 64), start=(16, 8), local=(32, 40))
    part = values.view(64, 64)[shard.slices()].reshape(-1).contiguous()
    whole = stored(first, Layout.whole((64, 64))).view(64, 64)
    assert torch.equal(stored(first, shard, part), whole[shard.slices()].reshape(-1))


# -- 8 bits


needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (trimtab[lowbit])"
)


def moment_8bit(values, signed=True):
    state = moments.new_moment(values, "int8", signed=signed)
    write_in_chunks(state, values.reshape(-1), keys()[0], Layout.whole(values.shape))
    return state


@needs_torchao
@pytest.mark.parametrize("signed", [True, False])
def test_8bit_is_torchaos_state_bit_for_bit(signed):
    values = (normal() * torch.rand(N).pow(6)).view(-1, 512)
    values = values if signed else values.square()
    state = moment_8bit(values, signed)
    theirs = moments.torchao_state().zeros(values.shape, signed=signed)
    theirs.copy_(values)
    assert type(state) is moments.torchao_state()
    assert torch.equal(state.codes, theirs.codes)
    assert torch.equal(state.scale, theirs.scale)
    assert torch.equal(read_all(state), theirs.dequantize().reshape(-1))


@needs_torchao
@pytest.mark.parametrize("signed", [True, False])
def test_8bit_codes_are_torchaos_around_every_boundary(signed):
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    qmap = moments.new_moment(torch.empty(4096), "int8", signed=signed).qmap
    middles = (qmap[1:] + qmap[:-1]) / 2
    near = [middles]
    for _ in range(3):
        near += [torch.nextafter(near[-1], torch.tensor(2.0))]
    near += [
        torch.nextafter(middles, torch.tensor(-2.0)),
        qmap,
        torch.tensor([0.0, -0.0, 1.0, 1e-30, float("nan")]),
    ]
    values = torch.cat(near)
    assert torch.equal(moments._nearest_codes(values, signed), quantize_8bit_with_qmap(values, qmap))


@needs_torchao
def test_8bit_nan_stays_in_its_block():
    values = normal(4096)
    values[300] = float("nan")
    dense = read_all(moment_8bit(values))
    assert bool(dense[256:512].isnan().any())
    assert not bool(dense[:256].isnan().any())
    assert not bool(dense[512:].isnan().any())


@needs_torchao
def test_8bit_ranges_are_whole_blocks():
    state = moment_8bit(normal(4096))
    with pytest.raises(ValueError, match="cuts a block"):
        moments.read(moments.flat(state), 0, 100)


@needs_torchao
@pytest.mark.parametrize(
    ("layout", "fits"),
    [
        (Layout.whole((64, 64)), True),
        (Layout.whole((63, 64)), False),  # below 4,096 entries
        (Layout.whole((65, 65)), False),  # not a multiple of 256
        (Layout((256, 64), start=(64, 0), local=(64, 64)), True),
        (Layout((10_000,), start=(100,), local=(8192,)), False),  # begins within a block
        (Layout((10_000,), start=(256,), local=(8192,)), True),
        (Layout((64, 512), start=(0, 0), local=(64, 256)), False),  # columns: broken
        (Layout((64, 64), start=(64, 0), local=(0, 64)), False),
    ],
)
def test_8bit_where_blocks_fit_else_fp32(layout, fits):
    state = moments.new_moment(torch.empty(layout.local), "int8", signed=True, layout=layout)
    assert moments.is_8bit(state) == fits
    if not fits:
        assert state.dtype == torch.float32
    assert float(read_all(state).abs().sum()) == 0


@needs_torchao
def test_8bit_counts_its_bytes():
    state = moments.new_moment(torch.empty(512, 512), "int8", signed=True)
    assert moments.nbytes(state) == 512 * 512 + 4 * 1024 + 4 * 256


class Plain(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_goes_through_a_saved_optimizer(dtype):
    p = torch.nn.Parameter(torch.zeros(16, 512, dtype=dtype))
    state = moment_8bit(normal(16 * 512).view(16, 512))
    optimizer = Plain([p])
    optimizer.state[p] = {"exp_avg": state}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = Plain([torch.nn.Parameter(p.detach().clone())])
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    loaded = next(iter(other.state.values()))["exp_avg"]
    assert moments.is_8bit(loaded)
    assert torch.equal(read_all(loaded), read_all(state))
    write_in_chunks(loaded, normal(16 * 512, seed=1), keys()[0], Layout.whole((16, 512)))  # and goes on
    assert not torch.equal(read_all(loaded), read_all(state))


@needs_torchao
def test_8bit_optimizers_can_be_deep_copied():
    state = moment_8bit(normal(8192).view(16, 512))
    other = copy.deepcopy(state)
    assert torch.equal(read_all(other), read_all(state))
    write_in_chunks(other, normal(8192, seed=1), keys()[0], Layout.whole((16, 512)))
    assert not torch.equal(read_all(other), read_all(state))


@needs_torchao
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_8bit_goes_through_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = moment_8bit(normal(8192).view(16, 512))
    dcp.save({"exp_avg": state}, checkpoint_id=tmp_path, no_dist=True)
    target = {"exp_avg": moments.new_moment(torch.empty(16, 512), "int8", signed=True)}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    assert moments.is_8bit(target["exp_avg"])
    assert torch.equal(read_all(target["exp_avg"]), read_all(state))


@needs_torchao
def test_the_default_device_does_not_matter():
    values = normal(4096)
    wanted = {dtype: stored_as(dtype, values) for dtype in moments.STATE_DTYPES}
    moments._code_tables.cache_clear()
    with torch.device("meta"):
        for dtype, state in wanted.items():
            assert torch.equal(stored_as(dtype, values), state)


def stored_as(dtype, values):
    state = moments.new_moment(values, dtype, signed=True)
    write_in_chunks(state, values, keys()[0], Layout.whole((4096,)))
    return read_all(state)


# -- what is refused


def test_an_unknown_state_dtype_is_refused():
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        moments.check_state_dtype("float16")


def test_without_torchao_the_line_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ValueError, match=r"pip install 'trimtab\[lowbit\]'"):
        moments.check_state_dtype("int8")


@needs_torchao
def test_torchao_is_imported_only_when_asked_for_and_quietly():
    program = (
        "import sys, trimtab.ops.moments as m\n"
        "assert 'torchao' not in sys.modules\n"
        "m.check_state_dtype('int8')\n"
        "assert 'torchao' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
