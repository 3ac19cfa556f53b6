"""A model with a LoRA adapter on it, as an input of a merge: ``W + scaling · B A``, a few rows at a time.

The numbers are those of PEFT's ``PeftModel.from_pretrained(model, adapter).merge_and_unload()`` (LoRA:
arXiv 2106.09685, rank-stabilized: 2312.03732, DoRA: 2402.09353): factors are widened to fp32, a linear
layer's sum is formed in fp32 and rounded once, an embedding's ``scaling · B A`` is rounded before
it is added.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.delta.checkpoint import Checkpoint, open_checkpoint
from trimtab.merge.architecture import resized
from trimtab.merge.fitting import Change, Fitting, read_settings
from trimtab.merge.inputs import Input
from trimtab.merge.tokens import has_tokenizer, tokenizer_folder
from trimtab.ops.fingerprint import combined_digest

_BLOCK = 32
"""Rows of ``B A`` that are multiplied at once: fixed, so that an entry does not depend on what is read."""


class Adapted:
    """A model with a PEFT LoRA adapter on it.

    Plain LoRA, rank-stabilized LoRA and DoRA (on linear layers) are added to the weights; weights that lie
    whole in the adapter (``modules_to_save``, trained biases, embeddings of a vocabulary that has grown)
    replace the model's, in the model's dtype. Which base the adapter was trained on is not checked.

    Args:
        model: what it is put on.
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        label: how to speak of the pair.

    Attributes:
        folder: the model's folder, where ``config.json`` lies.
        tokenizer_folder: the adapter's folder if a tokenizer lies there, else the model's.
        config: the model's ``config.json``; ``vocab_size`` is the adapter's if that has grown.
        notes: what is worth saying about it, in sentences.

    Raises:
        UserError: it is none that can be merged, or does not fit the model (all misfits are told at once).
    """

    def __init__(self, model: Input, adapter: Path, label: str) -> None:
        self.label = label
        self.folder = model.folder
        self.tokenizer_folder: Path = adapter if has_tokenizer(adapter) else tokenizer_folder(model)
        self._model = model
        self._adapter = adapter
        settings = read_settings(adapter)
        self._tensors: Checkpoint = open_checkpoint(adapter, adapter=True, mapped=True)
        fitted = Fitting(model, self._tensors, settings, label)
        self._replaced, self._changes = fitted.replaced, fitted.changes
        self.notes: tuple[str, ...] = tuple(fitted.notes)
        self.config: Mapping[str, Any] = (
            resized(model.config, fitted.tokens) if fitted.tokens else model.config
        )
        self._right: tuple[str, Tensor] = ("", torch.empty(0))

    def keys(self) -> tuple[str, ...]:
        """The model's keys."""
        return self._model.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        replaced = self._replaced.get(key)
        return self._model.shape(key) if replaced is None else self._tensors.shape(replaced)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor: the model's."""
        return self._model.dtype(key)

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Entries of one merged weight; no more than the rows they lie in, and at most 62 more, are made.

        An entry's value does not depend on which others are read with it.
        """
        change = self._changes.get(key)
        if change is None or low >= high:
            return self._unchanged(key, low, high)
        columns = self.shape(key)[1]
        first, last = low // columns, -(-high // columns)
        if change.magnitude is not None:
            merged = self._with_norms(key, change, first, last)
            return merged.view(-1)[low - first * columns : high - first * columns]
        delta = self._delta(key, change, first, last).view(-1)
        delta = delta[low - first * columns : high - first * columns]
        weight = self._unchanged(key, low, high)
        if change.rounded:
            return delta.to(weight.dtype).add_(weight)
        return delta.add_(weight).to(weight.dtype)

    def expect(self, key: str, low: int, high: int) -> None:
        """Have the model's weights read ahead; an adapter's are few."""
        if key not in self._replaced:
            self._model.expect(key, low, high)

    def fingerprint(self) -> str:
        """The model's fingerprint together with a BLAKE2b of all of the adapter."""
        parts = [self._model.fingerprint()]
        for file in ("adapter_config.json", *self._tensors.files):
            with (self._adapter / file).open("rb") as opened:
                parts.append(hashlib.file_digest(opened, "blake2b").hexdigest())
        return combined_digest(parts)

    def _unchanged(self, key: str, low: int, high: int) -> Tensor:
        """Entries before ``B A`` is added: the model's, or those that the adapter holds whole."""
        replaced = self._replaced.get(key)
        if replaced is None:
            return self._model.read(key, low, high)
        return _read_flat(self._tensors, replaced, low, high).to(self.dtype(key))

    def _delta(self, key: str, change: Change, first: int, last: int) -> Tensor:
        """Rows ``first … last−1`` of ``scaling · B A``, as the weight lies, in fp32 (fp64 for fp64)."""
        rows, columns = self.shape(key)
        start, stop = first // _BLOCK * _BLOCK, min(-(-last // _BLOCK) * _BLOCK, rows)
        wide = torch.promote_types(self.dtype(key), torch.float32)
        part = slice(start, stop)
        left = self._tensors.read_slice(change.left, (slice(None), part) if change.turned else (part,))
        left = (left.T if change.turned else left).to(wide).contiguous()
        right = self._whole_right(change, wide)
        delta = torch.empty(stop - start, columns, dtype=wide)
        blocks = len(left) // _BLOCK
        full = blocks * _BLOCK
        if blocks:  # one call for all: threads meet once
            parts = left[:full].view(blocks, _BLOCK, -1)
            torch.bmm(parts, right.expand(blocks, -1, -1), out=delta[:full].view(blocks, _BLOCK, -1))
        if full < len(left):  # the weight's last rows
            torch.mm(left[full:], right, out=delta[full:])
        return delta[first - start : last - start].mul_(change.scaling)

    def _whole_right(self, change: Change, wide: torch.dtype) -> Tensor:
        """The factor that all rows need; the last one is kept, since rows are asked for one after another."""
        name, right = self._right
        if name != change.right or right.dtype != wide:
            right = self._tensors.read(change.right).to(wide)
            right = (right.T if change.turned else right).contiguous()
            self._right = change.right, right
        return right

    def _with_norms(self, key: str, change: Change, first: int, last: int) -> Tensor:
        """DoRA: rows ``first … last−1`` of ``m · V / ‖V‖`` with V = W + scaling · B A, norms by row."""
        assert change.magnitude is not None
        columns = self.shape(key)[1]
        weight = self._unchanged(key, first * columns, last * columns).view(-1, columns)
        rows = self._delta(key, change, first, last).add_(weight)
        wanted = self._tensors.read_slice(change.magnitude, (slice(first, last),)).to(rows.dtype)
        return rows.mul_((wanted / torch.linalg.norm(rows, dim=1)).view(-1, 1)).to(weight.dtype)


def _read_flat(tensors: Checkpoint, name: str, low: int, high: int) -> Tensor:
    """Entries ``low … high−1`` of a tensor in row-major order; no more than the rows they lie in are read."""
    shape = tensors.shape(name)
    if not shape:
        return tensors.read(name).reshape(-1)[low:high]
    columns = math.prod(shape[1:])
    first, last = (low // columns, -(-high // columns)) if columns else (0, 0)
    rows = tensors.read_slice(name, (slice(first, last),))
    return rows.reshape(-1)[low - first * columns : high - first * columns]
