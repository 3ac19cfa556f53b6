"""Saving and loading: the same values and the same record, all or nothing."""

from __future__ import annotations

import copy
import errno
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.delta.storage import SafetensorsWriter, TensorSpec
from trimtab.errors import IncompatibleState, UserError


@pytest.fixture
def delta(tmp_path: Path) -> ReferenceDelta:
    reference, base = made.tied_llama(1, vocab_size=42), made.tied_llama(0)
    base.model.norm.weight.data.add_(0.5)
    folders = made.written(reference, tmp_path / "r"), made.written(base, tmp_path / "b")
    return ReferenceDelta.between(reference=folders[0], base=folders[1])


class TestRoundTrip:
    def test_everything_comes_back(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        path = delta.save(tmp_path / "out" / "delta")
        assert sorted(file.name for file in path.iterdir()) == ["delta.json", "delta.safetensors"]
        saved = ReferenceDelta.load(path)
        assert saved.names() == delta.names()
        assert saved.measure() == delta.measure()
        assert saved.added_rows == delta.added_rows == {"model.embed_tokens.weight": 2}
        assert repr(saved) == repr(delta)
        assert all(torch.equal(saved.tensor(name), delta.tensor(name)) for name in delta.names())
        values = load_file(path / "delta.safetensors")  # any reader can open it
        assert all(torch.equal(values[name], delta.tensor(name)) for name in delta.names())
        assert len(values) == len(delta)

    def test_measuring_before_or_while_saving_is_the_same(
        self, delta: ReferenceDelta, tmp_path: Path
    ) -> None:
        fresh = ReferenceDelta.between(reference=tmp_path / "r", base=tmp_path / "b")
        delta.measure()
        files = [one.save(tmp_path / name) for name, one in (("one", delta), ("two", fresh))]
        for name in ("delta.json", "delta.safetensors"):
            assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()

    def test_saving_a_loaded_delta_again(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        first = delta.save(tmp_path / "one")
        second = ReferenceDelta.load(first).save(tmp_path / "two")
        assert (first / "delta.safetensors").read_bytes() == (second / "delta.safetensors").read_bytes()
        ReferenceDelta.load(first).save(first, overwrite=True)
        assert ReferenceDelta.load(first).measure() == delta.measure()

    def test_live_models(self, tmp_path: Path) -> None:
        reference, base = made.gpt2(1), made.gpt2(0)
        delta = ReferenceDelta.between(reference=reference, base=base)
        saved = ReferenceDelta.load(delta.save(tmp_path / "d"))
        assert saved.measure() == delta.measure()
        assert saved.reference.source == "GPT2LMHeadModel in memory"

    def test_mixed_dtypes(self, tmp_path: Path) -> None:
        reference, base = made.llama(1), made.llama(0)
        reference.model.norm.double()  # somewhere in the middle, so the order of writing differs
        base.model.norm.weight.data.add_(0.5)
        oracle = made.expected(reference, base)
        saved = ReferenceDelta.load(
            ReferenceDelta.between(reference=reference, base=base).save(tmp_path / "d")
        )
        assert saved.names() == tuple(oracle)
        assert saved.tensor("model.norm.weight").dtype == torch.float64
        assert saved.tensor("lm_head.weight").dtype == torch.float32
        assert all(torch.equal(saved.tensor(name), oracle[name]) for name in oracle)
        assert reference.model.norm.weight.eq(1.0).all()  # measuring writes to nothing

    def test_copies_are_itself_and_loaded_ones_pickle(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        assert copy.deepcopy(delta) is delta
        assert copy.copy(delta) is delta
        saved = ReferenceDelta.load(delta.save(tmp_path / "d"))
        saved.tensor("model.norm.weight")
        again = pickle.loads(pickle.dumps(saved))
        assert torch.equal(again.tensor("model.norm.weight"), delta.tensor("model.norm.weight"))


class TestStatistics:
    def test_against_numpy(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        reference = made.tied_llama(1, vocab_size=42)
        for name, parameter in reference.named_parameters():
            tau = delta.tensor(name).double().numpy()
            one = delta.statistics[name]
            assert one.norm == pytest.approx(np.sqrt((tau**2).sum()), rel=1e-12)
            assert one.mean_abs == pytest.approx(np.abs(tau).mean(), rel=1e-12)
            assert one.zeros == (tau == 0).mean()
            assert one.numel == tau.size
            assert one.shape == tau.shape
            assert one.dtype == "float32"
            squares = parameter.detach().double().numpy() ** 2
            assert one.reference_norm == pytest.approx(np.sqrt(squares.sum()), rel=1e-12)
        assert delta.statistics["model.embed_tokens.weight"].zeros == 2 / 42

    def test_many_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = made.llama(1), made.llama(0)
        whole = ReferenceDelta.between(reference=models[0], base=models[1]).statistics
        monkeypatch.setattr("trimtab.delta.difference._CHUNK", 7)
        parts = ReferenceDelta.between(reference=models[0], base=models[1]).statistics
        for name, one in parts.items():
            assert one.norm == pytest.approx(whole[name].norm, rel=1e-12)
            assert one.mean_abs == pytest.approx(whole[name].mean_abs, rel=1e-12)
            assert one.zeros == whole[name].zeros

    def test_scalars_and_empty_parameters(self, tmp_path: Path) -> None:
        def module(value: float) -> torch.nn.Module:
            module = torch.nn.Module()
            module.scalar = torch.nn.Parameter(torch.tensor(value))
            module.empty = torch.nn.Parameter(torch.empty(0, 3))
            return module

        delta = ReferenceDelta.between(reference=module(2.0), base=module(0.5))
        saved = ReferenceDelta.load(delta.save(tmp_path / "d"))
        assert saved.tensor("scalar").item() == 1.5
        assert saved.tensor("empty").shape == (0, 3)
        assert saved.statistics["empty"].norm == 0.0
        assert saved.statistics["scalar"].mean_abs == 1.5

    def test_progress_is_told(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        told: list[tuple[str, int, int]] = []
        watched = ReferenceDelta.between(
            reference=tmp_path / "r", base=tmp_path / "b", progress=lambda *step: told.append(step)
        )
        assert not told
        assert watched.fingerprint == delta.fingerprint
        total = sum(math.prod(delta.shape(name)) for name in delta.names())
        assert [name for name, _, _ in told] == list(delta.names())
        assert told[-1][1:] == (total, total)
        watched.measure()  # known by now
        assert len(told) == len(delta)


class TestFingerprints:
    def test_every_part_counts(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        def changed(index: int) -> ReferenceDelta:
            model = made.tied_llama(1, vocab_size=42)
            model.model.layers[0].mlp.up_proj.weight.data.view(-1)[index] += 1e-6
            return ReferenceDelta.between(
                reference=made.written(model, tmp_path / f"changed{index}"), base=tmp_path / "b"
            )

        fingerprints = {delta.fingerprint, changed(0).fingerprint, changed(100).fingerprint}
        assert len(fingerprints) == 3
        assert changed(0).base.fingerprint == delta.base.fingerprint
        assert changed(0).reference.fingerprint != delta.reference.fingerprint

    def test_shards_and_sources_do_not(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        other = made.written(made.tied_llama(1, vocab_size=42), tmp_path / "elsewhere", "1GB")
        again = ReferenceDelta.between(reference=other, base=tmp_path / "b")
        assert again.fingerprint == delta.fingerprint
        assert again.reference.fingerprint == delta.reference.fingerprint
        assert again.reference.source == str(other)

    def test_dtype_and_shape_do(self) -> None:
        def module(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
            module = torch.nn.Module()
            module.w = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
            return module

        def fingerprint(*shape: int, dtype: torch.dtype = torch.float32) -> str:
            base = module(*shape, dtype=dtype)
            torch.nn.init.zeros_(base.w)
            return ReferenceDelta.between(reference=module(*shape, dtype=dtype), base=base).fingerprint

        known = {fingerprint(2, 3), fingerprint(3, 2), fingerprint(6), fingerprint(6, dtype=torch.float64)}
        assert len(known) == 4
        assert fingerprint(6) == fingerprint(6, dtype=torch.bfloat16)  # τ is fp32 in both


class TestTarget:
    def test_an_existing_delta_stays_unless_told(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        path = delta.save(tmp_path / "d")
        before = (path / "delta.json").read_bytes()
        with pytest.raises(UserError, match=r"already holds a delta; .*--overwrite"):
            delta.save(path)
        assert (path / "delta.json").read_bytes() == before
        delta.save(path, overwrite=True)

    def test_an_empty_folder_is_taken(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        assert ReferenceDelta.load(delta.save(tmp_path / "d")).fingerprint == delta.fingerprint

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_other_folders_are_never_replaced(
        self, delta: ReferenceDelta, tmp_path: Path, overwrite: bool
    ) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match=r"other files \(thesis.tex\)"):
            delta.save(tmp_path / "d", overwrite=overwrite)
        assert [file.name for file in (tmp_path / "d").iterdir()] == ["thesis.tex"]

    def test_a_file(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        (tmp_path / "d").write_text("")
        with pytest.raises(UserError, match="is a file; give the name of a folder"):
            delta.save(tmp_path / "d", overwrite=True)

    def test_below_a_file(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        (tmp_path / "d").write_text("")
        with pytest.raises(UserError, match=r"d/deep/er cannot be made, since .*/d is a file; give a folder"):
            delta.save(tmp_path / "d" / "deep" / "er")

    def test_no_room(self, delta: ReferenceDelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Usage:
            free = 100

        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
        with pytest.raises(UserError, match="MB are free where"):
            delta.save(tmp_path / "d")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "r"]

    def test_a_disk_that_fills_up(
        self, delta: ReferenceDelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, written = SafetensorsWriter.write, []

        def full(self: SafetensorsWriter, name: str, values: torch.Tensor) -> None:
            if len(written) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(name)
            write(self, name, values)

        monkeypatch.setattr(SafetensorsWriter, "write", full)
        with pytest.raises(UserError, match=r"cannot write the delta to .*d \(0 MB\): No space left"):
            delta.save(tmp_path / "d")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "r"]

    def test_a_crash_leaves_the_old_one(
        self, delta: ReferenceDelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = delta.save(tmp_path / "d")

        def crash(self: Any, fingerprint: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(SafetensorsWriter, "seal", crash)
        with pytest.raises(KeyboardInterrupt):
            delta.save(path, overwrite=True)
        assert ReferenceDelta.load(path).measure() == delta.measure()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "d", "r"]


class TestLoading:
    @pytest.fixture
    def path(self, delta: ReferenceDelta, tmp_path: Path) -> Path:
        return delta.save(tmp_path / "d")

    def edit(self, path: Path, **changes: Any) -> None:
        record = json.loads((path / "delta.json").read_text())
        (path / "delta.json").write_text(json.dumps({**record, **changes}))

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no delta folder .*trimtab delta --reference R --base B OUT"):
            ReferenceDelta.load(tmp_path / "nothing")

    def test_a_model_folder(self, delta: ReferenceDelta, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"holds no delta.json, so it is no delta"):
            ReferenceDelta.load(tmp_path / "r")

    def test_a_later_version(self, path: Path) -> None:
        self.edit(path, version=2, trimtab="9.0")
        with pytest.raises(IncompatibleState, match=r"version 2 and this trimtab reads version 1; .*\(9.0\)"):
            ReferenceDelta.load(path)

    def test_another_format(self, path: Path) -> None:
        self.edit(path, format="gguf")
        with pytest.raises(UserError, match="format 'gguf', not 'trimtab-delta'"):
            ReferenceDelta.load(path)

    def test_a_damaged_record(self, path: Path) -> None:
        self.edit(path, tensors={"model.norm.weight": {}})
        with pytest.raises(UserError, match="is damaged"):
            ReferenceDelta.load(path)
        (path / "delta.json").write_text("{")
        with pytest.raises(UserError, match="not valid JSON"):
            ReferenceDelta.load(path)

    def test_truncated_values(self, path: Path) -> None:
        values = path / "delta.safetensors"
        values.write_bytes(values.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"delta.safetensors is no whole safetensors file"):
            ReferenceDelta.load(path)

    def test_missing_values(self, path: Path) -> None:
        (path / "delta.safetensors").unlink()
        with pytest.raises(UserError, match=r"delta.safetensors is missing"):
            ReferenceDelta.load(path)

    def test_files_of_two_deltas(self, path: Path, tmp_path: Path) -> None:
        models = made.tied_llama(5, vocab_size=42), made.tied_llama(0, vocab_size=42)
        other = ReferenceDelta.between(reference=models[0], base=models[1]).save(tmp_path / "other")
        (path / "delta.safetensors").write_bytes((other / "delta.safetensors").read_bytes())
        with pytest.raises(IncompatibleState, match="do not belong together"):
            ReferenceDelta.load(path)

    def test_values_that_were_never_finished(self, tmp_path: Path, path: Path) -> None:
        record = json.loads((path / "delta.json").read_text())
        specs = [TensorSpec(n, torch.float32, tuple(t["shape"])) for n, t in record["tensors"].items()]
        with SafetensorsWriter(path / "delta.safetensors", specs) as writer:
            for spec in specs:
                writer.write(spec.name, torch.zeros(spec.shape))
        with pytest.raises(IncompatibleState, match="do not belong together"):
            ReferenceDelta.load(path)
