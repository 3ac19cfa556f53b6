import pytest

from trimtab.ops import canonical_name

PLAIN = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        (PLAIN, PLAIN),
        (f"module.{PLAIN}", PLAIN),
        (f"module.module.{PLAIN}", PLAIN),
        (f"_orig_mod.{PLAIN}", PLAIN),
        (f"module._orig_mod.{PLAIN}", PLAIN),
        ("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight", PLAIN),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight", PLAIN),
        (f"base_model.model.{PLAIN}".replace(".weight", ".base_layer.weight"), PLAIN),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A.default",
            "model.embed_tokens.lora_embedding_A",
        ),
        (
            "base_model.model.model.layers.0.q_proj.lora_magnitude_vector.default.weight",
            "model.layers.0.q_proj.lora_magnitude_vector.weight",
        ),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
    ],
)
def test_wrappers_and_adapter_names_are_stripped(wrapped, plain):
    assert canonical_name(wrapped) == plain
    assert canonical_name(plain) == plain
