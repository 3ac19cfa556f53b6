"""Models whose tokenizers differ: one vocabulary for the output, and inputs whose rows are in its order.

The rules are mergekit's. The output's tokenizer is that of one model, or the union: the base's, to which the
tokens of the others are added. A model's row for a token is its own; where it has none it is given

- the row of the only model that has the token, else
- the row of the base model, if that has it, else
- the mean of the rows of all models that have it, else (no model has it) zeros.

An id without a token is given zeros. Rows beyond the tokenizer (embeddings are often padded to a round
number) mean no token and are dropped; tokens beyond the rows cannot be read by their model and are dropped
from its tokenizer. A token that is added to the base's tokenizer is matched in the text as it is written: a
union can hold another model's words, but does not split text into them as that model did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.delta.problems import first_few
from trimtab.errors import UserError
from trimtab.merge.architecture import Architecture, Keys, resized
from trimtab.merge.inputs import Input
from trimtab.merge.layers import is_head, tied_key
from trimtab.merge.tokens import (
    add_all,
    cut,
    has_tokenizer,
    load,
    same_files,
    tokenizer_folder,
    tokens_of,
)

_ZERO, _MEAN = -1, -2
_ADVICE = "set tokenizer_source to union (the tokens of all models) or base (those of the base)"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a merge's output, and where each input has them.

    Args:
        tokenizer: a transformers tokenizer; save it with the output.
        size: rows of the output's embeddings.
        rows: per input, output id -> the input's own row, or −1.
        base: which input's row stands in where a model has none; None if no model is the base.
    """

    tokenizer: Any
    size: int
    rows: tuple[Tensor, ...]
    base: int | None = None

    def donors(self, members: Sequence[int]) -> Tensor:
        """Output id -> whose row is given to a model without one.

        Args:
            members: the inputs that count (those that have the tensor at all).

        Returns:
            An input's number; −1 for zeros, −2 for the mean of all that have it.
        """
        has = torch.stack([self.rows[member] >= 0 for member in members])
        count = has.sum(0)
        only = torch.tensor(list(members))[has.to(torch.uint8).argmax(0)]
        donor = torch.where(count == 0, _ZERO, torch.where(count == 1, only, _MEAN))
        if self.base is not None and self.base in members:
            donor = torch.where((count > 1) & (self.rows[self.base] >= 0), self.base, donor)
        return donor

    def configured(self, config: Mapping[str, Any], member: int) -> dict[str, Any]:
        """A configuration (``config.json``, ``generation_config.json``) of one input, for the output.

        ``vocab_size`` becomes the output's, and the ids in ``*_token_id`` those of the same tokens there; one
        whose token the output lacks becomes None.
        """
        new = {old: id_ for id_, old in enumerate(self.rows[member].tolist()) if old >= 0}

        def moved(key: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {inner: moved(inner, one) for inner, one in value.items()}
            if not key.endswith("_token_id"):
                return value
            if isinstance(value, list):
                return [new[old] for old in value if old in new] or None
            return new.get(value)

        return {key: moved(key, value) for key, value in resized(config, self.size).items()}


class Aligned:
    """An input whose embeddings are in the order of a vocabulary.

    A head that the model ties to its embedding and another input stores can be read by the head's key: its
    rows are the embedding's, and for tokens that the model lacks those of the other inputs' heads.

    Args:
        inputs: all inputs of the merge, in the order of ``vocabulary.rows``.
        index: which of them this one is.
        vocabulary: the output's.
        keys: the tensors with one row per token (:func:`vocabulary_keys`); the others are read as they are.
        members: the inputs that are merged, whose rows may stand in for one another; default all.

    Raises:
        UserError: the rows of such a tensor have other lengths in the inputs.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        index: int,
        vocabulary: Vocabulary,
        keys: frozenset[str],
        members: Sequence[int] | None = None,
    ) -> None:
        self._inputs, self._index, self._vocabulary = inputs, index, vocabulary
        self._model = inputs[index]
        self.label, self.folder = self._model.label, self._model.folder
        self.config: Mapping[str, Any] = resized(self._model.config, vocabulary.size)
        numbers = sorted({index, *(range(len(inputs)) if members is None else members)})
        counted = {number: inputs[number] for number in numbers}
        aligned = (keys & set(self._model.keys())) | _tied_heads(self._model, inputs)
        self._members = {key: _stored(key, counted) for key in aligned}
        self._donors: dict[tuple[int, ...], Tensor] = {}
        for key, stored in self._members.items():
            _check_lengths(key, [(inputs[member], own) for member, own in stored.items()])

    def keys(self) -> tuple[str, ...]:
        """The model's keys."""
        return self._model.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor in the output."""
        shape = self._model.shape(self._own(key))
        return (self._vocabulary.size, *shape[1:]) if key in self._members else shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor; an aligned one has that to which all inputs' promote: it takes their rows."""
        dtype = self._model.dtype(self._own(key))
        for member, own in self._members.get(key, {}).items():
            dtype = torch.promote_types(dtype, self._inputs[member].dtype(own))
        return dtype

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Entries of one tensor, in the output's order; no more than the rows they lie in are made."""
        if key not in self._members:
            return self._model.read(key, low, high)
        if low >= high:
            return torch.empty(0, dtype=self.dtype(key))
        stored = self._own(key)
        columns = math.prod(self._model.shape(stored)[1:])
        first, last = low // columns, -(-high // columns)
        own = self._vocabulary.rows[self._index][first:last]
        dtype = self.dtype(key)
        start = int(own[0])
        if start >= 0 and torch.equal(own, torch.arange(start, start + last - first)):
            moved = (start - first) * columns
            return self._model.read(stored, low + moved, high + moved).to(dtype)
        made = torch.zeros(last - first, columns, dtype=dtype)
        _copy_rows(self._model, stored, own, torch.arange(last - first), made)
        self._give(key, first, own, made)
        return made.view(-1)[low - first * columns : high - first * columns]

    def expect(self, key: str, low: int, high: int) -> None:
        """Have the model's values read ahead, where they are not moved about."""
        if key not in self._members:
            self._model.expect(key, low, high)

    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self._model.fingerprint()

    def _own(self, key: str) -> str:
        """The key under which the model stores a tensor."""
        return self._members[key][self._index] if key in self._members else key

    def _give(self, key: str, first: int, own: Tensor, made: Tensor) -> None:
        """Fill in the rows of tokens that this model lacks."""
        lacking = (own < 0).nonzero().view(-1)
        if not len(lacking):
            return
        stored = self._members[key]
        members = tuple(stored)
        if members not in self._donors:
            self._donors[members] = self._vocabulary.donors(members)
        donors = self._donors[members][first + lacking]
        for donor in sorted(set(donors.tolist())):
            places = lacking[donors == donor]
            if donor >= 0:
                rows = self._vocabulary.rows[donor][first + places]
                _copy_rows(self._inputs[donor], stored[donor], rows, places, made)
            elif donor == _MEAN:
                made[places] = self._mean(key, first + places, made.shape[1]).to(made.dtype)

    def _mean(self, key: str, tokens: Tensor, columns: int) -> Tensor:
        """The mean over the models that have a token, summed in their order in fp32 (fp64 for fp64)."""
        wide = torch.promote_types(self.dtype(key), torch.float32)
        total = torch.zeros(len(tokens), columns, dtype=wide)
        count = torch.zeros(len(tokens), 1, dtype=wide)
        for member, own in self._members[key].items():
            rows = self._vocabulary.rows[member][tokens]
            theirs = torch.zeros_like(total)
            _copy_rows(self._inputs[member], own, rows, torch.arange(len(tokens)), theirs)
            total += theirs
            count += (rows >= 0).view(-1, 1)
        return total / count


def build(
    inputs: Sequence[Input], base: Input | None, source: Literal["base", "union"] | Input
) -> Vocabulary:
    """Build the output's vocabulary.

    A model without a tokenizer is taken to have the base's.

    Args:
        inputs: all inputs of the merge.
        base: the base model, one of the inputs; None if there is none, then ``base`` and ``union`` start from
            the first input's tokenizer, and no model's rows go before the others'.
        source: ``base``, ``union``, or the model whose tokenizer is taken.

    Raises:
        UserError: the model that gives the tokenizer has none, or one cannot be read or cut to its rows.
    """
    first = base or inputs[0]
    chosen = first if isinstance(source, str) else source
    if not has_tokenizer(tokenizer_folder(chosen)):
        raise UserError(
            f"tokenizer_source needs the tokenizer of {chosen.label}, but {tokenizer_folder(chosen)} holds "
            f"none; copy one there, or name a model that has one"
        )
    folders = [tokenizer_folder(model) for model in inputs]
    loaded = {folder: load(folder) for folder in {*folders, tokenizer_folder(first)} if has_tokenizer(folder)}
    limits = [_rows_of(model) for model in inputs]
    tokenizer = cut(load(tokenizer_folder(chosen)), _rows_of(chosen), chosen.label)
    if source == "union":
        order = sorted(range(len(inputs)), key=lambda number: inputs[number] is not first)
        others = [(loaded[folders[number]], limits[number]) for number in order if folders[number] in loaded]
        add_all(tokenizer, others)
    tokens: dict[str, int] = tokenizer.get_vocab()
    size = max(len(tokens), max(tokens.values(), default=-1) + 1)
    stand_in = loaded.get(tokenizer_folder(first), tokenizer)
    rows = tuple(
        _own_rows(tokens, loaded.get(folder, stand_in).get_vocab(), size, limit)
        for folder, limit in zip(folders, limits, strict=True)
    )
    number = next((number for number, model in enumerate(inputs) if model is base), None)
    return Vocabulary(tokenizer, size, rows, number)


def vocabulary_keys(model: Input) -> frozenset[str]:
    """The keys of the tensors with one row per token: input and output embeddings and the latter's bias.

    Raises:
        UserError: transformers has no class for the model, or its embeddings are not found.
    """
    keys = Keys(model.keys())
    found = {keys.find(name) for name in Architecture(model.folder).vocabulary} - {None}
    if not found:
        raise UserError(f"{model.label} holds no embedding that its config.json speaks of")
    return frozenset(key for key in found if key is not None)


def check_vocabularies(inputs: Sequence[Input]) -> None:
    """Refuse inputs whose rows mean different tokens; for merges without ``tokenizer_source``.

    Cheap where all is well: shapes are compared first, then the bytes of the tokenizers' files, and only
    where those differ the tokens. Folders without a tokenizer are not compared.

    Raises:
        UserError: numbers of rows differ, or tokenizers disagree on ids that both have.
    """
    _check_sizes(inputs)
    folders = {tokenizer_folder(model): model for model in inputs}
    having = [(folder, model) for folder, model in folders.items() if has_tokenizer(folder)]
    for folder, model in having[1:]:
        _check_same(having[0], (folder, model))


def _tied_heads(model: Input, inputs: Sequence[Input]) -> set[str]:
    """The keys of heads that some input stores, and that a model has in the embedding it is tied to."""
    keys = set(model.keys())
    heads = {key for one in inputs for key in one.keys() if is_head(key)} - keys  # noqa: SIM118 (no dict)
    return {key for key in heads if tied_key(key, model.keys(), model.config) is not None}


def _stored(key: str, models: Mapping[int, Input]) -> dict[int, str]:
    """Which models have a tensor, and under which key: a head may lie in the embedding it is tied to."""
    found = {}
    for number, model in models.items():
        keys = model.keys()
        if (own := key if key in keys else tied_key(key, keys, model.config)) is not None:
            found[number] = own
    return found


def _check_lengths(key: str, stored: Sequence[tuple[Input, str]]) -> None:
    lengths = {model.label: model.shape(own)[1:] for model, own in stored}
    if len(set(lengths.values())) > 1:
        texts = [f"{' × '.join(map(str, length))} in {label}" for label, length in lengths.items()]
        raise UserError(
            f"the rows of {key} have different lengths: {first_few(texts)}; they cannot be merged"
        )


def _check_sizes(inputs: Sequence[Input]) -> None:
    first = inputs[0]
    for model in inputs[1:]:
        shared = set(first.keys()) & set(model.keys())
        shapes = {key: (first.shape(key), model.shape(key)) for key in shared}
        different = {
            key for key, (ours, theirs) in shapes.items() if ours[1:] == theirs[1:] and ours != theirs
        }
        if not different:  # the class is built only where there is something to say
            continue
        if names := sorted(different & vocabulary_keys(first)):
            ours, theirs = (shapes[names[0]][side][0] for side in (0, 1))
            raise UserError(
                f"{first.label} has {ours} rows, one per token, in {first_few(names)}, and {model.label} has "
                f"{theirs}; {_ADVICE}"
            )


def _check_same(ours: tuple[Path, Input], theirs: tuple[Path, Input]) -> None:
    if same_files(ours[0], theirs[0]):
        return
    first, second = ({id_: token for token, id_ in tokens_of(folder).items()} for folder, _ in (ours, theirs))
    shared = sorted(first.keys() & second.keys())
    different = [
        f"id {id_} is {first[id_]!r} and {second[id_]!r}" for id_ in shared if first[id_] != second[id_]
    ]
    if different:
        raise UserError(
            f"the tokenizers of {ours[1].label} and {theirs[1].label} disagree on {len(different)} of "
            f"{len(shared)} shared token ids ({first_few(different)}), so their rows cannot be merged "
            f"as they lie; {_ADVICE}"
        )


def _rows_of(model: Input) -> int:
    """The number of rows of a model's embeddings."""
    sizes = {key: model.shape(key)[0] for key in sorted(vocabulary_keys(model))}
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise UserError(f"the embeddings of {model.label} have different numbers of rows: {text}")
    return next(iter(sizes.values()))


def _own_rows(tokens: Mapping[str, int], own: Mapping[str, int], size: int, limit: int) -> Tensor:
    """Output id -> own row, or −1 where the token is unknown or lies beyond the rows."""
    rows = [-1] * size
    for token, id_ in tokens.items():
        row = own.get(token, -1)
        rows[id_] = row if row < limit else -1
    return torch.tensor(rows, dtype=torch.int64)


def _copy_rows(model: Input, key: str, rows: Tensor, places: Tensor, made: Tensor) -> None:
    """``made[places] = tensor[rows]`` where a row is given (≥ 0): one read per run of neighbouring rows."""
    given = rows >= 0
    rows, places = rows[given], places[given]
    if not len(rows):
        return
    breaks = ((rows[1:] - rows[:-1] != 1) | (places[1:] - places[:-1] != 1)).nonzero().view(-1) + 1
    columns = made.shape[1]
    bounds = [0, *breaks.tolist(), len(rows)]
    for start, stop in pairwise(bounds):
        row, place = int(rows[start]), int(places[start])
        part = model.read(key, row * columns, (row + stop - start) * columns)
        made[place : place + stop - start] = part.view(stop - start, columns)
