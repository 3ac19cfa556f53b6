"""From the values of a YAML file to a merge's configuration; what is wrong is collected on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import nearest
from trimtab.merge.combinations import Draft, combination_problems
from trimtab.merge.config import MergeConfig, Slice, Source, as_yaml
from trimtab.merge.methods import (
    FIDELITIES,
    MERGEKIT_METHODS,
    MERGEKIT_PARAMETERS,
    METHODS,
    idle_in,
    methods_with,
    taken_by,
)
from trimtab.merge.model_ref import ModelRef
from trimtab.merge.pieces import Pieces
from trimtab.merge.settings import Setting, read_setting
from trimtab.yaml_file import Key, WrongValue, count_in, dotted, flag_in, spelled, text_in

if TYPE_CHECKING:
    from trimtab.ops.presets import MergeMethod

TOP = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "random_seed",
    "fidelity",
    "allow_partial",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass
class Reading(Pieces):
    """Reads a whole configuration, with what was found wrong and what is worth a note so far.

    Args:
        problems: what is wrong.
        notes: what has no effect.
        method: the method, as soon as it is known; None while it is not, or wrong.
    """

    notes: list[str] = field(default_factory=list)
    method: MergeMethod | None = None

    def config(self, given: Any, text: str) -> MergeConfig:
        """Read a whole configuration; it is to be used only if there are no problems."""
        values = self.mapping(given, (), TOP, "top")
        self.method = self._method(values.get("merge_method"))
        base = self.model(values.get("base_model"), ("base_model",))
        parameters = self._parameters(values.get("parameters"), ("parameters",), "shared")
        drafts = self._drafts(values, base)
        tokenizer_source = self._tokenizer_source(values)
        if tokenizer_source == "base" and values.get("base_model") is None:
            key: Key = ("tokenizer_source",) if values.get("tokenizer") is None else ("tokenizer", "source")
            self.wrong(key, "is base, and there is no base_model; give one, or name a model here")
        seed = self.scalar(values, "random_seed", count_in)
        if seed is not None and not 0 <= seed < 1 << 64:
            self.wrong(("random_seed",), f"must be at least 0 and below 2**64, not {spelled(seed)}")
        config = MergeConfig(
            method=self.method or METHODS[0],
            slices=tuple(draft.slice for draft in drafts),
            sliced=values.get("slices") is not None,
            base_model=base,
            parameters=parameters,
            dtype=self._dtype(values, "dtype"),
            out_dtype=self._dtype(values, "out_dtype"),
            tokenizer_source=tokenizer_source,
            chat_template=self._chat_template(values),
            seed=seed or 0,
            fidelity=self.word(values, "fidelity", FIDELITIES) or "paper",
            allow_partial=self.scalar(values, "allow_partial", flag_in) or False,
            text=text,
            notes=tuple(dict.fromkeys(self.notes)),
        )
        if self.method is not None and (base is not None or values.get("base_model") is None):
            self.problems += combination_problems(config, drafts)
        return config if text or self.problems else replace(config, text=as_yaml(given))

    def _method(self, value: Any) -> MergeMethod | None:
        known = ", ".join(METHODS)
        if value is None:
            self.wrong(("merge_method",), f"is missing; known: {known}")
            return None
        if not isinstance(value, str):
            self.wrong(("merge_method",), f"must be text, not {spelled(value)}; known: {known}")
            return None
        for method in METHODS:
            if value == method:
                return method
        if value in MERGEKIT_METHODS:
            self.wrong(
                ("merge_method",),
                f"{value} is a method of mergekit's that is not supported here; known: {known}",
            )
            return None
        close = nearest(value, METHODS)
        hint = f"did you mean {close}?" if close else f"known: {known}"
        self.wrong(("merge_method",), f"{spelled(value)} is not known; {hint}")
        return None

    def _drafts(self, values: Mapping[str, Any], base: ModelRef | None) -> list[Draft]:
        models, slices = values.get("models"), values.get("slices")
        if models is not None and slices is not None:
            self.wrong(("slices",), "and models are both given; keep one of them")
        elif models is None and slices is None:
            self.wrong(("models",), "is missing; list the models to merge, or give slices")
        drafts = []
        if models is not None:
            drafts.append(self._whole_models(models, base))
        for index, value in enumerate(self.items(slices, ("slices",))):
            drafts.append(self._slice(value, ("slices", index), base))
        return [draft for draft in drafts if draft is not None]

    def _whole_models(self, value: Any, base: ModelRef | None) -> Draft | None:
        """All layers of some models; the base_model is one of them, whether it is listed or not."""
        sources = [
            self._source(item, ("models", index), base, with_layers=False)
            for index, item in enumerate(self.items(value, ("models",)))
        ]
        found = [source for source in sources if source is not None]
        if not sources or len(found) < len(sources):
            return None
        if base is not None and base not in [source.model for source in found]:
            found.append(Source(base, None, {}))
        return Draft(Slice(tuple(found), base, {}), (), ("models",), len(sources))

    def _slice(self, value: Any, key: Key, default_base: ModelRef | None) -> Draft | None:
        values = self.mapping(value, key, ("sources", "base_model", "parameters"), "slice")
        own_base = self.model(values.get("base_model"), (*key, "base_model"))
        base = default_base if values.get("base_model") is None else own_base
        parameters = self._parameters(values.get("parameters"), (*key, "parameters"), "shared")
        if values.get("sources") is None and isinstance(value, dict):
            self.wrong((*key, "sources"), "is missing; list the models whose layers are merged")
        sources = [
            self._source(item, (*key, "sources", index), base, with_layers=True)
            for index, item in enumerate(self.items(values.get("sources"), (*key, "sources")))
        ]
        found = tuple(source for source in sources if source is not None)
        broken = base is None and values.get("base_model") is not None
        if not sources or len(found) < len(sources) or broken:
            return None
        return Draft(Slice(found, base, parameters), key, (*key, "sources"), len(sources))

    def _source(self, value: Any, key: Key, base: ModelRef | None, *, with_layers: bool) -> Source | None:
        known = ("model", "layer_range", "parameters") if with_layers else ("model", "parameters")
        values = self.mapping(value, key, known, "source")
        if not isinstance(value, dict):
            return None
        model = self.model(values.get("model"), (*key, "model"))
        if values.get("model") is None:
            self.wrong((*key, "model"), "is missing; name a folder or a hub id")
        parameters = self._parameters(
            values.get("parameters"), (*key, "parameters"), "base" if model and model == base else "input"
        )
        layers = self._layers(values.get("layer_range"), (*key, "layer_range")) if with_layers else None
        if model is None or (with_layers and layers is None):
            return None
        return Source(model, layers, parameters)

    def _layers(self, value: Any, key: Key) -> tuple[int, int] | None:
        wanted = "must be two whole numbers, the first layer and the one after the last, such as [0, 12]"
        if value is None:
            self.wrong(key, f"is missing; it {wanted}")
            return None
        if not isinstance(value, list | tuple) or len(value) != 2:
            self.wrong(key, f"{wanted}, not {_listed(value)}")
            return None
        try:
            low, high = (count_in(item) for item in value)
        except WrongValue:
            self.wrong(key, f"{wanted}, not {_listed(value)}")
            return None
        if not 0 <= low < high:
            self.wrong(key, f"must go from 0 or more to more than that, not {_listed(value)}")
            return None
        return low, high

    def _parameters(
        self, value: Any, key: Key, level: Literal["shared", "input", "base"]
    ) -> dict[str, Setting]:
        """Read the parameters of one level; what is wrong there stands as an empty tuple under its name."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(key, f"must be a mapping, not {spelled(value)}")
            return dict.fromkeys(taken_by(self.method), ()) if self.method else {}
        if self.method is None:  # no names can be checked against it
            return {}
        read: dict[str, Setting] = {}
        for name, setting in value.items():
            self._parameter(self.method, str(name), setting, (*key, str(name)), level, read)
        return read

    def _parameter(
        self, method: MergeMethod, name: str, value: Any, key: Key, level: str, read: dict[str, Setting]
    ) -> None:
        taken, idle = taken_by(method), idle_in(method)
        if name in idle:
            read_setting(value, idle[name][0], key, self.problems)
            self.notes.append(f"{name} has no effect here: {idle[name][1]}")
        elif name not in taken:
            self.wrong(key, _unknown_parameter(method, name, key))
            read.update({close: () for close in [nearest(name, taken)] if close})
        elif level != "shared" and taken[name].scope == "shared":
            self.wrong(key, f"has one value for all inputs; write it under {_shared_places(key)}")
            read[name] = ()
        else:
            read[name] = read_setting(value, taken[name], key, self.problems)
            if level == "base" and taken[name].scope == "non_base":
                self.notes.append(
                    f"{dotted(key)} has no effect: this model is the base_model, which has no {name}"
                )

    def _tokenizer_source(self, values: Mapping[str, Any]) -> Literal["base", "union"] | ModelRef | None:
        key: Key = ("tokenizer_source",)
        source = values.get("tokenizer_source")
        if values.get("tokenizer") is not None:
            if source is not None:
                self.wrong(("tokenizer",), "and tokenizer_source are both given; keep one of them")
            inner = self.mapping(values["tokenizer"], ("tokenizer",), ("source",), "tokenizer")
            source, key = inner.get("source", "union"), ("tokenizer", "source")  # mergekit's default
        if source == "base" or source == "union":
            return "base" if source == "base" else "union"
        return self.model(source, key)

    def _chat_template(self, values: Mapping[str, Any]) -> str | None:
        template = self.scalar(values, "chat_template", text_in)
        if template is not None and "{" not in template:
            self.wrong(
                ("chat_template",),
                f"{spelled(template)} is no template; auto and the names of mergekit's templates are not "
                "supported here, so write the template itself (Jinja text, which holds a {)",
            )
            return None
        return template

    def _dtype(self, values: Mapping[str, Any], name: str) -> str | None:
        value = values.get(name)
        if isinstance(value, str):
            value = value.removeprefix("torch.")
        return self.word({name: value}, name, DTYPES)


def _unknown_parameter(method: MergeMethod, name: str, key: Key) -> str:
    known = ", ".join(taken_by(method))
    owners = methods_with(name)
    if owners:
        return f"belongs to method {_either(owners)}; {method} takes {known}"
    if name in MERGEKIT_PARAMETERS:
        return (
            f"belongs to mergekit's {MERGEKIT_PARAMETERS[name]}, not supported here; {method} takes {known}"
        )
    close = nearest(name, (*taken_by(method), *idle_in(method)))
    hint = f"did you mean {dotted((*key[:-1], close))}?" if close else f"{method} takes {known}"
    return f"is not a parameter of method {method}; {hint}"


def _shared_places(key: Key) -> str:
    return "parameters" if key[0] == "models" else f"{dotted((*key[:2], 'parameters'))} or parameters"


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _listed(value: Any) -> str:
    if not isinstance(value, list | tuple):
        return spelled(value)
    return f"[{', '.join(spelled(item) for item in value)}]"
