"""The reference delta τ = θ_r − θ_b: what supervised fine-tuning did to each parameter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.delta import vocabulary
from trimtab.delta.adapters import AdapterFolder, AssumedStart, start_of
from trimtab.delta.difference import DeltaTensors, Difference, Snapshot
from trimtab.delta.locate import Located, locate
from trimtab.delta.models import FolderModel, LiveModel, Model
from trimtab.delta.names import canonical_name
from trimtab.delta.problems import first_few
from trimtab.delta.progress import progress_bar
from trimtab.delta.record import (
    DeltaRecord,
    Measured,
    ModelIdentity,
    Progress,
    TensorStatistics,
    check_moved,
    measure,
    measure_some,
    record_of,
    reference_hash,
    shares,
)
from trimtab.delta.storage import (
    RECORD,
    TENSORS,
    SafetensorsWriter,
    StoredDelta,
    TensorSpec,
    check_target,
    read_record,
    record_json,
)
from trimtab.errors import UserError, nearest
from trimtab.files import replacing_folder, write_json
from trimtab.ops import content_hash

Source = str | Path | nn.Module
"""A model folder, a hub id, or a loaded model."""


class ReferenceDelta:
    """τ = θ_r − θ_b per parameter, under the names the trained model's ``named_parameters()`` gives.

    Made by :meth:`between` or :meth:`load`. Values are read one parameter at a time when they are asked for;
    fingerprints, hashes and statistics take one pass over both models, made on first use and remembered.
    It does not change, so copies of it are itself.

    Examples:
        >>> base, reference = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> _ = base.weight.data.fill_(1.0), reference.weight.data.fill_(1.5)
        >>> delta = ReferenceDelta.between(reference=reference, base=base)
        >>> delta.names(), delta.tensor("weight").tolist()
        (('weight', 'bias'), [[0.5, 0.5]])
    """

    def __init__(
        self,
        tensors: DeltaTensors,
        record: DeltaRecord | None = None,
        *,
        labels: tuple[str, str],
        allow_zero: bool = False,
        progress: bool | Progress = False,
    ) -> None:
        self._tensors = tensors
        self._record = record
        self._labels = labels
        self._allow_zero = allow_zero
        self._progress = progress
        self._known = frozenset(tensors.names())

    @classmethod
    def between(
        cls,
        *,
        reference: Source,
        base: Source | None = None,
        reference_revision: str | None = None,
        base_revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        check_tokenizers: bool = True,
        allow_zero: bool = False,
        progress: bool | Progress = False,
    ) -> ReferenceDelta:
        """Take the delta between a model and what it was fine-tuned from.

        Folders and hub ids are streamed: only headers are read here. Of loaded modules τ is computed and
        copied at once, since they may be trained afterwards. Two PEFT models, or two adapter folders, give
        the delta of their adapters. One adapter folder alone gives what its training did: the adapter minus
        what it was before, which ``trimtab train`` keeps as ``initial_adapter.safetensors``; see
        :attr:`assumption` for one without it.

        Rows that the reference's vocabulary has more than the base's get τ = 0, see :attr:`added_rows`.

        Args:
            reference: θ_r, the fine-tuned model: folder, hub id or module.
            base: θ_b, what it was fine-tuned from; None for an adapter's own start.
            reference_revision: branch, tag or commit of the reference, for hub ids.
            base_revision: the same for the base.
            cache_dir: the hub cache.
            local_files_only: use what the hub's cache has and ask nothing.
            check_tokenizers: compare the token ids of two folders, where both have a tokenizer.
            allow_zero: do not refuse a τ that is zero everywhere.
            progress: True for a bar during the long pass, or a function (name, entries done, entries in all).

        Raises:
            UserError: a model cannot be read, or the two do not have the same parameters.
        """

        def find(source: Source, revision: str | None) -> Located | nn.Module:
            if isinstance(source, nn.Module):
                return source
            return locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)

        places = [find(reference, reference_revision)]
        ours = _open(places[0])
        if base is None:
            theirs: Model = _start(ours)
        else:
            places.append(find(base, base_revision))
            if not allow_zero:
                _check_distinct(*places)
            theirs = _open(places[1], like=ours)
        difference = Difference(ours, theirs)
        folders = [place.folder for place in places if isinstance(place, Located)]
        if check_tokenizers and len(folders) == 2:
            vocabulary.check_tokenizers(*folders)
        labels = (difference.reference.label, difference.base.label)
        delta = cls(difference, labels=labels, allow_zero=allow_zero, progress=progress)
        if any(isinstance(place, nn.Module) for place in places):
            delta._keep_values(difference)
        return delta

    @classmethod
    def load(cls, path: str | Path) -> ReferenceDelta:
        """Open a delta that :meth:`save` wrote. Headers are checked; values are read when asked for.

        Args:
            path: the folder.

        Raises:
            UserError: it is no delta, of another version, or its files are damaged or do not belong together.
        """
        folder = Path(path)
        record = read_record(folder)
        labels = (record.reference.source, record.base.source)
        return cls(StoredDelta(folder, record), record, labels=labels, allow_zero=True)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the delta to a folder: ``delta.safetensors`` and ``delta.json``; all of it or nothing.

        One pass measures and writes, one parameter at a time.

        Args:
            path: the folder; its parents are made.
            overwrite: replace a delta that lies there. Folders with anything else in them are never replaced.

        Returns:
            The path.

        Raises:
            UserError: there is something already, or not enough room.
        """
        path = Path(path)
        check_target(path, overwrite=overwrite)
        specs = [TensorSpec(name, self._tensors.dtype(name), self.shape(name)) for name in self.names()]
        size = sum(spec.nbytes for spec in specs)
        try:
            with replacing_folder(path) as temporary, SafetensorsWriter(temporary / TENSORS, specs) as writer:
                _check_room(temporary, path, size)
                record = self._write_tensors(writer)
                writer.seal(record.fingerprint)
                write_json(temporary / RECORD, record_json(record))
        except OSError as error:
            raise UserError(
                f"cannot write the delta to {path} ({size / 1e6:,.0f} MB): {error.strerror or error}"
            ) from error
        return path

    def names(self) -> tuple[str, ...]:
        """Canonical parameter names, in the model's order; tied parameters once."""
        return self._tensors.names()

    def __contains__(self, name: str) -> bool:
        return canonical_name(name) in self._known

    def __len__(self) -> int:
        return len(self._known)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of τ of one parameter.

        Args:
            name: as ``named_parameters()`` gives it; wrappers' prefixes are stripped.

        Raises:
            UserError: the delta has no such parameter.
        """
        return self._tensors.shape(self._canonical(name))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """τ of one parameter, on the CPU.

        Args:
            name: as ``named_parameters()`` gives it; wrappers' prefixes are stripped.
            dtype: default as stored: fp32, or fp64 where a source is fp64.

        Returns:
            A tensor of the parameter's shape; it may be the delta's own, so copy it before writing to it.

        Raises:
            UserError: the delta has no such parameter, or a source holds NaN or infinity.
        """
        values = self._tensors.tensor(self._canonical(name))
        return values if dtype is None else values.to(dtype)

    def slice(self, name: str, slices: tuple[slice, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A rectangular part of τ of one parameter, for shards: only that part is read where files allow it.

        Args:
            name: as ``named_parameters()`` gives it.
            slices: one slice of step 1 per leading dimension.
            dtype: default as stored.

        Raises:
            UserError: the delta has no such parameter, or a source holds NaN or infinity there.
            ValueError: a slice has a step, or there are more slices than dimensions.
        """
        name = self._canonical(name)
        if len(slices) > len(self.shape(name)) or any(part.step not in (None, 1) for part in slices):
            raise ValueError(
                f"{slices} cannot be read from shape {self.shape(name)}: slices of step 1, one a dimension"
            )
        values = self._tensors.slice(name, tuple(slices))
        return values if dtype is None else values.to(dtype)

    def measure(self) -> DeltaRecord:
        """Go through both models once, for fingerprints, hashes and statistics; afterwards they are known.

        Raises:
            UserError: a value is NaN or infinite, or τ is zero everywhere.
        """
        if self._record is None:
            assert isinstance(self._tensors, Difference)
            with self._bar("measuring the delta") as progress:
                self._remember(measure(self._tensors, progress=progress))
        assert self._record is not None
        return self._record

    def measure_together(self, rank: int, gather: Callable[[Any], list[Any]]) -> DeltaRecord:
        """As :meth:`measure`, each of several processes going through its share of the parameters.

        Args:
            rank: this process's place among them, from 0.
            gather: gives every process what each of them has called it with, in the order of their places.

        Raises:
            UserError: as :meth:`measure`, in all of them.
        """
        known = gather(self._record)
        if self._record is None:
            self._record = next((record for record in known if record is not None), None)
        if all(record is None for record in known):
            assert isinstance(self._tensors, Difference)
            sizes = {name: math.prod(self.shape(name)) for name in self.names()}
            own = shares(sizes, len(known))[rank]
            found: Measured | str
            try:
                with self._bar("measuring the delta") if rank == 0 else nullcontext() as progress:
                    found = measure_some(self._tensors, own, progress=progress)
            except UserError as error:
                found = str(error)
            parts = gather(found)
            for part in parts:
                if isinstance(part, str):
                    raise UserError(part)
            self._remember(record_of(self._tensors, parts))
        return self.measure()

    @property
    def fingerprint(self) -> str:
        """32 hex digits over names, shapes, dtypes and contents of τ as stored."""
        return self.measure().fingerprint

    @property
    def reference(self) -> ModelIdentity:
        """The reference's source and fingerprint."""
        return self.measure().reference

    @property
    def base(self) -> ModelIdentity:
        """The base's source and fingerprint."""
        return self.measure().base

    @property
    def statistics(self) -> dict[str, TensorStatistics]:
        """Norm, mean |τ| and share of zeros (and more) of each parameter."""
        return {name: record.statistics for name, record in self.measure().tensors.items()}

    @property
    def added_rows(self) -> dict[str, int]:
        """Parameter -> rows that the reference's vocabulary has more than the base's; τ is 0 there."""
        if self._record is None and isinstance(self._tensors, Difference):
            return dict(self._tensors.added_rows)
        return dict(self.measure().added_rows)

    @property
    def assumption(self) -> str | None:
        """What had to be assumed of an adapter's start, in a sentence; None where nothing was."""
        base = self._tensors.base if isinstance(self._tensors, Difference) else None
        return base.assumption if isinstance(base, AssumedStart) else None

    def reference_hash(self, name: str, dtype: torch.dtype) -> tuple[torch.dtype, int]:
        """What a policy's parameter must hash to if it equals the reference.

        For shards: cast the shard to the dtype returned, hash it with its offset, sum over shards mod 2⁶⁴.

        Args:
            name: as ``named_parameters()`` gives it.
            dtype: the policy's dtype.

        Returns:
            The narrower of the two dtypes, and the content hash of the reference's values in it.
        """
        return reference_hash(self.measure().tensors[self._canonical(name)], dtype)

    def reference_matches(
        self, name: str, tensor: Tensor, hash_of: Callable[[Tensor], int] = content_hash
    ) -> bool:
        """Whether a policy's parameter equals the reference's, compared in the narrower of the two dtypes.

        Args:
            name: as ``named_parameters()`` gives it.
            tensor: the policy's values, on any device.
            hash_of: content hash of the whole parameter, given the tensor cast; for shards, one that sums.

        Raises:
            UserError: the delta has no such parameter.
        """
        if tuple(tensor.shape) != self.shape(name):
            return False
        dtype, expected = self.reference_hash(name, tensor.dtype)
        return hash_of(tensor.detach().to(dtype)) == expected

    def check_policy(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        hash_of: Callable[[Tensor], int] = content_hash,
    ) -> None:
        """Refuse a policy that does not start from the reference.

        Args:
            named_tensors: the policy's ``named_parameters()``; those the delta does not have are passed over.
            hash_of: as in :meth:`reference_matches`.

        Raises:
            UserError: with all differing parameters counted and the first few named.
        """
        checked = [(name, tensor) for name, tensor in named_tensors if name in self]
        different = [name for name, tensor in checked if not self.reference_matches(name, tensor, hash_of)]
        if different:
            raise UserError(
                f"the policy differs from the delta's reference {self._labels[0]!r} in {len(different)} of "
                f"{len(checked)} parameters ({first_few(different)}); start from the reference, or say that "
                f"the policy differs on purpose (policy_differs=True)"
            )

    def __repr__(self) -> str:
        return (
            f"ReferenceDelta(reference={self._labels[0]!r}, base={self._labels[1]!r}, parameters={len(self)})"
        )

    def __copy__(self) -> ReferenceDelta:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ReferenceDelta:
        return self

    def _canonical(self, name: str) -> str:
        canonical = canonical_name(name)
        if canonical not in self._known:
            raise _unknown(name, canonical, self.names())
        return canonical

    def _keep_values(self, difference: Difference) -> None:
        """Compute τ and all that is known of it now: the models may change."""
        values: dict[str, Tensor] = {}
        with self._bar("taking the delta") as progress:
            self._remember(measure(difference, take=values.__setitem__, progress=progress))
        self._tensors = Snapshot(values)

    def _write_tensors(self, writer: SafetensorsWriter) -> DeltaRecord:
        with self._bar("writing the delta") as progress:
            if self._record is None:
                assert isinstance(self._tensors, Difference)
                self._remember(
                    measure(self._tensors, order=writer.order, take=writer.write, progress=progress)
                )
                assert self._record is not None
                return self._record
            total = sum(tensor.statistics.numel for tensor in self._record.tensors.values())
            done = 0
            for name in writer.order:
                writer.write(name, self._tensors.tensor(name))
                done += self._record.tensors[name].statistics.numel
                if progress is not None:
                    progress(name, done, total)
            return self._record

    def _remember(self, record: DeltaRecord) -> None:
        if not self._allow_zero:
            check_moved(record)
        self._record = record

    def _bar(self, description: str) -> AbstractContextManager[Progress | None]:
        if callable(self._progress):
            return nullcontext(self._progress)
        return progress_bar(description) if self._progress else nullcontext()


def _open(place: Located | nn.Module, like: Model | None = None) -> Model:
    """Open a model; a base folder is read as the class its reference is trained as."""
    if isinstance(place, nn.Module):
        return LiveModel(place)
    if (place.folder / "adapter_config.json").is_file():
        return AdapterFolder(place)
    return FolderModel(place, like)


def _start(reference: Model) -> Model:
    """What a reference started from where no base is given: for an adapter that is known."""
    if isinstance(reference, AdapterFolder):
        return start_of(reference)
    raise UserError(
        f"base is missing: the reference {reference.label!r} is no adapter folder, so give the model it was "
        "fine-tuned from (--base)"
    )


def _check_distinct(reference: Located | nn.Module, base: Located | nn.Module) -> None:
    same = reference is base
    if isinstance(reference, Located) and isinstance(base, Located):
        same = reference.folder.resolve() == base.folder.resolve()
    if same:
        name = reference.label if isinstance(reference, Located) else type(reference).__name__
        raise UserError(
            f"reference and base are both {name!r}, so τ would be zero everywhere; give the model from "
            f"before fine-tuning as base"
        )


def _check_room(folder: Path, path: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"the delta takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free where {path} would lie; "
            f"make room or give another folder"
        )


def _unknown(name: str, canonical: str, names: tuple[str, ...]) -> UserError:
    close = nearest(canonical, names)
    hint = f"; did you mean {close!r}?" if close else f"; it has {first_few(list(names))}"
    return UserError(f"the delta has no parameter {name!r}{hint}")
