"""What mergekit makes of three tiny models: run this to write ``outputs.safetensors`` anew.

    pip install mergekit==0.1.5
    python tests/equivalence/mergekit/make.py

mergekit has to be installed, in an environment of its own (it wants other versions than trimtab). The models
follow from SHAKE-256 of their names, so only what mergekit wrote is stored. Tests import the models and the
configurations from here; mergekit is imported where it is run.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
OUTPUTS = HERE / "outputs.safetensors"
VOCABULARY, WIDTH, LAYERS, HEADS = 40, 16, 2, 2
NAMES = ("base", "one", "two")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    half = WIDTH // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = (WIDTH,)
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"model.layers.{layer}.mlp.{name}.weight"] = (WIDTH, WIDTH)
        for name, rows in (("q", WIDTH), ("k", half), ("v", half), ("o", WIDTH)):
            found[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def numbers(text: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers in [−1, 1) that follow from a text, more of them near 0."""
    count = int(np.prod(shape))
    words = np.frombuffer(hashlib.shake_256(text.encode()).digest(4 * count), dtype="<u4")
    plain = words.astype(np.float64) / 2**31 - 1
    return (plain * np.abs(plain)).reshape(shape)


def model(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one of the three models; ``one`` and ``two`` are the base with small changes."""
    result = {}
    for key, shape in shapes().items():
        values = 0.1 * numbers(f"base {key}", shape)
        if name != "base":
            values = values + 0.02 * numbers(f"{name} {key}", shape)
        result[key] = torch.tensor(values).to(torch.float32).to(dtype)
    return result


def write_models(folder: Path, kind: str) -> dict[str, Path]:
    """Write the three models in one dtype."""
    paths = {}
    for name in NAMES:
        paths[name] = folder / kind / name
        paths[name].mkdir(parents=True)
        (paths[name] / "config.json").write_text(json.dumps(CONFIG))
        save_file(model(name, DTYPES[kind]), paths[name] / "model.safetensors", metadata={"format": "pt"})
    return paths


def configurations(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is merged, as the YAML holds it."""
    base, one, two = (str(paths[name]) for name in NAMES)

    def models(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"model": one, "parameters": first}, {"model": two, "parameters": second}]

    def anchored(method: str, first: dict[str, Any], second: dict[str, Any], **shared: Any) -> dict[str, Any]:
        listed = models(first, second)
        return {"merge_method": method, "base_model": base, "models": listed, "parameters": shared}

    sparse = {"weight": 0.7, "density": 0.37}, {"weight": [0.4, 0.9], "density": [0.9, 0.2]}
    filtered = [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "self_attn", "value": 0.3}, {"value": 0.5}]

    def part(path: str, layers: list[int], **parameters: Any) -> dict[str, Any]:
        return {"model": path, "layer_range": layers, **({"parameters": parameters} if parameters else {})}

    return {
        "linear": {"merge_method": "linear", "models": models({"weight": 0.7}, {"weight": 0.4})},
        "filters": {
            "merge_method": "linear",
            "models": models({"weight": filtered}, {"weight": 1.1}),
        },
        "slices": {
            "merge_method": "linear",
            "slices": [
                {"sources": [part(one, [0, 2], weight=0.3), part(two, [0, 2], weight=0.6)]},
                {"sources": [part(one, [1, 2], weight=1), part(base, [0, 1], weight=0.5)]},
            ],
        },
        "task_arithmetic": anchored(
            "task_arithmetic", {"weight": 0.7}, {"weight": -0.3}, **{"normalize": True, "lambda": 0.7}
        ),
        "ties": anchored("ties", *sparse),
        "ties_sum": anchored("ties", *sparse, **{"normalize": False, "lambda": 1.3}),
        "slerp": {
            "merge_method": "slerp",
            "base_model": base,
            "models": [{"model": base}, {"model": one}],
            "parameters": {"t": [0.2, 0.7]},
        },
    }


def dare(paths: Mapping[str, Path]) -> dict[str, Any]:
    """A merge that draws masks; mergekit draws others than we do."""
    base, one, _ = (str(paths[name]) for name in NAMES)
    each = {"model": one, "parameters": {"weight": 1.0, "density": 0.4}}
    return {"merge_method": "dare_linear", "base_model": base, "models": [each], "dtype": "float32"}


IN_BF16 = ("linear", "task_arithmetic", "ties", "ties_sum", "slerp")
"""The merges that are made in bf16 too."""


def merged(values: dict[str, Any], out: Path) -> dict[str, Tensor]:
    """Run mergekit."""
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
    from mergekit.merge import run_merge  # type: ignore[import-not-found]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found]

    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0)
    run_merge(MergeConfiguration.model_validate(values), str(out), options)
    found: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return found


def main() -> None:
    torch.set_num_threads(1)
    stored: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for kind in DTYPES:
            paths = write_models(place, kind)
            wanted = configurations(paths)
            if kind == "bf16":
                wanted = {case: wanted[case] for case in IN_BF16}
            else:
                wanted["dare_linear"] = dare(paths)
            for case, values in wanted.items():
                for key, tensor in merged(values, place / "out" / kind / case).items():
                    stored[f"{case} {kind} {key}"] = tensor.contiguous()
    made_by = {
        "mergekit": version("mergekit"),
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    save_file(stored, OUTPUTS, metadata=made_by)
    print(f"{len(stored)} tensors, {OUTPUTS.stat().st_size} bytes, {made_by}")


if __name__ == "__main__":
    main()
