"""Hub ids, from a cache that lies on this machine; nothing asks the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.delta.locate import locate
from trimtab.errors import UserError

COMMITS = {"main": "1" * 40, "v2": "2" * 40}


def cached(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Put a folder into a hub cache, as huggingface_hub lays it out."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(COMMITS[revision])
    shutil.copytree(folder, home / "snapshots" / COMMITS[revision])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name, seed in (("reference", 1), ("base", 0)):
        cached(tmp_path / "cache", f"lab/{name}", made.written(made.llama(seed), tmp_path / name))
    cached(tmp_path / "cache", "lab/base", made.written(made.llama(7), tmp_path / "later"), "v2")
    return tmp_path / "cache"


def test_ids_give_what_their_folders_give(cache: Path, tmp_path: Path) -> None:
    delta = ReferenceDelta.between(
        reference="lab/reference", base="lab/base", cache_dir=cache, local_files_only=True
    )
    folders = ReferenceDelta.between(reference=tmp_path / "reference", base=tmp_path / "base")
    assert delta.fingerprint == folders.fingerprint
    assert delta.reference.source == "lab/reference@111111111111"


def test_revisions(cache: Path, tmp_path: Path) -> None:
    options = {"reference": "lab/reference", "cache_dir": cache, "local_files_only": True}
    later = ReferenceDelta.between(base="lab/base", base_revision="v2", **options)
    oracle = made.expected(made.llama(1), made.llama(7))
    assert torch.equal(later.tensor("lm_head.weight"), oracle["lm_head.weight"])
    assert repr(later).startswith("ReferenceDelta(reference='lab/reference@1111")
    with pytest.raises(UserError, match=r"no folder 'lab/base' here, .* at revision 'v3'"):
        ReferenceDelta.between(base="lab/base", base_revision="v3", **options)


@pytest.mark.parametrize("name", ["lab/nothing", "nothing", "runs/sft"])
def test_what_is_neither_here_nor_cached(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"no folder '{name}' here, and the hub does not give"):
        locate(name, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["./lab/base", "/nowhere/at/all", "a/b/c", "a b", "../x"])
def test_what_cannot_be_an_id(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a hub id"):
        locate(name, cache_dir=cache, local_files_only=True)


def test_a_shard_that_was_never_fetched(cache: Path) -> None:
    shard = sorted(cache.glob("models--lab--reference/snapshots/*/model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        ReferenceDelta.between(
            reference="lab/reference", base="lab/base", cache_dir=cache, local_files_only=True
        )


class TestFetching:
    """What is asked of the hub: a stand-in for the client, which only notes patterns."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def snapshot_download(name: str, **options: Any) -> str:
            calls.append({"name": name, **options})
            return str(tmp_path / name.split("/")[1])

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return calls

    def test_shards_are_those_of_the_index(self, asked: list[dict[str, Any]], tmp_path: Path) -> None:
        folder = made.written(made.llama(1), tmp_path / "model")
        (folder / "pytorch_model.bin").write_bytes(b"")
        (folder / "other.safetensors").write_bytes(b"")
        assert locate("lab/model", revision="v1").folder == folder
        assert [call["revision"] for call in asked] == ["v1", "v1"]
        assert asked[1]["allow_patterns"] == sorted(file.name for file in folder.glob("model-*.safetensors"))

    def test_a_single_file(self, asked: list[dict[str, Any]], tmp_path: Path) -> None:
        made.written(made.llama(1), tmp_path / "model", "1GB")
        locate("lab/model")
        assert asked[1]["allow_patterns"] == [
            "model.safetensors",
            "adapter_model.safetensors",
            "initial_adapter.safetensors",
        ]

    def test_pickles_and_subfolders_never(self, asked: list[dict[str, Any]], tmp_path: Path) -> None:
        from huggingface_hub.utils import filter_repo_objects

        made.written(made.llama(1), tmp_path / "model", "1GB")
        locate("lab/model")
        files = [
            *("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"),
            *("model.safetensors", "pytorch_model.bin", "model.pt", "consolidated.00.pth", "modeling_x.py"),
            *("original/model.safetensors", "onnx/config.json", "README.md", "model.gguf"),
        ]
        fetched: set[str] = set()
        for call in asked:
            patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
            fetched |= set(filter_repo_objects(files, **patterns))
        assert fetched == set(files[:6])

    @pytest.mark.parametrize(
        "error", ["LocalEntryNotFoundError", "RepositoryNotFoundError", "OfflineModeIsEnabled"]
    )
    def test_errors_of_the_hub_are_sentences(self, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import errors

        kind = getattr(errors, error)

        def snapshot_download(name: str, **options: Any) -> str:
            raise kind.__new__(kind, "No such thing.\nSecond line.")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(UserError, match="the hub does not give a model of that name") as raised:
            locate("lab/model")
        assert "\n" not in str(raised.value)
