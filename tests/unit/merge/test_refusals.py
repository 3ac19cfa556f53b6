"""What a merge refuses, what the sentence says, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.delta import checkpoints as made_models
from tests.unit.merge import made, test_adapters
from tests.unit.merge.place import SHAPES, Place
from trimtab.errors import UserError
from trimtab.merge import merge, writer
from trimtab.merge.config import read_config

ANCHORED = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# tensors that do not fit


def misfit(place: Place) -> None:
    """``two`` lacks a tensor, has one more, and has one of another shape."""

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.1.extra"] = torch.ones(2)
        tensors["model.layers.0.w"] = torch.ones(4, 5)

    place.write("two", edit)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_all_that_does_not_fit_is_told_at_once(place: Place, method: str) -> None:
    misfit(place)
    place.refuses(
        place.values(method),
        [
            "do not have the same tensors as",
            "base",
            "allow_partial",
            "1 missing (model.norm.weight in",
            "two",
            "1 extra (model.layers.1.extra in",
            "1 mismatched (model.layers.0.w (4 × 5 in",
            "4 × 4 expected",
        ],
    )


def test_many_are_counted_and_the_first_few_named(place: Place) -> None:
    place.write("one", lambda t: [t.pop(key) for key in list(t)[1:]])
    place.write("two", lambda t: [t.pop(key) for key in list(t)[1:]])
    sentence = place.refuses(place.values(), ["6 missing (", ", …)"])
    assert sentence.count(" in ") == 4


def test_what_is_shared_is_merged_where_that_was_asked_for(place: Place) -> None:
    misfit(place)
    values = place.values("linear", allow_partial=True)
    got = place.merged(values)
    base, one, two = place.tensors.values()
    assert sorted(got) == sorted(SHAPES)
    both = "model.layers.0.w"
    torch.testing.assert_close(got[both], (base[both] + one[both]) / 2)
    all_three = "model.layers.1.w"
    torch.testing.assert_close(got[all_three], (base[all_three] + one[all_three] + two[all_three]) / 3)
    card = (place.folder / "out" / "README.md").read_text()
    assert "merged in part, as allow_partial allows: 1 missing (model.norm.weight in" in card
    assert "1 extra (model.layers.1.extra in" in card
    assert "1 mismatched (model.layers.0.w (4 × 5 in" in card


def test_in_a_partial_merge_a_tensor_that_only_the_base_has_is_the_bases(place: Place) -> None:
    for name in ("one", "two"):
        place.write(name, lambda t: t.pop("model.norm.weight"))
    got = place.merged(place.values("ties", allow_partial=True))
    assert torch.equal(got["model.norm.weight"], place.tensors["base"]["model.norm.weight"])


@pytest.mark.parametrize("method", ["slerp", "hma"])
def test_in_a_partial_merge_of_two_a_tensor_that_only_the_base_has_is_the_bases(
    place: Place, method: str
) -> None:
    place.write("one", lambda t: t.pop("model.norm.weight"))
    got = place.merged(place.values(method, allow_partial=True))
    assert torch.equal(got["model.norm.weight"], place.tensors["base"]["model.norm.weight"])


def test_a_slice_beyond_the_layers(place: Place) -> None:
    sources = [{"model": str(place.folder / name), "layer_range": [1, 3]} for name in ("one", "two")]
    values = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    place.refuses(values, ["layer_range [1, 3] of", "one", "2 layers"])


@pytest.mark.parametrize("method", [*ANCHORED, "linear", "slerp", "hma"])
def test_other_architectures(place: Place, method: str) -> None:
    place.write("one", model_type="gpt2")
    place.refuses(place.values(method), ["model_type 'llama'", "one of 'gpt2'", "one architecture only"])


# models that are no models to merge


@pytest.mark.parametrize("method", ANCHORED)
def test_a_model_that_is_the_base(place: Place, method: str) -> None:
    place.tensors["two"] = place.tensors["base"]
    place.write("two")
    place.refuses(
        place.values(method), ["two equals the base", "base in every entry", "give the model that was tuned"]
    )


def test_a_model_that_is_the_base_but_for_one_entry_is_merged(place: Place) -> None:
    place.tensors["two"] = {name: value.clone() for name, value in place.tensors["base"].items()}
    place.tensors["two"]["model.norm.weight"][-1] += 1
    place.write("two")
    assert place.merged(place.values())


def test_a_model_that_is_the_base_in_another_dtype(place: Place) -> None:
    place.write("base", lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    place.write(
        "two", lambda t: t.update({n: v.bfloat16().float() for n, v in place.tensors["base"].items()})
    )
    place.refuses(place.values(), ["two equals the base"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", [*ANCHORED, "linear", "slerp", "hma"])
@pytest.mark.parametrize("which", ["base", "one"])
def test_weights_that_are_not_finite(
    place: Place, method: str, value: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found while it is written, in the last tensor of several files: even the hidden folder goes."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
        tensors["model.norm.weight"][2] = value

    place.write(which, edit)
    words = ["tensor 'model.norm.weight' of", which, str(value), "finite"]
    place.refuses(place.values(method), words, shard_size=64)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("fidelity", ["paper", "mergekit"])
def test_a_result_beyond_fp16(place: Place, method: str, fidelity: str) -> None:
    for name in place.tensors:
        place.write(name, lambda t: t.update({n: v.to(torch.float16) for n, v in t.items()}))
    values = place.values(method, fidelity=fidelity, parameters={"normalize": False})
    for item in values["models"]:
        item["parameters"] = {"weight": 1e6}
    place.refuses(
        values, ["merging 'model.embed_tokens.weight' gives values that float16 cannot hold", "out_dtype"]
    )


def test_pickles(place: Place) -> None:
    folder = place.folder / "one"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    place.refuses(
        place.values(), ["one holds pickled weights", "python -c", "from_pretrained", "save_pretrained"]
    )


def test_quantized_weights(place: Place) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(4).to(torch.float8_e4m3fn)

    place.write("one", edit)
    place.refuses(place.values(), ["'model.norm.weight'", "F8_E4M3", "dequantize"])


def test_a_truncated_file(place: Place) -> None:
    file = place.folder / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    place.refuses(place.values(), ["one/model.safetensors", "no whole safetensors file"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_that_are_equal_are_copied(place: Place, dtype: torch.dtype) -> None:
    buffer = torch.arange(6).view(2, 3).to(dtype)
    for name in place.tensors:
        place.write(name, lambda t: t.update({"model.position_ids": buffer}))
    for method in ("ties", "linear", "slerp"):
        got = place.merged(place.values(method), overwrite=True)["model.position_ids"]
        assert got.dtype == dtype
        assert torch.equal(got, buffer)


@pytest.mark.parametrize("method", ["ties", "linear", "slerp"])
def test_whole_numbers_that_differ(place: Place, method: str) -> None:
    for name, last in (("base", 5), ("one", 7), ("two", 5)):
        place.write(name, lambda t, last=last: t.update({"position_ids": torch.tensor([1, last])}))  # type: ignore[misc]
    place.refuses(place.values(method), ["'position_ids' holds whole numbers", "differ between", "one"])


def test_weights_that_sum_to_0(place: Place) -> None:
    values = place.values("task_arithmetic", parameters={"normalize": True})
    for item, weight in zip(values["models"], (0.5, -0.5), strict=True):
        item["parameters"] = {"weight": weight}
    place.refuses(values, ["the weights for 'model.embed_tokens.weight' sum to 0", "normalize: false"])


# where it is to be written


@pytest.fixture
def there(place: Place) -> Path:
    """A model that lies in OUT."""
    place.merged(place.values())
    return place.folder / "out"


def test_an_output_that_is_there(place: Place, there: Path) -> None:
    place.refuses(place.values("linear"), ["out is there already", "--overwrite"])


def test_it_is_replaced_where_that_was_asked_for(place: Place, there: Path) -> None:
    (there / "left.txt").write_text("over")
    place.merged(place.values("linear"), overwrite=True)
    assert not (there / "left.txt").exists()
    assert "linear" in (there / "merge.yaml").read_text()
    assert not [file for file in made.files_in(place.folder) if file.startswith(".")]


def test_it_stays_where_the_merge_that_would_replace_it_fails(place: Place, there: Path) -> None:
    place.write("one", lambda t: t.update({"model.norm.weight": torch.full((4,), float("nan"))}))
    place.refuses(place.values("linear"), ["nan"], overwrite=True)
    assert "ties" in (there / "merge.yaml").read_text()


def test_a_folder_that_is_no_model_is_never_replaced(place: Place) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "out" / "thesis.tex").write_text("years")
    place.refuses(place.values(), ["out holds no model", "--overwrite"], overwrite=True)


def test_an_empty_folder_is_written_to(place: Place) -> None:
    (place.folder / "out").mkdir()
    assert place.merged(place.values())


def test_an_output_that_is_a_file(place: Place) -> None:
    (place.folder / "out").write_text("")
    place.refuses(place.values(), ["out is a file"])
    place.refuses(place.values(), ["out is a file"], overwrite=True)


@pytest.mark.parametrize("name", ["base", "two"])
def test_an_output_that_is_one_of_the_models(place: Place, name: str) -> None:
    before = made.files_in(place.folder)
    config = read_config(place.values())
    with pytest.raises(UserError, match="name another folder"):
        merge(config, place.folder / name)
    with pytest.raises(UserError, match=f"{name} that is merged"):
        merge(config, place.folder / name, overwrite=True)
    with pytest.raises(UserError, match=f"{name} that is merged"):
        merge(config, place.folder / "nowhere" / ".." / name, overwrite=True)
    assert made.files_in(place.folder) == before


def test_an_output_that_holds_one_of_the_models(place: Place) -> None:
    (place.folder / "config.json").write_text("{}")
    (place.folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds more than a model \("):
        merge(read_config(place.values()), place.folder, overwrite=True)


@pytest.mark.parametrize("names", [["config.json"], ["model.safetensors"], ["config.json", "thesis.tex"]])
def test_a_folder_that_is_no_model_is_not_replaced(place: Place, names: list[str]) -> None:
    (place.folder / "out").mkdir()
    for name in names:
        (place.folder / "out" / name).write_text("{}")
    with pytest.raises(UserError, match="out holds no model, so --overwrite does not replace it"):
        merge(read_config(place.values()), place.folder / "out", overwrite=True)
    assert sorted(path.name for path in (place.folder / "out").iterdir()) == sorted(names)


def test_what_is_neither_file_nor_folder_is_left_alone(place: Place) -> None:
    os.mkfifo(place.folder / "out")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="out is a file; name a folder"):
            merge(read_config(place.values()), place.folder / "out", overwrite=overwrite)
    assert (place.folder / "out").is_fifo()


@pytest.mark.parametrize("target", ["base", "nowhere"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_link(place: Place, target: str, overwrite: bool) -> None:
    (place.folder / "out").symlink_to(place.folder / target)
    with pytest.raises(UserError, match="out is a link; name the folder that it leads to"):
        merge(read_config(place.values()), place.folder / "out", overwrite=overwrite)
    assert (place.folder / "out").is_symlink()


@pytest.mark.parametrize("name", [".", "..", "x/..", "../here"])
def test_an_output_that_is_the_current_folder(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be replaced by another one while somebody is in it."""
    (place.folder / "here").mkdir()
    monkeypatch.chdir(place.folder / "here")
    before = made.files_in(place.folder)
    with pytest.raises(UserError, match="is, or holds, the current folder"):
        merge(read_config(place.values()), name)
    assert made.files_in(place.folder) == before


def test_an_output_that_holds_an_adapter(place: Place, there: Path) -> None:
    """Found before it is replaced: the adapter lies in a model that --overwrite would remove."""
    models = made_models.written(made_models.llama(0), place.folder / "llama", "1GB")
    lora = test_adapters.adapter(there / "lora", models)
    values = made.values_of("task_arithmetic", models, [], [])
    values["models"] = [{"model": f"{models}+{lora}", "parameters": {"weight": 1}}]
    place.refuses(values, ["out holds more than a model (lora), so --overwrite"], overwrite=True)


def test_a_disk_that_is_too_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 990, 10))
    place.refuses(place.values(), ["the merge needs", "GB in", "0.00 GB are free"])


def test_a_disk_that_fills_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second file: the first one goes too."""
    write, files = writer.ShardWriter.write, []

    def full(self: writer.ShardWriter, values: Tensor) -> None:
        files.append(self._path)
        if len(set(files)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self._path))
        write(self, values)

    monkeypatch.setattr(writer.ShardWriter, "write", full)
    before = made.files_in(place.folder)
    with pytest.raises(OSError, match="No space left"):
        place.merged(place.values(), shard_size=64)
    assert len(set(files)) == 2
    assert made.files_in(place.folder) == before


def test_an_output_in_an_unknown_home(place: Place) -> None:
    with pytest.raises(UserError, match="'~nobody-of-this-name/out' begins with a home that is not known"):
        merge(read_config(place.values()), "~nobody-of-this-name/out")
