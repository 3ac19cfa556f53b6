"""What the tests of the data package share: a recipe's data section in short, and files made on the fly."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from trimtab.data import PreparedData, load_data
from trimtab.errors import UserError

TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message.reasoning_content %}{{ '[' + message.reasoning_content + ']' }}{% endif %}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Source:
    """A recipe's source."""

    path: str
    weight: float = 1.0
    split: str | None = None
    subset: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Spec:
    """A recipe's data section."""

    train: tuple[Source, ...]
    eval: tuple[Source, ...] | None = None
    format: str = "auto"
    max_length: int | None = 1024
    overlong: str = "drop"
    streaming: bool = False


@dataclass
class Loader:
    """Loads files with few words: ``load("sft", path)``, ``load.error("dpo", path)``."""

    tokenizer: Any
    defaults: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        method: str,
        *sources: Any,
        part: str = "train",
        tokenizer: Any = None,
        seed: int = 0,
        **spec: Any,
    ) -> PreparedData:
        made = tuple(source if isinstance(source, Source) else Source(str(source)) for source in sources)
        data = Spec(train=made, eval=made, **spec)
        return load_data(data, method=method, part=part, tokenizer=tokenizer or self.tokenizer, seed=seed)

    def error(self, *arguments: Any, **options: Any) -> str:
        """Return the one sentence that a user gets."""
        with pytest.raises(UserError) as caught:
            self(*arguments, **options)
        sentence = str(caught.value)
        assert "\n" not in sentence
        return sentence


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def tool_tokenizer() -> Any:
    return tiny.tokenizer(TOOL_TEMPLATE)


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A loader in an empty folder, so that relative paths read as a user's."""
    monkeypatch.chdir(tmp_path)
    return Loader(tokenizer)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (or raw text or bytes) to a file in the empty folder; the suffix says how."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else _text(name, content).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return Path(name)

    return write_file


def _text(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if ".jsonl" in name:
        return "".join(json.dumps(row) + "\n" for row in content)
    return json.dumps(content, indent=1)


def pair(prompt: str = "hi", chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
