"""The GPU kernels without a GPU: numbers from Triton's interpreter, and (slow) code from its compiler.

Both say what the kernels would do; `benchmarks/gpu_step.py` asks a GPU what they do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.unit.ops.kernels.triton_cases import CASES

from trimtab.ops.kernels.triton_columns import COLUMNS, DOUBLES, INTEGERS, SINGLES, column

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (pip install triton==3.7.1, which torch 2.13 goes with)",
)


def cases(*arguments: str, interpret: bool = True, **environment: str) -> Any:
    """What `triton_cases` prints, in a process of its own: importing triton chooses the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.ops.kernels.triton_cases", *arguments],
        env=os.environ | {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What came of each case."""
    found: dict[str, str] = cases()
    return found


@needs_triton
@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, results: dict[str, str]) -> None:
    assert results[name] == "", results[name]


@needs_triton
def test_no_kernel_is_loaded_for_the_cpu() -> None:
    code = (
        "import sys, trimtab.ops.kernels.engine as e; e.engines_for('cpu'); "
        "sys.exit('triton' in sys.modules or 'trimtab.ops.kernels.triton_engine' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_columns_stand_where_the_host_writes_them() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert COLUMNS[column(INTEGERS[0]) :] == INTEGERS + SINGLES + DOUBLES
    assert column("cut_index") == column("cut_bits") + 1
    assert column("tau_index") == column("tau_bits") + 1
    assert column("tau_factor") == column("update_factor") + 1


def test_a_layout_falls_into_pieces_within_32_bits() -> None:
    from trimtab.ops.kernels.triton_tables import pieces_of, program_blocks
    from trimtab.ops.layout import Layout

    for layout in (
        Layout.whole((5, 7)),
        Layout((6, 7, 8), start=(1, 2, 3), local=(4, 3, 5)),
        Layout((7, 1 << 31), start=(0, 50), local=(7, 60)),
        Layout((5, (1 << 32) - 9), start=(0, 0), local=(5, 40)),
        Layout((1 << 34,), start=((1 << 32) - 100,), local=(300,)),
    ):
        pieces = pieces_of(layout, 0, "w")
        found = []
        for first, count, base, run, stride, high, *_ in pieces.tolist():
            assert first == len(found)
            found += [(high << 32) + (base + j // run * stride + j % run) % (1 << 32) for j in range(count)]
        assert found == layout.indices().tolist(), layout
        programs = program_blocks(pieces, 16)
        assert sum(min(16, pieces[p, 1] - 16 * b) for p, b in programs.tolist()) == layout.numel


@needs_triton
def test_the_bracket_of_a_search_holds_the_threshold() -> None:
    from trimtab.ops.kernels.triton_search import Shape, bracket_of

    shape = Shape()
    for total, count in ((100, 7), (10**6, 10**4), (10**8, 5 * 10**7), (10**8, 100), (10**8, 10**8 - 1)):
        capacity, upper, lower, samples = bracket_of(total, count, shape)
        assert upper * total <= count * samples <= lower * total
        assert capacity <= total
        assert total <= shape.samples or capacity >= total * (lower - upper) / samples or capacity == total
    half = bracket_of(10**8, 5 * 10**7, shape)
    assert half[0] < 0.08 * 10**8  # bytes of scratch for each entry: 8 times that share


# -- compiled for an H200, without one (slow)

BASIC: dict[str, Any] = {
    "BLOCK": 2048,
    "RUNS": False,
    "ALIGNED": True,
    "INTERPRET": False,
    "MODE": "MERGE",
    "SOURCE": "ADVANCE",
    "ANCHOR": False,
    "REOPEN": False,
    "PARAM": torch.float32,
    "STORED": "NEAREST",
    "WIDE": False,
    "GRAD": torch.float32,
    "MOMENT": torch.float32,
    "GREATEST": False,
    "TAU": "DENSE",
    "TAU_KIND": torch.float32,
    "THIN": "BERNOULLI",
    "THIN_TAU": "BERNOULLI",
    "HASH": True,
    "FINE": True,
    "SKIP": False,
    "RESCALE": False,
    "VOTE": "LINEAR",
}
BF16 = {"PARAM": torch.bfloat16, "GRAD": torch.bfloat16, "MOMENT": torch.bfloat16}
KEPT = {"THIN": "TOP", "THIN_TAU": "KEEP_ALL", "HASH": False, "VOTE": "SIGN", "SOURCE": "REPEAT"}
SWEEPS: dict[str, dict[str, Any]] = {
    "OnDARE": {},
    "OnDARE, unaligned shard of columns": {"ALIGNED": False, "RUNS": True},
    "OnDARE, p = 0.01, rescaled": {"SKIP": True, "RESCALE": True},
    "OnDARE, bf16 with a residual": BF16 | {"STORED": "RESIDUAL"},
    "OnDARE, bf16 stochastic, τ in int8": BF16 | {"STORED": "STOCHASTIC", "TAU": "INT8"},
    "fp16 with a residual": {"PARAM": torch.float16, "STORED": "RESIDUAL", "GRAD": torch.float16},
    "fp16 stochastic": {"PARAM": torch.float16, "STORED": "STOCHASTIC", "TAU_KIND": torch.bfloat16},
    "fp32 with a residual, anchored": {"STORED": "RESIDUAL", "WIDE": True, "ANCHOR": True, "REOPEN": True},
    "fp32 stochastic": {"STORED": "STOCHASTIC", "WIDE": True},
    "OnTIES, sparse τ": KEPT | {"TAU": "SPARSE"},
    "OnTIES, τ unmasked, AMSGrad": KEPT | {"THIN_TAU": "TOP", "VOTE": "SIGN_UNWEIGHTED", "GREATEST": True},
    "OnTIES of a given Δ": KEPT | {"SOURCE": "BUFFER", "TAU": "INT8"},
    "plain": {"MODE": "PLAIN", "HASH": False},
    "Δ alone": {"MODE": "FORM", "HASH": False, "ANCHOR": True},
    "wrapper": {"SOURCE": "NOTHING", "ANCHOR": True},
}
TYPES = {
    **dict.fromkeys(("owners", "which", "states", "bins", "listed_bits", "listed_index"), "*i32"),
    **dict.fromkeys(("pieces", "rows", "searches", "short"), "*i64"),
}


def compiled(function: Any, arguments: dict[str, Any], warps: int = 8) -> Any:
    """The kernel compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trimtab.ops.kernels import triton_kernels, triton_numbers

    def value(given: Any) -> Any:
        if isinstance(given, str):
            return getattr(triton_kernels if hasattr(triton_kernels, given) else triton_numbers, given)
        return triton_kernels.FORMATS[given] if isinstance(given, torch.dtype) else given

    constants = {name: getattr(value(v), "value", value(v)) for name, v in arguments.items()}
    constants = {name: constants[name] for name in function.arg_names if name not in TYPES}
    signature = {name: TYPES.get(name, "constexpr") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in TYPES}
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def check_code(kernel: Any) -> str:
    """No flushed subnormals, no registers spilled to memory; returns the PTX."""
    ptx: str = kernel.asm["ptx"]
    assert not re.search(r"\b(add|sub|mul|fma|div\.\w+|sqrt\.\w+)\.ftz\.f32", ptx)
    assert len(kernel.asm["cubin"]) > 0
    return ptx


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_compile(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from trimtab.ops.kernels.triton_kernels import sweep

    arguments = BASIC | SWEEPS[name]
    ptx = check_code(compiled(sweep, arguments))
    wide = re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx)
    assert bool(wide) == arguments["ALIGNED"]  # reads of 16 bytes wherever addresses allow
    if name == "OnDARE":
        assert len(wide) == 10  # 5 tensors, 8 entries of each for every thread
        assert len(re.findall(r"fma\.rn\.f32", ptx)) == 4 * 8  # those that are asked for, none by contraction


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "scan", "narrow", "gather", "choose", "exhaust", "tick"])
def test_the_kernels_of_a_search_compile(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from trimtab.ops.kernels import triton_kernels, triton_select

    arguments = BASIC | {"SAMPLES": 8192, "BINS": 2048, "SHORT": 2048, "KEEP": True}
    if name == "exhaust":
        arguments |= {"BLOCK": 1024, "SOURCE": "REPEAT", "ALIGNED": False}
    function = getattr(triton_select, name, None) or getattr(triton_kernels, name)
    kernel = compiled(function, arguments, warps=16 if name in ("sample", "exhaust") else 8)
    if name != "tick":  # whose fp64 logarithms come from a library
        check_code(kernel)


@needs_triton
@pytest.mark.slow
def test_launches_are_what_the_compiler_takes(tmp_path: Any) -> None:
    """Each launch binds its arguments and compiles; few launches serve all tensors of a kind."""
    found = cases("launches", interpret=False, TRITON_CACHE_DIR=str(tmp_path))
    dare, ties, form = found[:2], found[2:-1], found[-1:]
    assert dare == ["sweep 21 8", "sweep 1 8"]  # fp32: one block of 2,048 and twenty; bf16
    assert sorted({launch.split()[0] for launch in ties}) == sorted(
        ["sample", "scan", "narrow", "gather", "choose", "exhaust", "sweep"]
    )
    assert form == ["sweep 1 8"]
