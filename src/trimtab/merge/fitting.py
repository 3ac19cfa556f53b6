"""What a LoRA adapter changes in a model: its settings, and which of its tensors goes to which weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab.delta.checkpoint import Checkpoint, read_json
from trimtab.delta.problems import Problems, shape_text
from trimtab.errors import UserError
from trimtab.merge.architecture import Architecture, Keys
from trimtab.merge.inputs import Input
from trimtab.ops import canonical_name

_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?"
)
_OWN_STARTS = ("gaussian", "eva", "orthogonal")  # initialisations that leave the model's weights alone
_UNSUPPORTED = (
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_UNTIE = (
    "from transformers import AutoModelForCausalLM as M; "
    "m = M.from_pretrained({source!r}, tie_word_embeddings=False); "
    "m.get_output_embeddings().weight.data = m.get_input_embeddings().weight.data.clone(); "
    "m.save_pretrained({target!r})"
)
_MERGE = (
    "merge it once with PEFT and give the result instead: AutoPeftModelForCausalLM.from_pretrained("
    "{adapter!r}).merge_and_unload().save_pretrained(…)"
)


@dataclass(frozen=True)
class AdapterSettings:
    r"""What an ``adapter_config.json`` says about the size of the change.

    Args:
        rank: r, the inner dimension of ``B A``.
        alpha: ``lora_alpha``; the change is scaled by alpha / r, or alpha / √r if ``stabilized``.
        stabilized: ``use_rslora``.
        ranks: ``rank_pattern``: a regular expression over the ends of module paths -> their rank.
        alphas: ``alpha_pattern``, likewise.
        dora: ``use_dora``: rows are brought to stored norms.
        saved: ``modules_to_save`` is set: weights in the file are copies that were trained.
        tied: ``ensure_weight_tying``.

    Examples:
        >>> settings = AdapterSettings(8, 16, alphas={"q_proj": 32}, ranks={r"layers\.1\..*": 4})
        >>> settings.scaling("model.layers.0.q_proj"), settings.scaling("model.layers.1.v_proj")
        (4.0, 4.0)
    """

    rank: int
    alpha: float
    stabilized: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    saved: bool = False
    tied: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return int(_first_match(self.ranks, module, self.rank))

    def scaling(self, module: str) -> float:
        """By what ``B A`` is multiplied in one module."""
        rank, alpha = self.rank_of(module), _first_match(self.alphas, module, self.alpha)
        return float(alpha / math.sqrt(rank) if self.stabilized else alpha / rank)


def read_settings(folder: Path) -> AdapterSettings:
    """Read ``adapter_config.json``.

    Raises:
        UserError: it is no LoRA adapter, or a kind of LoRA whose merge is not done here; each by its name.
    """
    path = folder / "adapter_config.json"
    stated = read_json(path)
    if (kind := stated.get("peft_type")) != "LORA":
        raise UserError(f"{path} says peft_type {kind!r}; a merge takes adapters of type LORA only")
    advice = _MERGE.format(adapter=str(folder))
    start = stated.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _OWN_STARTS and start.lower() not in ("true", "false"):
        raise UserError(
            f"{path} says init_lora_weights {start!r}, which changes the model's own weights when "
            f"the adapter is loaded; {advice}"
        )
    if used := [name for name in _UNSUPPORTED if stated.get(name)]:
        raise UserError(f"{path} uses {', '.join(used)}, which is not merged here; {advice}")
    return AdapterSettings(
        rank=_number(stated, "r", path, whole=True),
        alpha=_number(stated, "lora_alpha", path),
        stabilized=bool(stated.get("use_rslora")),
        ranks=_pattern(stated, "rank_pattern", path, whole=True),
        alphas=_pattern(stated, "alpha_pattern", path),
        dora=bool(stated.get("use_dora")),
        saved=bool(stated.get("modules_to_save")),
        tied=bool(stated.get("ensure_weight_tying")),
    )


@dataclass(frozen=True)
class Change:
    """``scaling · B A`` on one weight (in, out: of ``B A``'s module).

    Args:
        left: the adapter's tensor whose rows (columns, if ``turned``) are the weight's rows.
        right: the other one.
        turned: the weight is stored transposed to ``B A``: embeddings, and Conv1D layers.
        rounded: ``scaling · B A`` is rounded to the weight's dtype before it is added.
        magnitude: the adapter's tensor with the norms of the weight's rows (DoRA).
    """

    left: str
    right: str
    scaling: float
    turned: bool = False
    rounded: bool = False
    magnitude: str | None = None


class Fitting:
    """Which of an adapter's tensors goes to which of a model's; refuses, once, all that goes nowhere.

    Args:
        model: what the adapter is put on.
        tensors: the adapter's.
        settings: its settings.
        label: how to speak of the pair.

    Attributes:
        replaced: the model's key -> the adapter's tensor that takes its place.
        changes: the model's key -> what is added to it.
        notes: what is worth saying.
        tokens: the number of rows of embeddings that have grown; 0 if none has.

    Raises:
        UserError: with all misfits counted, the first few named.
    """

    def __init__(self, model: Input, tensors: Checkpoint, settings: AdapterSettings, label: str) -> None:
        self.model, self.tensors, self.settings, self.label = model, tensors, settings, label
        self.replaced: dict[str, str] = {}
        self.changes: dict[str, Change] = {}
        self.notes: list[str] = []
        self.tokens = 0
        self._problems = Problems()
        self._tied: list[str] = []
        self._keys = Keys(model.keys())
        self._architecture = Architecture(model.folder, model.config.get("model_type"))
        whole, modules = self._sorted()
        for name, tensor in whole.items():
            self._replace(name, tensor, whole)
        for module, parts in modules.items():
            self._change(module, parts)
        self._refuse()

    def _sorted(self) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """The adapter's tensors: parameter -> tensor that replaces it, and module -> part -> tensor."""
        whole: dict[str, str] = {}
        modules: dict[str, dict[str, str]] = {}
        for tensor in self.tensors.keys():  # noqa: SIM118 (no dict)
            name = canonical_name(tensor.replace(".modules_to_save.weight", ".weight"))
            if found := _PARTS.fullmatch(name):
                modules.setdefault(found["module"], {})[found["part"]] = tensor
            elif "lora_" in name:
                self._problems.extra.append(name)
            else:
                whole[name] = tensor
        return whole, modules

    def _replace(self, name: str, tensor: str, whole: Mapping[str, str]) -> None:
        key = self._key(name)
        if key is None:
            others = self._architecture.tied_to(name)
            if not any(self._same(tensor, whole[other]) for other in others if other in whole):
                self._missing(name)
            return
        shape, expected = self.tensors.shape(tensor), self.model.shape(key)
        if shape != expected and not (shape[1:] == expected[1:] and name in self._architecture.vocabulary):
            self._mismatched(name, shape, expected)
            return
        if shape != expected:
            self.tokens = shape[0]
        if self.settings.saved and not self.settings.tied and "weight" in name and len(shape) == 2:
            partners = [other for other in self._architecture.tied_to(name) if self._key(other) is None]
            if any(other not in whole or not self._same(tensor, whole[other]) for other in partners):
                self._tied.append(name)
        self.replaced[key] = tensor

    def _change(self, module: str, parts: Mapping[str, str]) -> None:
        name = f"{module}.weight"
        key = self._key(name)
        if key is None:
            self._missing(name)
            return
        embedding = "lora_embedding_A" in parts
        kind = "lora_embedding_" if embedding else "lora_"
        if {f"{kind}A", f"{kind}B"} - parts.keys():
            self._problems.missing.append(f"{name}: its {' and '.join(parts)} alone do not make a change")
            return
        first, second = parts[f"{kind}A"], parts[f"{kind}B"]
        turned = embedding or module in self._architecture.conv1d
        if self._fits(module, key, first, second, turned):
            self.changes[key] = Change(
                left=first if turned else second,
                right=second if turned else first,
                scaling=self.settings.scaling(module),
                turned=turned,
                rounded=embedding,
                magnitude=self._magnitude(module, key, parts, turned),
            )
        if embedding and (others := [o for o in self._architecture.tied_to(name) if self._key(o) is None]):
            self.notes.append(
                f"{self.label}: the adapter's change of {name} changes {', '.join(others)} as well, since "
                f"{self.model.label} ties them (so does PEFT when it merges)"
            )

    def _fits(self, module: str, key: str, first: str, second: str, turned: bool) -> bool:
        ours, a, b = self._shape(key), self.tensors.shape(first), self.tensors.shape(second)
        rank = self.settings.rank_of(module)
        if not len(a) == len(b) == len(ours) == 2:
            shapes = f"A {shape_text(a)}, B {shape_text(b)}"
            self._problems.mismatched.append(
                f"{module}.weight ({shapes}; weights of two dimensions are needed)"
            )
            return False
        if a[0] != rank or b[1] != rank:
            text = f"{module} (its rank is {a[0]} and {b[1]}, adapter_config.json says {rank})"
            self._problems.mismatched.append(text)
            return False
        made = (a[1], b[0]) if turned else (b[0], a[1])
        if made != ours:
            self._mismatched(f"{module}.weight", made, ours)
        return made == ours

    def _magnitude(self, module: str, key: str, parts: Mapping[str, str], turned: bool) -> str | None:
        tensor = parts.get("lora_magnitude_vector")
        if not self.settings.dora and tensor is None:
            return None
        if turned:
            raise UserError(
                f"{self.label}: the adapter uses use_dora on {module}, which is no linear layer; "
                f"{_MERGE.format(adapter=str(self.tensors.folder))}"
            )
        if tensor is None or self.tensors.shape(tensor) != self._shape(key)[:1]:
            self._problems.missing.append(f"{module}.lora_magnitude_vector")
        return tensor

    def _shape(self, key: str) -> tuple[int, ...]:
        replaced = self.replaced.get(key)
        return self.model.shape(key) if replaced is None else self.tensors.shape(replaced)

    def _key(self, name: str) -> str | None:
        return self._keys.find(name)

    def _same(self, first: str, second: str) -> bool:
        shape = self.tensors.shape(first)
        if shape != self.tensors.shape(second):
            return False
        parts = (slice(row, row + 1024) for row in range(0, shape[0] if shape else 1, 1024))
        read = self.tensors.read_slice
        return all(torch.equal(read(first, (part,)), read(second, (part,))) for part in parts)

    def _missing(self, name: str) -> None:
        found = self._keys.matching(name)
        if not found and any(self._key(other) for other in self._architecture.tied_to(name)):
            self._tied.append(name)
        else:
            self._problems.missing.append(f"{name} ({' or '.join(found)}?)" if found else name)

    def _mismatched(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        text = f"{name} ({shape_text(shape)} in the adapter, {shape_text(expected)} in the model)"
        self._problems.mismatched.append(text)

    def _refuse(self) -> None:
        if self._tied:
            source = str(self.model.folder)
            line = _UNTIE.format(source=source, target=f"{source}-untied")
            raise UserError(
                f"{self.label}: the adapter changes {' and '.join(self._tied)} independently, but "
                f"{self.model.label} ties its input and output embeddings and stores one weight for both; "
                f'untie the model once and put the adapter on that: python -c "{line}"'
            )
        self._problems.refuse(f"{self.label}: the adapter does not fit {self.model.label}")
        if not self.replaced and not self.changes:
            raise UserError(f"{self.label}: the adapter holds no weights")


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the path's end, from a dot or from its beginning."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _number(stated: Mapping[str, Any], name: str, path: Path, *, whole: bool = False) -> Any:
    return _checked(stated.get(name, 8), name, path, whole)


def _pattern(stated: Mapping[str, Any], name: str, path: Path, *, whole: bool = False) -> dict[str, Any]:
    values = stated.get(name) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} says {name} {values!r}; an object from patterns to numbers was expected")
    for pattern in values:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: {pattern!r} in {name} is no regular expression: {error}") from error
    return {key: _checked(value, f"{name}.{key}", path, whole) for key, value in values.items()}


def _checked(value: Any, name: str, path: Path, whole: bool) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or (whole and value < 1):
        wanted = "a whole number above 0" if whole else "a number"
        raise UserError(f"{path} says {name} {value!r}; {wanted} was expected")
    return value
