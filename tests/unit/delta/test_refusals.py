"""What is refused, and what the sentence says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.errors import UserError


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Reference and base: tiny Llamas in one file each."""
    return tuple(
        made.written(made.llama(seed), tmp_path / name, "1GB") for name, seed in (("r", 1), ("b", 0))
    )


def refused(reference: Any, base: Any, match: str, **options: Any) -> str:
    with pytest.raises(UserError, match=match) as raised:
        ReferenceDelta.between(reference=reference, base=base, **options)
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


class TestFolders:
    def test_no_such_folder(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        refused(tmp_path / "nothing", folders[1], r"no folder '.*nothing', and it cannot be a hub id")

    def test_a_home_that_is_not_known(self, folders: tuple[Path, Path]) -> None:
        refused(
            "~nouser/x", folders[1], r"'~nouser/x' begins with a home folder that is not known here; give"
        )

    def test_a_configuration_nested_too_deeply(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
        refused(*folders, r"config.json is not JSON that can be read: it is nested too deeply")

    def test_a_file(self, folders: tuple[Path, Path]) -> None:
        refused(folders[0] / "model.safetensors", folders[1], "is a file; give the folder")

    def test_an_empty_folder(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        refused(tmp_path / "empty", folders[1], "no config.json")

    def test_no_weights(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "model.safetensors").unlink()
        refused(*folders, r"no model.safetensors \(found: config.json")

    def test_gguf(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "model.safetensors").rename(folders[0] / "model.gguf")
        refused(*folders, "GGUF")

    def test_revision_of_a_folder(self, folders: tuple[Path, Path]) -> None:
        refused(*folders, "for hub ids only", reference_revision="main")

    def test_the_same_folder_twice(self, folders: tuple[Path, Path]) -> None:
        refused(folders[0], folders[0].parent / "b" / ".." / "r", "both")

    def test_config_that_is_no_json(self, folders: tuple[Path, Path]) -> None:
        (folders[1] / "config.json").write_text("{")
        refused(*folders, r"b/config.json is not valid JSON")

    def test_config_with_wrong_values(self, folders: tuple[Path, Path]) -> None:
        made.reconfigured(folders[1], hidden_size="wide")
        refused(*folders, r"cannot use .*b/config.json")

    def test_config_that_makes_no_model(self, folders: tuple[Path, Path]) -> None:
        made.reconfigured(folders[1], hidden_act="sigh")
        refused(*folders, r"cannot build a LlamaForCausalLM from the config.json of .*b: ")

    def test_a_model_that_needs_its_own_code(self, folders: tuple[Path, Path]) -> None:
        made.reconfigured(folders[0], model_type="mine", auto_map={"AutoConfig": "code.Mine"})
        (folders[0] / "code.py").write_text("raise SystemExit('this must not run')")
        refused(*folders, "never run")

    def test_an_architecture_that_nobody_knows(self, folders: tuple[Path, Path]) -> None:
        made.reconfigured(folders[0], architectures=["LlamaForTelepathy"])
        # The configuration's type still says what it is.
        assert ReferenceDelta.between(reference=folders[0], base=folders[1]).names()

    def test_an_architecture_without_a_class(self, folders: tuple[Path, Path]) -> None:
        made.reconfigured(folders[0], architectures=["VisionTelepathy"], model_type="vit")
        refused(*folders, r"no model class for architectures \['VisionTelepathy'\]")

    def test_weights_named_in_the_config(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "model.safetensors").rename(folders[0] / "ema.safetensors")
        made.reconfigured(folders[0], transformers_weights="ema.safetensors")
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        oracle = made.expected(made.llama(1), made.llama(0))
        assert torch.equal(delta.tensor("lm_head.weight"), oracle["lm_head.weight"])
        made.reconfigured(folders[0], transformers_weights="../b/model.safetensors")
        refused(*folders, r"no file in the same folder")

    def test_json_that_is_no_object(self, tmp_path: Path, folders: tuple[Path, Path]) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
        refused(tmp_path / "adapter", folders[1], "holds a list; a JSON object was expected")

    def test_quantized(self, folders: tuple[Path, Path]) -> None:
        made.reconfigured(folders[0], quantization_config={"quant_method": "gptq", "bits": 4})
        refused(*folders, r"quantized weights \(gptq\)")

    def test_integer_weights(self, folders: tuple[Path, Path]) -> None:
        made.edited(folders[0], lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}))
        refused(*folders, "'model.norm.weight' in .* is of type I8")


class TestPickles:
    def test_the_sentence_holds_the_line_that_converts(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "model.safetensors").unlink()
        (folders[0] / "pytorch_model.bin").write_bytes(b"this must not be read")
        sentence = refused(*folders, r"pickled weights \(pytorch_model.bin\)")
        assert f"M.from_pretrained('{folders[0]}').save_pretrained('{folders[0]}-safetensors')" in sentence

    def test_the_line_works(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        (folders[0] / "model.safetensors").unlink()
        torch.save(made.llama(1).state_dict(), folders[0] / "pytorch_model.bin")
        line = refused(*folders, "pickled").split('python -c "')[1].removesuffix('"')
        exec(line)
        delta = ReferenceDelta.between(reference=f"{folders[0]}-safetensors", base=folders[1])
        oracle = made.expected(made.llama(1), made.llama(0))
        assert torch.equal(delta.tensor("lm_head.weight"), oracle["lm_head.weight"])

    def test_a_pickled_adapter(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        adapters = []
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            torch.save({"x.lora_A.weight": torch.ones(2) * len(adapters)}, folder / "adapter_model.bin")
            adapters.append(folder)
            line = refused(folder, folders[1], "adapter_model.bin").split('python -c "')[1].removesuffix('"')
            exec(line)
        delta = ReferenceDelta.between(reference=adapters[1], base=adapters[0])
        assert delta.tensor("x.lora_A.weight").tolist() == [1.0, 1.0]


class TestDamage:
    @pytest.mark.parametrize("keep", [0, 5, 200, -4])
    def test_truncated(self, folders: tuple[Path, Path], keep: int) -> None:
        path = folders[0] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        refused(*folders, rf"{path} is no whole safetensors file")

    def test_truncated_after_it_was_opened(self, folders: tuple[Path, Path]) -> None:
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        path = folders[0] / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(4000)
        with pytest.raises(UserError, match=r"cannot read 'model.norm.weight' from .*r/model.safetensors"):
            delta.tensor("model.norm.weight")

    def test_not_safetensors_at_all(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "model.safetensors").write_text("<html>404</html>" * 10)
        refused(*folders, "no whole safetensors file")

    @pytest.fixture
    def sharded(self, tmp_path: Path) -> tuple[Path, Path]:
        return tuple(made.written(made.llama(seed), tmp_path / f"s{seed}") for seed in (1, 0))

    def test_a_shard_is_missing(self, sharded: tuple[Path, Path]) -> None:
        shard = sorted(sharded[1].glob("model-*.safetensors"))[1]
        shard.unlink()
        refused(*sharded, f"{shard} is missing")

    def test_a_tensor_of_the_index_is_nowhere(self, sharded: tuple[Path, Path]) -> None:
        path = sharded[0] / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
        path.write_text(json.dumps(index))
        refused(*sharded, r"1 tensors that .* none of its files \(first: 'model.ghost.weight'\)")

    @pytest.mark.parametrize("name", ["../b/model.safetensors", "/etc/passwd", "pytorch_model.bin"])
    def test_an_index_that_points_elsewhere(self, sharded: tuple[Path, Path], name: str) -> None:
        path = sharded[0] / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(*sharded, "no safetensors file in the same folder")

    def test_an_index_without_map(self, sharded: tuple[Path, Path]) -> None:
        (sharded[0] / "model.safetensors.index.json").write_text("{}")
        refused(*sharded, "no weight_map")

    def test_a_tensor_in_two_shards(self, sharded: tuple[Path, Path]) -> None:
        save_file({"model.norm.weight": torch.ones(16)}, sharded[0] / "extra.safetensors")
        path = sharded[0] / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["x"] = "extra.safetensors"
        path.write_text(json.dumps(index))
        refused(*sharded, "'model.norm.weight' occurs twice")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which", [0, 1])
    def test_values_that_are_not_finite(self, folders: tuple[Path, Path], which: int, value: float) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        made.edited(folders[which], lambda t: t[name].view(-1).__setitem__(37, value))
        delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
        role = ("reference", "base")[which]
        match = rf"'{name}' of the {role} .* holds {value} \(first at index 37 of 384\)"
        for use in (
            lambda: delta.tensor(name),
            lambda: delta.fingerprint,
            lambda: delta.save(folders[0] / "d"),
        ):
            with pytest.raises(UserError, match=match):
                use()
        assert not (folders[0] / "d").exists()
        part = (slice(2, 3),)
        with pytest.raises(UserError, match="holds"):
            delta.slice(name, part)
        assert torch.isfinite(delta.slice(name, (slice(4, 9),))).all()

    def test_a_difference_that_overflows(self, folders: tuple[Path, Path]) -> None:
        made.edited(folders[0], lambda t: t["model.norm.weight"].fill_(3e38))
        made.edited(folders[1], lambda t: t["model.norm.weight"].fill_(-3e38))
        with pytest.raises(UserError, match=r"differs by more than torch.float32 can hold"):
            ReferenceDelta.between(reference=folders[0], base=folders[1]).tensor("model.norm.weight")


class TestMismatch:
    """One sentence counts everything and names the first few."""

    def test_another_kind_of_model(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        refused(folders[0], made.written(made.gpt2(0), tmp_path / "g"), "kind 'llama' .* kind 'gpt2'")

    def test_another_size(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        wide = made.written(made.llama(0, intermediate_size=32), tmp_path / "wide")
        sentence = refused(
            folders[0], wide, r"^the base .* not what the reference was made from: 6 mismatched"
        )
        assert (
            "model.layers.0.mlp.gate_proj.weight (32 × 16 in the base, 24 × 16 in the reference)" in sentence
        )
        assert sentence.endswith(", …)")

    def test_fewer_layers(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        short = made.written(made.llama(0, num_hidden_layers=1), tmp_path / "short")
        refused(folders[0], short, r": 9 missing \(model.layers.1.self_attn.q_proj.weight, .*, …\)$")
        refused(short, folders[0], r": 9 extra \(model.layers.1.self_attn.q_proj.weight, .*, …\)$")

    def test_all_kinds_in_one_sentence(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        other = made.llama(0, attention_bias=True, intermediate_size=32, num_hidden_layers=1)
        refused(
            folders[0],
            made.written(other, tmp_path / "o"),
            r"9 missing \(.*\); 4 extra \(.*\); 3 mismatched \(.*\)$",
        )

    def test_a_reward_model_of_a_language_model(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        reward = made.written(made.reward(1), tmp_path / "reward")
        refused(
            reward,
            folders[1],
            r"weights of the base .*: 1 missing \(score.weight\); 1 extra \(lm_head.weight\)$",
        )

    def edit_cases() -> list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]]:  # type: ignore[misc]
        return [
            ("missing", lambda t: t.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
            ("extra", lambda t: t.update(ghost=torch.ones(1)), r"1 extra \(ghost\)"),
            (
                "mismatched",
                lambda t: t.update({"model.norm.weight": torch.ones(15)}),
                r"1 mismatched \(model.norm.weight \(15, config.json says 16\)\)",
            ),
        ]

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize(("kind", "edit", "match"), edit_cases())
    def test_weights_that_do_not_fit_their_own_config(
        self, folders: tuple[Path, Path], kind: str, edit: Any, match: str, which: int
    ) -> None:
        made.edited(folders[which], edit)
        role = ("reference", "base")[which]
        refused(*folders, rf"^the weights of the {role} .* do not fit its config.json: {match}$")

    def test_an_expert_is_missing(self, tmp_path: Path) -> None:
        folders = [made.written(made.qwen3_moe(seed), tmp_path / str(seed), "1GB") for seed in (1, 0)]
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        made.edited(folders[1], lambda t: t.pop(name))
        refused(
            *folders, r"1 mismatched \(model.layers.1.mlp.experts.down_proj \(3 × 16 × 8, config.json says 4"
        )
        made.edited(folders[1], lambda t: t.update({name: torch.ones(16, 7)}))
        refused(*folders, r"1 mismatched \(model.layers.1.mlp.experts.down_proj \(cannot be made of its 4")


class TestZero:
    def test_two_equal_models(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        twin = made.written(made.llama(1), tmp_path / "twin")
        delta = ReferenceDelta.between(reference=folders[0], base=twin)
        for use in (lambda: delta.fingerprint, lambda: delta.save(tmp_path / "d")):
            with pytest.raises(UserError, match="τ is zero everywhere"):
                use()
        assert not (tmp_path / "d").exists()

    def test_unless_that_is_meant(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        delta = ReferenceDelta.between(reference=folders[0], base=folders[0], allow_zero=True)
        saved = ReferenceDelta.load(delta.save(tmp_path / "d"))
        assert all(one.zeros == 1.0 and one.norm == 0.0 for one in saved.statistics.values())


def test_an_unknown_parameter_gets_the_nearest_name(folders: tuple[Path, Path]) -> None:
    delta = ReferenceDelta.between(reference=folders[0], base=folders[1])
    assert "model.norm.wait" not in delta
    for use in (delta.tensor, delta.shape, lambda name: delta.slice(name, ())):
        with pytest.raises(
            UserError, match=r"no parameter 'model.norm.wait'; did you mean 'model.norm.weight'\?"
        ):
            use("model.norm.wait")
