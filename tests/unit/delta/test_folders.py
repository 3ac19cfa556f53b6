"""Between folders: the delta is the difference of the loaded models' named_parameters(), bit for bit."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.delta.checkpoint import Checkpoint
from trimtab.errors import UserError
from trimtab.ops import content_hash

ARCHITECTURES = [
    made.llama,
    made.tied_llama,
    made.gpt2,
    made.qwen3_moe,
    made.mixtral,
    made.hrm_text,
]


def assert_equals(delta: ReferenceDelta, oracle: dict[str, Tensor]) -> None:
    assert delta.names() == tuple(oracle)
    for name, tau in oracle.items():
        ours = delta.tensor(name)
        assert ours.dtype == tau.dtype, name
        assert torch.equal(ours, tau), name
        assert delta.shape(name) == tuple(tau.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", ARCHITECTURES)
def test_equals_the_loaded_models(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = made.written(build(1).to(dtype), tmp_path / "reference")
    base = made.written(build(0).to(dtype), tmp_path / "base", shard="1GB")
    assert len(list(reference.glob("*.safetensors"))) > 1
    delta = ReferenceDelta.between(reference=reference, base=base)
    assert_equals(delta, made.expected(made.loaded(reference), made.loaded(base)))


def test_reward_models(tmp_path: Path) -> None:
    reference, base = made.reward(1), made.reward(0)
    folders = made.written(reference, tmp_path / "r"), made.written(base, tmp_path / "b")
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert_equals(delta, made.expected(reference, base))
    assert "score.weight" in delta


def test_fused_and_per_expert_files_mix(tmp_path: Path) -> None:
    reference, base = made.qwen3_moe(1), made.qwen3_moe(0)
    folders = (
        made.written(reference, tmp_path / "r", save_original_format=False),
        made.written(base, tmp_path / "b"),
    )
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert_equals(delta, made.expected(reference, base))


@pytest.mark.parametrize("build", [made.gpt2, made.tied_llama])
def test_a_base_saved_without_its_head_and_prefix(build: Any, tmp_path: Path) -> None:
    reference, base = build(1), build(0)
    folders = made.written(reference, tmp_path / "r"), made.written(base.base_model, tmp_path / "b")
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert_equals(delta, made.expected(reference, base))


def test_mixed_dtypes_are_subtracted_in_fp32(tmp_path: Path) -> None:
    reference, base = made.llama(1).to(torch.bfloat16), made.llama(0)
    folders = made.written(reference, tmp_path / "r"), made.written(base, tmp_path / "b")
    assert_equals(
        ReferenceDelta.between(reference=folders[0], base=folders[1]), made.expected(reference, base)
    )


@pytest.mark.parametrize("wide", [0, 1])
def test_an_fp64_source_gives_fp64(wide: int, tmp_path: Path) -> None:
    models = [made.llama(1), made.llama(0)]
    models[wide] = models[wide].double()
    folders = [made.written(model, tmp_path / str(i)) for i, model in enumerate(models)]
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert_equals(delta, made.expected(*models))
    assert delta.tensor("model.norm.weight", dtype=torch.float32).dtype == torch.float32


class TestTying:
    def test_a_stored_equal_copy_is_one_parameter(self, tmp_path: Path) -> None:
        models = made.tied_llama(1), made.tied_llama(0)
        folders = [made.written(model, tmp_path / str(i), "1GB") for i, model in enumerate(models)]
        made.edited(
            folders[0], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
        )
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        assert_equals(delta, made.expected(*models))
        assert "lm_head.weight" not in delta

    def test_only_the_head_is_stored(self, tmp_path: Path) -> None:
        models = made.tied_llama(1), made.tied_llama(0)
        folders = [made.written(model, tmp_path / str(i), "1GB") for i, model in enumerate(models)]
        made.edited(folders[0], lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        assert_equals(delta, made.expected(*models))

    def test_stored_copies_that_differ_are_not_tied_as_in_transformers(self, tmp_path: Path) -> None:
        models = made.tied_llama(1), made.tied_llama(0)
        folders = [made.written(model, tmp_path / str(i), "1GB") for i, model in enumerate(models)]
        for folder in folders:
            made.edited(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2.0}))
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        assert "lm_head.weight" in delta
        assert_equals(delta, made.expected(made.loaded(folders[0]), made.loaded(folders[1])))

    def test_an_untied_reference_of_a_tied_base(self, tmp_path: Path) -> None:
        reference, base = made.llama(1), made.tied_llama(0)
        folders = made.written(reference, tmp_path / "r"), made.written(base, tmp_path / "b")
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        head = reference.lm_head.weight - base.model.embed_tokens.weight
        assert torch.equal(delta.tensor("lm_head.weight"), head)

    def test_a_tied_reference_of_an_untied_base_is_refused(self, tmp_path: Path) -> None:
        folders = (
            made.written(made.tied_llama(1), tmp_path / "r"),
            made.written(made.llama(0), tmp_path / "b"),
        )
        with pytest.raises(UserError, match=r"1 extra \(lm_head.weight\)"):
            ReferenceDelta.between(reference=folders[0], base=folders[1])


class TestVocabulary:
    @pytest.mark.parametrize("build", [made.llama, made.tied_llama, made.gpt2])
    def test_added_rows_are_zero_and_reported(self, build: Any, tmp_path: Path) -> None:
        reference, base = build(1, vocab_size=43), build(0)
        folders = made.written(reference, tmp_path / "r"), made.written(base, tmp_path / "b")
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        ours, theirs = dict(reference.named_parameters()), dict(base.named_parameters())
        grown = [name for name in ours if ours[name].shape != theirs[name].shape]
        assert delta.added_rows == dict.fromkeys(grown, 3)
        for name in grown:
            tau = delta.tensor(name)
            assert torch.equal(tau[:40], ours[name][:40] - theirs[name])
            assert tau.shape[0] == 43
            assert not tau[40:].any()
        untouched = [name for name in ours if name not in grown]
        assert all(torch.equal(delta.tensor(name), ours[name] - theirs[name]) for name in untouched)

    def test_a_base_with_more_rows_is_refused(self, tmp_path: Path) -> None:
        folders = (
            made.written(made.llama(1), tmp_path / "r"),
            made.written(made.llama(0, vocab_size=43), tmp_path / "b"),
        )
        with pytest.raises(
            UserError, match=r"2 mismatched \(model.embed_tokens.weight \(43 × 16 in the base, 40"
        ):
            ReferenceDelta.between(reference=folders[0], base=folders[1])


class TestSlices:
    @pytest.mark.parametrize("build", [made.llama, made.qwen3_moe])
    def test_a_slice_is_the_part_of_the_whole(self, build: Any, tmp_path: Path) -> None:
        folders = made.written(build(1), tmp_path / "r"), made.written(build(0), tmp_path / "b")
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        stored = ReferenceDelta.load(delta.save(tmp_path / "delta"))
        for name in delta.names():
            whole = delta.tensor(name)
            for part in ((slice(1, 3),), (slice(0, 1), slice(2, 9))[: whole.dim()], (slice(5, 5),), ()):
                assert torch.equal(delta.slice(name, part), whole[part]), (name, part)
                assert torch.equal(stored.slice(name, part), whole[part]), (name, part)

    @pytest.mark.parametrize(
        "rows", [slice(0, 10), slice(38, 43), slice(40, 43), slice(41, None), slice(-2, None)]
    )
    def test_across_the_end_of_the_base(self, rows: slice, tmp_path: Path) -> None:
        folders = (
            made.written(made.llama(1, vocab_size=43), tmp_path / "r"),
            made.written(made.llama(0), tmp_path / "b"),
        )
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        whole = delta.tensor("lm_head.weight")
        assert torch.equal(delta.slice("lm_head.weight", (rows, slice(3, 7))), whole[rows, 3:7])

    def test_steps_and_too_many_dimensions_are_refused(self, tmp_path: Path) -> None:
        folders = made.written(made.llama(1), tmp_path / "r"), made.written(made.llama(0), tmp_path / "b")
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        for part in ((slice(0, 4, 2),), (slice(0, 1), slice(0, 1))):
            with pytest.raises(ValueError, match="slices of step 1"):
                delta.slice("model.norm.weight", part)


def test_harmless_buffers_in_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    models = made.gpt2(1), made.gpt2(0)
    folders = [made.written(model, tmp_path / str(i), "1GB") for i, model in enumerate(models)]
    made.edited(folders[1], lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}))
    assert_equals(ReferenceDelta.between(reference=folders[0], base=folders[1]), made.expected(*models))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made by torch operations and of those read from files."""

    def __init__(self) -> None:
        super().__init__()
        content_hash(torch.zeros(1 << 13))  # what hashes keep for good: 1 MB of indices, whatever the model
        self.seen = set[int]()
        self.now = 0
        self.peak = 0

    def count(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            weakref.finalize(storage, self.release, key, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.count(part)
        return result


WIDE = {"num_hidden_layers": 4, "hidden_size": 64}


@pytest.mark.parametrize(
    ("build", "settings"),
    [(made.llama, {"intermediate_size": 256}), (made.qwen3_moe, {"num_experts": 16})],
)
def test_peak_memory_is_that_of_one_parameter(
    build: Any, settings: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ_r, θ_b and τ of one parameter and what hashing one takes; whatever the size of the model."""
    folders = [
        made.written(build(seed, **WIDE, **settings), tmp_path / str(seed), "100KB") for seed in (1, 0)
    ]
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    sizes = [4 * delta.tensor(name).numel() for name in delta.names()]
    # Hashes and sums go through a tensor in chunks of a fixed size; make that small beside these tensors.
    monkeypatch.setattr("trimtab.delta.difference._CHUNK", 2048)
    monkeypatch.setattr("trimtab.ops.masks._CHUNK", 2048)
    live, read = LiveBytes(), Checkpoint.read

    def counted(self: Checkpoint, key: str) -> Tensor:
        tensor = read(self, key)
        live.count(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    with live:
        for name in delta.names():
            delta.tensor(name)
    assert 3 * max(sizes) <= live.peak < 3.6 * max(sizes), live.peak / max(sizes)
    with live:
        delta.save(tmp_path / "delta")
    # More: a cast copy for a hash (0.5), and the hash's temporaries for a chunk.
    assert live.peak < 5.5 * max(sizes), live.peak / max(sizes)
    assert sum(sizes) > 7 * max(sizes)


def test_making_one_reads_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = made.written(made.qwen3_moe(1), tmp_path / "r"), made.written(made.qwen3_moe(0), tmp_path / "b")
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, key: reads.append(key) or read(self, key))
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert not reads
    delta.tensor("model.layers.1.mlp.experts.down_proj")
    keys = {f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(4)}
    assert len(reads) == 8
    assert set(reads) == keys
