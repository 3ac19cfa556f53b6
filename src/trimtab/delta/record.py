"""What is known of a delta besides its values: fingerprints, content hashes and statistics.

All of it comes from one pass over both models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.delta.difference import Difference, chunks
from trimtab.errors import UserError
from trimtab.ops import combined_digest, content_hash

Progress = Callable[[str, int, int], None]
"""Told after each parameter: its name, entries done, entries in all."""

_NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    # Neither of the 16-bit types is narrower than the other; a policy may be loaded in either.
    torch.bfloat16: (torch.float16,),
    torch.float16: (torch.bfloat16,),
}


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it was.

    Args:
        source: path or hub id with revision, as given.
        fingerprint: 32 hex digits over names, shapes, dtypes and contents of all parameters.
    """

    source: str
    fingerprint: str


@dataclass(frozen=True)
class TensorStatistics:
    """What τ of one parameter is like.

    Args:
        norm: ‖τ‖₂.
        mean_abs: mean of |τ|.
        zeros: share of entries that are exactly 0, in [0, 1].
        numel: number of entries.
        dtype: dtype τ is stored in, as torch writes it (``float32``).
        shape: its shape.
        reference_norm: ‖θ_r‖₂, to see τ in proportion.
    """

    norm: float
    mean_abs: float
    zeros: float
    numel: int
    dtype: str
    shape: tuple[int, ...]
    reference_norm: float


@dataclass(frozen=True)
class TensorRecord:
    """What is kept about one parameter.

    Args:
        statistics: of τ.
        content: content hash of τ as stored.
        reference_dtype: dtype of the parameter in the reference.
        reference_hashes: dtype -> content hash of the reference's values cast to it; its own dtype and those
            that are narrower.
    """

    statistics: TensorStatistics
    content: int
    reference_dtype: str
    reference_hashes: Mapping[str, int]


@dataclass(frozen=True)
class DeltaRecord:
    """What is kept about a delta.

    Args:
        fingerprint: of τ as stored: names, shapes, dtypes and contents.
        reference: θ_r.
        base: θ_b.
        tensors: by canonical name.
        added_rows: parameter -> rows the reference's vocabulary has more.
    """

    fingerprint: str
    reference: ModelIdentity
    base: ModelIdentity
    tensors: Mapping[str, TensorRecord]
    added_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a pass over some of the parameters has found.

    Args:
        tensors: by canonical name.
        base: name -> what the base's fingerprint is made of.
    """

    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)


def measure(
    difference: Difference,
    *,
    order: Sequence[str] | None = None,
    take: Callable[[str, Tensor], None] | None = None,
    progress: Progress | None = None,
) -> DeltaRecord:
    """Read both models once, and keep what there is to know.

    Args:
        difference: the two models.
        order: names in the order to go through them; default as they come.
        take: called with each name and its τ, so that writing needs no second pass.
        progress: called after each parameter.

    Raises:
        UserError: a value is NaN or infinite.
    """
    names = order or difference.names()
    return record_of(difference, [measure_some(difference, names, take=take, progress=progress)])


def measure_some(
    difference: Difference,
    names: Sequence[str],
    *,
    take: Callable[[str, Tensor], None] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Read some of the parameters of both models; arguments as for :func:`measure`."""
    total = sum(math.prod(difference.shape(name)) for name in names)
    found, done = Measured(), 0
    for name in names:
        terms = difference.terms(name)
        found.tensors[name] = _record(terms.delta, terms.reference)
        found.base[name] = _line(name, terms.base, content_hash(terms.base))
        if take is not None:
            take(name, terms.delta)
        done += terms.delta.numel()
        del terms  # or it would live on while the next parameter is read
        if progress is not None:
            progress(name, done, total)
    return found


def record_of(difference: Difference, parts: Iterable[Measured]) -> DeltaRecord:
    """The record that parts, which together hold every parameter once, make up."""
    tensors: dict[str, TensorRecord] = {}
    base: dict[str, str] = {}
    for part in parts:
        tensors |= part.tensors
        base |= part.base
    reference = {name: _reference_line(name, record) for name, record in tensors.items()}
    return DeltaRecord(
        fingerprint=delta_fingerprint(tensors),
        reference=ModelIdentity(difference.reference.label, _digest(reference)),
        base=ModelIdentity(difference.base.label, _digest(base)),
        tensors={name: tensors[name] for name in difference.names()},
        added_rows=dict(difference.added_rows),
    )


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Names dealt out in ``count`` shares of about equal size: the next largest to the smallest share so far.

    Examples:
        >>> shares({"a": 5, "b": 4, "c": 3, "d": 2}, 2)
        [['a', 'd'], ['b', 'c']]
    """
    dealt: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        dealt[least].append(name)
        filled[least] += sizes[name]
    return dealt


def delta_fingerprint(tensors: Mapping[str, TensorRecord]) -> str:
    """Fingerprint of τ as stored: 32 hex digits over names, shapes, dtypes and contents, order apart."""
    lines = {}
    for name, record in tensors.items():
        statistics = record.statistics
        lines[name] = f"{name} {statistics.dtype} {list(statistics.shape)} {record.content:016x}"
    return _digest(lines)


def reference_hash(record: TensorRecord, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The dtype to compare a policy's parameter in, and the hash it must have there.

    Args:
        record: of the parameter.
        dtype: the policy's dtype. One narrower than the reference's is compared as it is, with the reference
            cast to it; a wider one is cast to the reference's.
    """
    name = dtype_name(dtype)
    if name not in record.reference_hashes:
        name = record.reference_dtype
    return getattr(torch, name), record.reference_hashes[name]


def totals(statistics: Iterable[TensorStatistics]) -> TensorStatistics:
    """Statistics over all parameters, as if they were one vector.

    Examples:
        >>> one = TensorStatistics(3.0, 1.5, 0.5, 2, "float32", (2,), 6.0)
        >>> two = TensorStatistics(4.0, 4.0, 0.0, 1, "float32", (1,), 8.0)
        >>> total = totals([one, two])
        >>> total.norm, round(total.mean_abs, 3), round(total.zeros, 3), total.reference_norm
        (5.0, 2.333, 0.333, 10.0)
    """
    parts = list(statistics)
    count = sum(part.numel for part in parts)
    return TensorStatistics(
        norm=math.hypot(*(part.norm for part in parts)),
        mean_abs=math.fsum(part.mean_abs * part.numel for part in parts) / max(count, 1),
        zeros=math.fsum(part.zeros * part.numel for part in parts) / max(count, 1),
        numel=count,
        dtype="/".join(sorted({part.dtype for part in parts})),
        shape=(count,),
        reference_norm=math.hypot(*(part.reference_norm for part in parts)),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without ``torch.``.

    Examples:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def to_json(record: DeltaRecord) -> dict[str, Any]:
    """A record as JSON values; hashes as hex."""
    tensors = {}
    for name, tensor in record.tensors.items():
        statistics = asdict(tensor.statistics)
        hashes = {dtype: f"{value:016x}" for dtype, value in tensor.reference_hashes.items()}
        tensors[name] = {
            **statistics,
            "shape": list(tensor.statistics.shape),
            "content": f"{tensor.content:016x}",
            "reference_dtype": tensor.reference_dtype,
            "reference_hashes": hashes,
        }
    return {
        "fingerprint": record.fingerprint,
        "reference": asdict(record.reference),
        "base": asdict(record.base),
        "added_rows": dict(record.added_rows),
        "tensors": tensors,
    }


def from_json(value: Mapping[str, Any]) -> DeltaRecord:
    """A record from what :func:`to_json` made.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    tensors = {}
    for name, entry in value["tensors"].items():
        tensors[str(name)] = TensorRecord(
            statistics=TensorStatistics(
                norm=float(entry["norm"]),
                mean_abs=float(entry["mean_abs"]),
                zeros=float(entry["zeros"]),
                numel=int(entry["numel"]),
                dtype=str(entry["dtype"]),
                shape=tuple(int(size) for size in entry["shape"]),
                reference_norm=float(entry["reference_norm"]),
            ),
            content=int(entry["content"], 16),
            reference_dtype=str(entry["reference_dtype"]),
            reference_hashes={str(k): int(v, 16) for k, v in entry["reference_hashes"].items()},
        )
    return DeltaRecord(
        fingerprint=str(value["fingerprint"]),
        reference=ModelIdentity(**value["reference"]),
        base=ModelIdentity(**value["base"]),
        tensors=tensors,
        added_rows={str(name): int(rows) for name, rows in value["added_rows"].items()},
    )


def check_moved(record: DeltaRecord) -> None:
    """Refuse a delta that is zero everywhere.

    Raises:
        UserError: it is.
    """
    if all(tensor.statistics.norm == 0 for tensor in record.tensors.values()):
        raise UserError(
            f"the reference {record.reference.source!r} and the base {record.base.source!r} have the same "
            f"parameters, so τ is zero everywhere and merging it would do nothing; give the model from "
            f"before fine-tuning as base (allow_zero=True if this is meant)"
        )


def _record(delta: Tensor, reference: Tensor) -> TensorRecord:
    squares, magnitudes, nonzero = _sums(delta)
    count = max(delta.numel(), 1)
    statistics = TensorStatistics(
        norm=math.sqrt(squares),
        mean_abs=magnitudes / count,
        zeros=(delta.numel() - nonzero) / count,
        numel=delta.numel(),
        dtype=dtype_name(delta.dtype),
        shape=tuple(delta.shape),
        reference_norm=math.sqrt(_sums(reference)[0]),
    )
    dtypes = (reference.dtype, *_NARROWER[reference.dtype])
    hashes = {dtype_name(dtype): content_hash(reference.to(dtype)) for dtype in dtypes}
    return TensorRecord(statistics, content_hash(delta), dtype_name(reference.dtype), hashes)


def _sums(values: Tensor) -> tuple[float, float, int]:
    """Σ x², Σ |x| in float64, and how many are not 0; chunk by chunk."""
    squares, magnitudes, nonzero = [], [], 0
    for part in chunks(values):
        magnitude = part.to(torch.float64, copy=True).abs_()
        nonzero += int(magnitude.count_nonzero())
        magnitudes.append(float(magnitude.sum()))
        squares.append(float(magnitude.square_().sum()))
    return math.fsum(squares), math.fsum(magnitudes), nonzero


def _reference_line(name: str, record: TensorRecord) -> str:
    own = record.reference_dtype
    return f"{name} {own} {list(record.statistics.shape)} {record.reference_hashes[own]:016x}"


def _line(name: str, values: Tensor, content: int) -> str:
    return f"{name} {dtype_name(values.dtype)} {list(values.shape)} {content:016x}"


def _digest(lines: Mapping[str, str]) -> str:
    return combined_digest(lines[name] for name in sorted(lines))
