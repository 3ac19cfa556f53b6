"""θ_r − θ_b, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimtab.delta.models import Model, check_model
from trimtab.delta.problems import Problems, shape_text
from trimtab.errors import UserError

_CHUNK = 1 << 20


def chunks(values: Tensor) -> Iterator[Tensor]:
    """Go through a tensor's entries in pieces, so that temporaries stay small beside it."""
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK]


class DeltaTensors(Protocol):
    """Where a delta's values come from: computed, stored, or held in memory."""

    def names(self) -> tuple[str, ...]:
        """Canonical names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of τ of one parameter."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which τ is stored: fp32, or fp64 where a source is fp64."""

    def tensor(self, name: str) -> Tensor:
        """τ of one parameter, on the CPU; not to be written to."""

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of τ of one parameter, on the CPU; not to be written to."""


@dataclass(frozen=True)
class Terms:
    """One parameter of both models, and their difference.

    Args:
        reference: θ_r in its own dtype.
        base: θ_b in its own dtype; it may have fewer rows.
        delta: θ_r − θ_b in fp32 (fp64 where a source is), of the reference's shape.
    """

    reference: Tensor
    base: Tensor
    delta: Tensor


class Difference:
    """The parameters of a reference minus those of its base, computed when they are asked for.

    Args:
        reference: θ_r.
        base: θ_b.

    Attributes:
        added_rows: parameter -> rows that the reference's vocabulary has more. τ is 0 there: the base has
            nothing to compare with.

    Raises:
        UserError: the two do not have the same parameters; all differences are counted.
    """

    def __init__(self, reference: Model, base: Model) -> None:
        check_model(reference, "reference")
        check_model(base, "base")
        _check_comparable(reference, base)
        self.reference = reference
        self.base = base
        self.added_rows = _match(reference, base)

    def names(self) -> tuple[str, ...]:
        """Canonical names, in the reference's order."""
        return self.reference.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the parameter in the reference."""
        return self.reference.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """fp64 if either source is, else fp32."""
        sources = (self.reference.dtype(name), self.base.dtype(_counterpart(self.base, name)))
        return torch.float64 if torch.float64 in sources else torch.float32

    def terms(self, name: str) -> Terms:
        """Read both models' values of one parameter and subtract them.

        Raises:
            UserError: a value is NaN or infinite.
        """
        reference = self.reference.tensor(name)
        base = self.base.tensor(_counterpart(self.base, name))
        delta = _subtract(reference, base, self.dtype(name))
        self._check_finite(name, Terms(reference, base, delta))
        return Terms(reference, base, delta)

    def tensor(self, name: str) -> Tensor:
        """τ of one parameter."""
        return self.terms(name).delta

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of τ of one parameter, from the same part of the sources."""
        reference = self.reference.slice(name, slices)
        wanted = slices
        if name in self.added_rows:  # the base's rows end earlier
            rows = self.shape(name)[0] - self.added_rows[name]
            start, stop, _ = slices[0].indices(self.shape(name)[0])
            wanted = (slice(min(start, rows), min(stop, rows)), *slices[1:])
        base = self.base.slice(_counterpart(self.base, name), wanted)
        delta = _subtract(reference, base, self.dtype(name))
        self._check_finite(name, Terms(reference, base, delta))
        return delta

    def _check_finite(self, name: str, terms: Terms) -> None:
        if _is_finite(terms.delta):
            return
        for role, model, values in (
            ("reference", self.reference, terms.reference),
            ("base", self.base, terms.base),
        ):
            if not _is_finite(values):
                flat = values.reshape(-1)
                index = int((~flat.isfinite()).nonzero()[0])
                raise UserError(
                    f"parameter {name!r} of the {role} {model.label!r} holds {flat[index].item()} "
                    f"(first at index {index} of {flat.numel()}); a delta needs finite weights"
                )
        raise UserError(f"parameter {name!r} differs by more than {terms.delta.dtype} can hold")


@dataclass(frozen=True)
class Snapshot:
    """τ held in memory: what is taken from live modules, which may change afterwards.

    Args:
        tensors: τ by canonical name.
    """

    tensors: dict[str, Tensor]

    def names(self) -> tuple[str, ...]:
        """Canonical names."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of τ of one parameter."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of τ of one parameter."""
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """τ of one parameter."""
        return self.tensors[name]

    def slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of τ of one parameter."""
        return self.tensors[name][slices]


def _check_comparable(reference: Model, base: Model) -> None:
    if reference.kind != base.kind:
        hint = "give two models of one architecture"
        if "adapter" in (reference.kind, base.kind):
            hint = (
                "give two adapters, or no base for what an adapter's own training did, or merge the adapter "
                "into its model first (merge_and_unload)"
            )
        raise UserError(
            f"the reference {reference.label!r} is of kind {reference.kind!r} and the base {base.label!r} "
            f"of kind {base.kind!r}; {hint}"
        )
    for key in reference.settings.keys() & base.settings.keys():
        ours, theirs = reference.settings[key], base.settings[key]
        if ours != theirs:
            raise UserError(
                f"the adapters differ in {key} ({ours} in the reference {reference.label!r}, {theirs} in the "
                f"base {base.label!r}), so equal weights mean different things; give two of one configuration"
            )


def _counterpart(base: Model, name: str) -> str:
    """The base's own name for a parameter: tied there, it may go under another."""
    return base.aliases.get(name, name)


def _match(reference: Model, base: Model) -> dict[str, int]:
    """Compare names and shapes; return the rows added to vocabularies."""
    problems, added = Problems(), {}
    there, used = set(base.names()), set[str]()
    for name in reference.names():
        counterpart = _counterpart(base, name)
        if counterpart not in there:
            problems.missing.append(name)
            continue
        used.add(counterpart)
        ours, theirs = reference.shape(name), base.shape(counterpart)
        if ours == theirs:
            continue
        if name in reference.vocabulary and ours[1:] == theirs[1:] and ours[0] > theirs[0]:
            added[name] = ours[0] - theirs[0]
        else:
            problems.mismatched.append(_mismatch(name, theirs, ours))
    problems.extra += [name for name in base.names() if name not in used]
    problems.refuse(
        f"the base {base.label!r} does not have the parameters of the reference {reference.label!r}, "
        f"so it is not what the reference was made from"
    )
    return added


def _mismatch(name: str, base: Sequence[int], reference: Sequence[int]) -> str:
    return f"{name} ({shape_text(tuple(base))} in the base, {shape_text(tuple(reference))} in the reference)"


def _subtract(reference: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Subtract in ``dtype`` with no temporary besides the result; rows the base lacks give 0."""
    delta = reference.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if reference.shape == base.shape:
        return delta.sub_(base)
    rows = base.shape[0]
    delta[:rows].sub_(base)
    delta[rows:] = 0
    return delta


def _is_finite(values: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in chunks(values))
