"""Between loaded modules, wrapped and unwrapped, and between adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.delta import checkpoints as made
from trimtab.delta import ReferenceDelta
from trimtab.delta.names import live_parameters, unwrapped, vocabulary_names
from trimtab.errors import UserError

# PEFT 0.21 asks models for this property, which transformers 5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")  # nothing is run, and the default compiler is slow to import


def checkpoint_wrapped(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.model.layers)
    return model


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    compiled,
    checkpoint_wrapped,
    nn.DataParallel,
    lambda model: nn.DataParallel(compiled(checkpoint_wrapped(model))),
]


def adapted(seed: int, model: nn.Module | None = None, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = model or made.llama(0)
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    wrapped = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():  # modules_to_save start as copies of the base
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return wrapped


class TestModules:
    @pytest.mark.parametrize("build", [made.llama, made.tied_llama, made.gpt2, made.qwen3_moe, made.reward])
    def test_is_the_difference(self, build: Any) -> None:
        reference, base = build(1), build(0)
        delta = ReferenceDelta.between(reference=reference, base=base)
        oracle = made.expected(reference, base)
        assert delta.names() == tuple(oracle)
        assert all(torch.equal(delta.tensor(name), oracle[name]) for name in oracle)

    def test_agrees_with_folders_in_every_fingerprint(self, tmp_path: Path) -> None:
        reference, base = made.qwen3_moe(1).to(torch.bfloat16), made.qwen3_moe(0).to(torch.bfloat16)
        folders = made.written(reference, tmp_path / "r"), made.written(base, tmp_path / "b")
        live = ReferenceDelta.between(reference=reference, base=base)
        streamed = ReferenceDelta.between(reference=folders[0], base=folders[1])
        mixed = ReferenceDelta.between(reference=reference, base=folders[1])
        assert live.fingerprint == streamed.fingerprint == mixed.fingerprint
        assert live.reference.fingerprint == streamed.reference.fingerprint
        assert live.base.fingerprint == streamed.base.fingerprint
        assert live.statistics == streamed.statistics
        assert live.measure().tensors == streamed.measure().tensors

    def test_training_the_reference_afterwards_changes_nothing(self) -> None:
        reference, base = made.llama(1), made.llama(0)
        delta = ReferenceDelta.between(reference=reference, base=base)
        before = {name: delta.tensor(name).clone() for name in delta.names()}
        with torch.no_grad():
            for parameter in [*reference.parameters(), *base.parameters()]:
                parameter.add_(1.0)
        assert all(torch.equal(delta.tensor(name), before[name]) for name in before)
        assert not delta.reference_matches("model.norm.weight", reference.model.norm.weight)

    def test_added_rows(self) -> None:
        reference, base = made.tied_llama(1, vocab_size=44), made.tied_llama(0)
        delta = ReferenceDelta.between(reference=reference, base=base)
        assert delta.added_rows == {"model.embed_tokens.weight": 4}
        assert not delta.tensor("model.embed_tokens.weight")[40:].any()

    def test_plain_modules_have_no_vocabulary(self) -> None:
        with pytest.raises(UserError, match=r"1 mismatched \(weight \(2 × 3 in the base, 4 × 3"):
            ReferenceDelta.between(reference=nn.Linear(3, 4, bias=False), base=nn.Linear(3, 2, bias=False))

    def test_the_same_module_twice(self) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(UserError, match="both 'Linear'"):
            ReferenceDelta.between(reference=model, base=model)

    def test_equal_modules(self) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(UserError, match="zero everywhere"):
            ReferenceDelta.between(reference=model, base=copy.deepcopy(model))

    def test_modules_without_values(self) -> None:
        with torch.device("meta"):
            hollow = nn.Linear(2, 2)
        with pytest.raises(UserError, match="'weight' of the Linear in memory has no values"):
            ReferenceDelta.between(reference=hollow, base=nn.Linear(2, 2))

    def test_integer_parameters(self) -> None:
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(UserError, match=r"torch.int8 \(2 × 2\)"):
            ReferenceDelta.between(reference=model, base=nn.Linear(2, 2))

    def test_sharded_parameters(self) -> None:
        import torch.distributed as dist
        from torch.distributed.tensor import Replicate, distribute_tensor

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            model = nn.Linear(2, 2)
            model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
            with pytest.raises(UserError, match="'weight' of the Linear in memory is sharded"):
                ReferenceDelta.between(reference=model, base=nn.Linear(2, 2))
        finally:
            dist.destroy_process_group()

    def test_not_finite(self) -> None:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.bias, float("nan"))
        with pytest.raises(UserError, match=r"'bias' of the reference .* holds nan"):
            ReferenceDelta.between(reference=model, base=nn.Linear(2, 2))


class TestWrapped:
    @pytest.mark.parametrize("wrap", WRAPPERS)
    def test_names_are_those_of_the_bare_model(self, wrap: Any) -> None:
        reference, base = made.tied_llama(1), made.tied_llama(0)
        oracle = made.expected(reference, base)
        wrapped = wrap(reference)
        delta = ReferenceDelta.between(reference=wrapped, base=base)
        assert delta.names() == tuple(oracle)
        for (name, parameter), bare in zip(wrapped.named_parameters(), oracle, strict=True):
            assert name in delta
            assert name != bare or "layers" not in name
            assert delta.reference_matches(name, parameter)
            assert torch.equal(delta.tensor(name), oracle[bare])

    @pytest.mark.parametrize("wrap", WRAPPERS)
    def test_vocabularies_are_found_inside(self, wrap: Any) -> None:
        reference = wrap(made.tied_llama(1, vocab_size=44))
        delta = ReferenceDelta.between(reference=reference, base=made.tied_llama(0))
        assert delta.added_rows == {"model.embed_tokens.weight": 4}

    def test_a_parameter_twice_under_one_name_is_refused(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(1, 1)
                self._orig_mod = nn.ModuleDict({"inner": nn.Linear(1, 1)})

        with pytest.raises(UserError, match=r"'inner.weight' and '_orig_mod.inner.weight' .* both have"):
            live_parameters(Twice())

    def test_the_same_parameter_twice_is_one(self) -> None:
        inner = nn.Linear(1, 1)
        model = nn.ModuleDict({"one": inner, "two": compiled(inner)})
        parameters, adapter = live_parameters(model)
        assert (list(parameters), adapter) == (["one.weight", "one.bias"], False)

    def test_unwrapped(self) -> None:
        inner = nn.Linear(1, 1)
        assert unwrapped(nn.DataParallel(compiled(inner))) is inner

    def test_vocabulary_names(self) -> None:
        assert vocabulary_names(made.llama(0)) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert vocabulary_names(nn.Linear(1, 1)) == set()


class TestAdapters:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}],
    )
    def test_two_peft_models(self, settings: dict[str, Any]) -> None:
        reference, base = adapted(2, **settings), adapted(1, **settings)
        delta = ReferenceDelta.between(reference=reference, base=base)
        theirs = dict(base.named_parameters())
        trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
        assert len(delta) == len(trained) > 0
        for name, parameter in trained.items():
            assert torch.equal(delta.tensor(name), parameter - theirs[name]), name
        assert not any("default" in name or name.startswith("base_model") for name in delta.names())

    def test_names(self) -> None:
        delta = ReferenceDelta.between(
            reference=adapted(2, modules_to_save=["lm_head"]), base=adapted(1, modules_to_save=["lm_head"])
        )
        assert "model.layers.0.self_attn.q_proj.lora_A.weight" in delta.names()
        assert "lm_head.weight" in delta.names()
        assert len(delta) == 2 * 2 * 2 + 1

    def test_only_the_active_adapter_counts(self) -> None:
        reference, base = adapted(2), adapted(1)
        oracle = ReferenceDelta.between(reference=reference, base=base)
        reference.add_adapter("ref", reference.peft_config["default"])  # as DPO trainers do
        delta = ReferenceDelta.between(reference=reference, base=base)
        assert delta.fingerprint == oracle.fingerprint
        reference.set_adapter("ref")
        other = ReferenceDelta.between(reference=reference, base=base)
        assert other.names() == oracle.names()
        assert other.fingerprint != oracle.fingerprint

    def test_two_active_adapters_are_refused(self) -> None:
        reference = adapted(2)
        reference.add_adapter("more", reference.peft_config["default"])
        reference.base_model.set_adapter(["default", "more"])
        with pytest.raises(UserError, match=r"lora_A.default.weight' and .*lora_A.more.weight' .* both have"):
            ReferenceDelta.between(reference=reference, base=adapted(1))

    @pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
    def test_folders_give_the_same(self, settings: dict[str, Any], tmp_path: Path) -> None:
        reference, base = adapted(2, **settings), adapted(1, **settings)
        live = ReferenceDelta.between(reference=reference, base=base)
        for model, name in ((reference, "r"), (base, "b")):
            model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        stored = ReferenceDelta.between(reference=tmp_path / "r", base=tmp_path / "b")
        assert set(stored.names()) == set(live.names())
        assert stored.fingerprint == live.fingerprint
        name = "model.layers.1.self_attn.v_proj.lora_B.weight"
        assert torch.equal(stored.slice(name, (slice(3, 5),)), live.tensor(name)[3:5])

    @pytest.mark.parametrize("stored", [False, True])
    def test_adapters_of_other_settings_are_refused(self, stored: bool, tmp_path: Path) -> None:
        pair: list[Any] = [adapted(2, lora_alpha=16), adapted(1, lora_alpha=8)]
        if stored:
            for model, name in zip(pair, "rb", strict=True):
                model.save_pretrained(tmp_path / name, save_embedding_layers=False)
            pair = [tmp_path / "r", tmp_path / "b"]
        with pytest.raises(UserError, match=r"differ in lora_alpha \(16 in the reference .*, 8 in the base"):
            ReferenceDelta.between(reference=pair[0], base=pair[1])

    def test_an_adapter_and_a_model_are_refused(self) -> None:
        with pytest.raises(UserError, match="merge_and_unload"):
            ReferenceDelta.between(reference=adapted(2), base=made.llama(0))

    def test_merged_adapters_are_models(self) -> None:
        merged = adapted(2).merge_and_unload()
        delta = ReferenceDelta.between(reference=merged, base=made.llama(0))
        moved = {name for name, one in delta.statistics.items() if one.norm > 0}
        assert moved == {name for name in delta.names() if "q_proj" in name or "v_proj" in name}
