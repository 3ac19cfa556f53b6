"""Merged folders as they are used: transformers loads them, and what belongs to a model is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import trimtab
from tests import tiny
from tests.unit.delta import checkpoints as models
from tests.unit.merge import made, test_adapters, test_vocabulary
from trimtab.merge import merge, run
from trimtab.merge.config import load_config, read_config
from trimtab.ops.kernels import merging as kernels

ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "llama": models.llama,
    "tied llama": models.tied_llama,
    "gpt2": models.gpt2,
    "qwen3 moe": models.qwen3_moe,
    "mixtral": models.mixtral,
}


def opened(folder: Path) -> Any:
    """A folder as a user loads it: nothing may be missing, left over or newly made."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model


def parameters(folder: Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in opened(folder).named_parameters()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one architecture, in several files each."""
    place, make = tmp_path_factory.mktemp("pair"), ARCHITECTURES[request.param]
    found = [models.written(make(seed), place / str(seed), "6KB") for seed in (0, 1)]
    assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in found)
    return found[0], found[1]


@pytest.mark.parametrize("shard_size", [8000, 10**9])
def test_transformers_loads_the_mean_of_two_models(
    pair: tuple[Path, Path], shard_size: int, tmp_path: Path
) -> None:
    values = made.values_of("linear", None, pair, [{"weight": 1}, {"weight": 3}])
    out = merge(read_config(values), tmp_path / "out", shard_size=shard_size)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    index = out / "model.safetensors.index.json"
    if shard_size == 10**9:
        assert files == ["model.safetensors"]
        assert not index.exists()
    else:
        told = json.loads(index.read_text())
        assert len(files) > 1
        assert sorted(set(told["weight_map"].values())) == files
        assert told["weight_map"].keys() == made.weights(out).keys()
        assert told["metadata"]["total_size"] == sum(x.nbytes for x in made.weights(out).values())
    one, two, mean = (parameters(folder) for folder in (*pair, out))
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * two[name], rtol=1e-6, atol=1e-8)


def test_the_sum_of_deltas_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    values = made.values_of("task_arithmetic", pair[0], [pair[1]], [{"weight": 1}])
    out = merge(read_config(values), tmp_path / "out")
    tokens = torch.tensor([[1, 5, 7, 2]])
    ours, theirs = (opened(folder)(tokens).logits for folder in (out, pair[1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# what lies beside the weights


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models tuned from it, the base with a tokenizer, a template and generation settings."""
    place = tmp_path_factory.mktemp("llamas")
    found = []
    for seed in range(3):
        model = tiny.model(seed)
        model.generation_config.temperature = 0.25 + seed
        model.generation_config.do_sample = True
        model.save_pretrained(place / str(seed))
        tiny.tokenizer().save_pretrained(place / str(seed))
        found.append(place / str(seed))
    return found


def ties(llamas: list[Path], **top: Any) -> dict[str, Any]:
    each = [{"weight": 1, "density": 0.5}] * 2
    return made.values_of("ties", llamas[0], llamas[1:], each, **top)


def test_tokenizer_and_generation_settings_are_the_bases(llamas: list[Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    values = ties(llamas)
    values["models"] = values["models"][::-1]
    out = merge(read_config(values), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (llamas[0] / name).read_bytes()
    assert GenerationConfig.from_pretrained(out).temperature == 0.25
    told = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert told == "<|user|>hi<|end|>"
    assert not any(path.name.startswith(".") for path in out.iterdir())


def test_a_chat_template_of_its_own(llamas: list[Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = merge(read_config(ties(llamas, chat_template="{{ messages[0].content }}!")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize(
    ("top", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "float16"}, torch.float16),
    ],
)
@pytest.mark.parametrize("fidelity", ["paper", "mergekit"])
def test_the_dtype_is_the_one_that_was_asked_for(
    llamas: list[Path], top: dict[str, str], dtype: torch.dtype, fidelity: str, tmp_path: Path
) -> None:
    out = merge(read_config(ties(llamas, fidelity=fidelity, **top)), tmp_path / "out")
    assert {value.dtype for value in made.weights(out).values()} == {dtype}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {parameter.dtype for parameter in parameters(out).values()} == {dtype}


def test_other_keys_of_the_configuration_stay(llamas: list[Path], tmp_path: Path) -> None:
    out = merge(read_config(ties(llamas)), tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (llamas[0], out))
    assert before == after


def test_where_the_weights_came_from_is_no_part_of_the_configuration(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2)}
    config = {"_name_or_path": "/home/me", "quantization_config": {"bits": 4}, "torch_dtype": "float32"}
    paths = [made.folder(tmp_path / name, tensors, **config) for name in ("one", "two")]
    out = merge(read_config(made.values_of("linear", None, paths, [{"weight": 1}] * 2)), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": "float32",
    }


def test_slices_make_a_model_of_another_depth(tmp_path: Path) -> None:
    paths = [models.written(models.llama(seed), tmp_path / str(seed), "1GB") for seed in (0, 1)]
    for path in paths:
        models.reconfigured(path, layer_types=["full_attention", "sliding_attention"])
    spans = [(0, 2), (1, 2), (0, 1)]
    values = {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "slices": [
            {"sources": [{"model": str(path), "layer_range": list(span)} for path in paths]} for span in spans
        ],
    }
    out = merge(read_config(values), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    full, sliding = "full_attention", "sliding_attention"
    assert config["layer_types"] == [full, sliding, sliding, full]
    models.reconfigured(out, layer_types=None)
    found, one, two = opened(out), *(made.weights(path) for path in paths)
    assert len(found.model.layers) == 4
    for i, j in enumerate((0, 1, 1, 0)):
        name = f"model.layers.{j}.mlp.up_proj.weight"
        torch.testing.assert_close(
            found.model.layers[i].mlp.up_proj.weight.detach(), (one[name] + two[name]) / 2
        )


def test_a_tied_head_that_one_model_stores_and_the_other_does_not(tmp_path: Path) -> None:
    """Only the first stores it; its configuration, which is the output's, does not tie it."""
    untied = models.written(models.llama(0), tmp_path / "untied", "1GB")
    tied = models.written(models.tied_llama(1), tmp_path / "tied", "1GB")
    assert "lm_head.weight" not in made.weights(tied)
    out = merge(
        read_config(made.values_of("linear", None, [untied, tied], [{"weight": 1}] * 2)), tmp_path / "out"
    )
    found, one, two = opened(out), made.weights(untied), made.weights(tied)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    torch.testing.assert_close(found.lm_head.weight.detach(), (one[head] + two[embedding]) / 2)
    torch.testing.assert_close(
        found.model.embed_tokens.weight.detach(), (one[embedding] + two[embedding]) / 2
    )


# adapters and vocabularies, from end to end


def test_a_model_with_an_adapter_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    base = models.written(models.llama(0), tmp_path / "base", "1GB")
    lora = test_adapters.adapter(tmp_path / "lora", base)
    values = made.values_of("task_arithmetic", base, [], [])
    values["models"] = [{"model": f"{base}+{lora}", "parameters": {"weight": 0.5}}]
    out = merge(read_config(values), tmp_path / "out")
    whole, before = test_adapters.merged(base, lora), made.weights(base)
    changed = 0
    for name, value in made.weights(out).items():
        torch.testing.assert_close(value, (before[name] + whole[name]) / 2, rtol=1e-5, atol=1e-7)
        changed += not torch.equal(value, before[name])
    assert changed == 2 * len(test_adapters.LINEAR)
    assert f"{base}+{lora}" in (out / "README.md").read_text()
    opened(out)


@pytest.mark.parametrize("source", ["union", "base"])
def test_models_of_two_vocabularies(source: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = test_vocabulary.words
    special = test_vocabulary.SPECIAL
    first, second = words([*special, "a", "b", "c"]), words(["b", *special, "a", "d"])
    one = test_vocabulary.model(tmp_path / "one", 0, first).folder
    two = test_vocabulary.model(tmp_path / "two", 1, second).folder
    values = made.values_of("task_arithmetic", one, [two], [{"weight": 0.5}], tokenizer_source=source)
    out = merge(read_config(values), tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(out).get_vocab()
    assert set(tokens) == {*special, "a", "b", "c", *("d" for _ in range(source == "union"))}
    embedding = parameters(out)["model.embed_tokens.weight"]
    assert len(embedding) == len(tokens) == json.loads((out / "config.json").read_text())["vocab_size"]
    rows, theirs = (made.weights(folder)["model.embed_tokens.weight"] for folder in (one, two))
    ids, other_ids = first.get_vocab(), second.get_vocab()
    for token, id_ in tokens.items():
        a = rows[ids[token]] if token in ids else theirs[other_ids[token]]
        b = theirs[other_ids[token]] if token in other_ids else rows[ids[token]]
        torch.testing.assert_close(embedding[id_], (a + b) / 2)


# the card and the recipe


def test_the_card_says_how_it_was_made(llamas: list[Path], tmp_path: Path) -> None:
    each = [{"weight": 1, "density": 0.25}] * 2
    shared = {"int8_mask": True}
    values = made.values_of("dare_ties", llamas[0], llamas[1:], each, random_seed=17, parameters=shared)
    out = merge(read_config(values), tmp_path / "merged-one")
    card = (out / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["library_name"] == "transformers"
    assert told["tags"] == ["trimtab", "merge", "dare_ties"]
    assert told["base_model"] == [str(path) for path in llamas]
    assert body.startswith("\n# merged-one\n")
    for words in (
        f"Merged by trimtab {trimtab.__version__}: DARE with the election of TIES",
        "arXiv 2311.03099",
        "fidelity `paper`, masks drawn from seed 17",
        f"Configuration and tokenizer are those of `{llamas[0]}`",
        "int8_mask",
    ):
        assert words in card
    prints = [line.split("fingerprint `")[1][:32] for line in body.splitlines() if "fingerprint `" in line]
    assert len(set(prints)) == 3
    assert all(set(one) <= set("0123456789abcdef") for one in prints)


def test_the_recipe_in_the_folder_makes_the_same_model(llamas: list[Path], tmp_path: Path) -> None:
    """Text and comments of the file that was given are kept as they are."""
    file = tmp_path / "recipe.yaml"
    file.write_text("# mine\n" + yaml.safe_dump(ties(llamas), sort_keys=False))
    out = merge(file, tmp_path / "out")
    assert (out / "merge.yaml").read_text() == file.read_text()
    assert file.read_text().rstrip() in (out / "README.md").read_text()
    again = merge(out / "merge.yaml", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert load_config(out / "merge.yaml").method == "ties"


def test_seeds_draw_other_masks_and_the_same_seed_the_same(llamas: list[Path], tmp_path: Path) -> None:
    def bytes_of(seed: int | None, name: str) -> bytes:
        top = {} if seed is None else {"random_seed": seed}
        each = [{"weight": 1, "density": 0.5}] * 2
        values = made.values_of("dare_linear", llamas[0], llamas[1:], each, **top)
        return (merge(read_config(values), tmp_path / name) / "model.safetensors").read_bytes()

    first = bytes_of(None, "a")
    assert first == bytes_of(0, "b")
    assert first != bytes_of(1, "c")


def test_progress_is_told_in_bytes(
    llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(run, "_silent", lambda *values: told.append(values))
    monkeypatch.setattr(run, "CHUNK", 1000)
    out = merge(read_config(ties(llamas)), tmp_path / "out", shard_size=20_000)
    size = sum(value.nbytes for value in made.weights(out).values())
    assert told[-1][1:] == (size, size)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


# memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, where memory is told apart")
@pytest.mark.skipif(kernels.refuses_sum([torch.float32]) is not None, reason="needs the CPU kernels")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Chunks of 8 MB; models of 80 and 160 MB with a tensor of 8 and 16 chunks, see memory.py."""
    script, environment = Path(__file__).with_name("memory.py"), {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(script), str(tmp_path), "ties", "dare_linear", "slerp"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == command[3:]
    for method, one, two in lines:
        assert 0.5 < float(one) < 3, (method, one)
        assert 0.5 < float(two) < 3, (method, two)
        assert float(two) - float(one) < 0.75, (method, one, two)
