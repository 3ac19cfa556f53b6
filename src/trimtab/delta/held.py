"""τ as an optimizer holds it: this process's part of each parameter's, in memory, in the format asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trimtab.errors import UserError, unknown
from trimtab.ops.formats import (
    INT8_BLOCK,
    DenseTau,
    Int8Tau,
    SparseTau,
    block_cover,
    hold_dense,
    hold_int8,
    hold_sparse,
)
from trimtab.ops.layout import Layout

Storage = Literal["auto", "float32", "bfloat16", "int8", "sparse"]
Where = Literal["parameter", "host"]
Tau = DenseTau | Int8Tau | SparseTau
Mask = Callable[[Tensor], Tensor]
"""F, of the local part: flat values in, flat values of the same dtype out."""

STORAGES: tuple[Storage, ...] = ("auto", "float32", "bfloat16", "int8", "sparse")
PLACES: tuple[Where, ...] = ("parameter", "host")

SPARSE_SHARE = 0.25
"""``auto`` holds F(τ) sparse up to this share of kept entries (1.5 bytes an entry; dense takes 4)."""

_ALIGNMENT = 256


class DeltaLike(Protocol):
    """What is needed of a :class:`~trimtab.delta.ReferenceDelta`."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """τ of one parameter, on the CPU."""

    def slice(self, name: str, slices: tuple[slice, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A rectangular part of it; only that part is read."""


@dataclass(frozen=True)
class _Request:
    """What a held τ depends on: where any of it changes, τ is read again."""

    layout: Layout
    device: torch.device
    dtype: torch.dtype
    key: Hashable


@dataclass
class _Entry:
    request: _Request
    tau: Tau
    on_host: bool = False
    source: Tensor | None = None  # τ before F, kept once F has changed: it may change at every step

    def serves(self, layout: Layout, device: torch.device, dtype: torch.dtype, key: Hashable) -> bool:
        """Whether this is what is asked for. Asked for each parameter in each step: without detours."""
        was = self.request
        same_place = was.layout is layout or was.layout == layout
        return same_place and was.device == device and was.dtype == dtype and was.key == key


@dataclass
class HeldDelta:
    """Holds τ by parameter name: made when first asked for, one tensor at a time, and kept.

    Only this process's part is read from the delta (a few entries more for ``int8``, whose blocks a shard may
    cut: :func:`~trimtab.ops.formats.block_cover`), and what is read is freed as soon as it is held. On one
    process or many the values are the same.

    Args:
        delta: where τ is read.
        storage: ``float32`` dense and exact (fp64 for fp64 parameters); ``bfloat16`` dense, rounded; ``int8``
            with a scale per 128 entries; ``sparse`` indices and values, exact, where F(τ) is fixed; ``auto``
            exact: sparse where F(τ) is fixed and keeps at most a quarter, else dense.
        device: ``parameter`` holds it beside the parameter, ``host`` in pinned memory of the CPU, from where
            it is copied (one tensor ahead: see :meth:`prefetch`). The same for parameters on the CPU.

    Raises:
        UserError: an unknown storage or device.

    Examples:
        >>> import torch
        >>> from trimtab import ReferenceDelta
        >>> base, reference = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> delta = ReferenceDelta.between(reference=reference, base=base)
        >>> held = HeldDelta(delta, storage="bfloat16")
        >>> tau = held.get("weight", Layout.whole((2, 4)), device="cpu", dtype=torch.float32)
        >>> held.nbytes(), tau.dense(0, 8).dtype, held.describe()
        (16, torch.float32, 'bfloat16')
    """

    delta: DeltaLike
    storage: Storage = "auto"
    device: Where = "parameter"
    _entries: dict[str, _Entry] = field(default_factory=dict, init=False, repr=False)
    _copies: dict[torch.device, DoubleBuffer] = field(default_factory=dict, init=False, repr=False)
    _next: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise unknown("delta_storage", self.storage, STORAGES)
        if self.device not in PLACES:
            raise unknown("delta_device", self.device, PLACES)

    def __getstate__(self) -> dict[str, Any]:
        return {"delta": self.delta, "storage": self.storage, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _entries={}, _copies={}, _next={})

    def get(
        self,
        name: str,
        layout: Layout,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        mask: Mask | None = None,
        key: Hashable = None,
        mask_at: Callable[[Tensor, Layout], Tensor] | None = None,
    ) -> Tau:
        """τ of one parameter's local part, as it is held; F(τ) where a mask is given.

        Args:
            name: canonical parameter name.
            layout: where the local part lies in the unsharded tensor.
            device: the parameter's device.
            dtype: the dtype of its arithmetic, fp32 or fp64; what ``auto``, ``float32`` and ``sparse`` hold.
            mask: F of the local part, where F(τ) does not change from merge to merge. It gets flat values on
                ``device`` and is called once, on every process (also for a part without entries), so that it
                may communicate.
            key: what the mask depends on; where it changes, F(τ) is made anew, and from then on τ is kept
                too.
            mask_at: F of another rectangle than the local part, after ``mask`` was called; needed for
                ``int8`` where a shard cuts blocks.

        Returns:
            The format. From the host it is a copy on ``device``; after :meth:`prefetch` it is good for the
            work that is queued before the next one is asked for.

        Raises:
            UserError: ``sparse`` without a mask; ``int8`` that would need ``mask_at``.
        """
        device = torch.device(device) if isinstance(device, str) else device
        entry = self._entries.get(name)
        if entry is None or not entry.serves(layout, device, dtype, key):
            request = _Request(layout, device, dtype, key)
            entry = self._entries[name] = self._made(name, request, mask, mask_at, entry)
        return self._from_host(name, entry, device) if entry.on_host else entry.tau

    def prefetch(self, names: Sequence[str]) -> None:
        """Promise to take the coming step parameter by parameter in this order, and send the first τ off.

        While a parameter is stepped, the τ of the one after it is copied: two are on the device, no more.
        Without the promise every τ that comes from the host is a copy of its own. Does nothing where τ lies
        beside its parameter.

        Args:
            names: canonical names of the parameters of the coming step, in order; none takes the promise
                back.
        """
        if self.device == "parameter":
            return
        self._next = dict(pairwise([*names, ""]))
        first = self._entries.get(names[0]) if names else None
        if first is not None and first.on_host:
            self._buffer(first.request.device).start(first.tau)

    @property
    def streams(self) -> bool:
        """Whether any τ comes from the host: then :meth:`prefetch`, and step one by one, in order."""
        return any(entry.on_host for entry in self._entries.values())

    def describe(self) -> str:
        """What the trajectory depends on: ``exact`` for all exact storages, else the storage."""
        return {"bfloat16": "bfloat16", "int8": f"int8/{INT8_BLOCK}"}.get(self.storage, "exact")

    def nbytes(self) -> int:
        """Bytes of all that is held, copies on their way included."""
        copies = sum(buffer.nbytes for buffer in self._copies.values())
        return copies + sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, copies on their way excepted."""
        held = [t for entry in self._entries.values() for t in entry.tau.tensors()]
        return held + [e.source for e in self._entries.values() if e.source is not None]

    def clear(self) -> None:
        """Free everything; it is read again when asked for."""
        self._entries, self._copies, self._next = {}, {}, {}

    def refuse_unmasked(self) -> None:
        """Refuse ``sparse`` for a τ that is not masked once.

        Raises:
            UserError: in one sentence.
        """
        if self.storage == "sparse":
            raise UserError(
                "delta_storage 'sparse' holds what F keeps of τ, and here F keeps all of it or draws anew at "
                "every merge; use 'auto', 'bfloat16' or 'int8', or fix the mask (redraw=False, or OnTIES)"
            )

    # -- making it

    def _made(
        self,
        name: str,
        request: _Request,
        mask: Mask | None,
        mask_at: Callable[[Tensor, Layout], Tensor] | None,
        before: _Entry | None,
    ) -> _Entry:
        if mask is None:
            self.refuse_unmasked()
        source = self._kept_source(name, request, before)
        tau: Tau
        if self.storage == "int8":
            tau = self._int8(name, request, source, mask, mask_at)
        else:
            values = self._read(name, request.layout, request) if source is None else source
            tau = self._exact_or_rounded(values if mask is None else mask(values), request, mask is not None)
        if not self._belongs_on_host(request.device):
            return _Entry(request, tau, source=source)
        source = None if source is None else source.to("cpu")
        return _Entry(request, tau.to("cpu").pin_memory(), on_host=True, source=source)

    def _exact_or_rounded(self, values: Tensor, request: _Request, masked: bool) -> Tau:
        few = masked and int(values.count_nonzero()) <= SPARSE_SHARE * values.numel()
        if self.storage == "sparse" or (self.storage == "auto" and few):
            return hold_sparse(values)
        dtype = torch.bfloat16 if self.storage == "bfloat16" else request.dtype
        return hold_dense(values, dtype, masked=masked)

    def _int8(
        self,
        name: str,
        request: _Request,
        source: Tensor | None,
        mask: Mask | None,
        mask_at: Callable[[Tensor, Layout], Tensor] | None,
    ) -> Int8Tau:
        layout, cover = request.layout, block_cover(request.layout)
        if source is not None and cover == layout:
            values = source
        else:
            values = self._read(name, cover, request)
        if mask is not None and cover == layout:
            values = mask(values)
        elif mask is not None:
            if mask_at is None:
                raise UserError(
                    f"delta_storage 'int8' cannot hold a masked τ for this shard of {name}, which cuts its "
                    f"blocks of {INT8_BLOCK} entries; use 'bfloat16', 'sparse' or 'auto'"
                )
            mask(self._read(name, layout, request) if source is None else source)
            values = mask_at(values, cover)
        return hold_int8(values, layout, cover=cover, masked=mask is not None)

    def _kept_source(self, name: str, request: _Request, before: _Entry | None) -> Tensor | None:
        """τ before F, where F has changed before: its files are not read at every step that moves p."""
        if before is None or (before.request.layout, before.request.dtype) != (request.layout, request.dtype):
            return None
        if before.request.key == request.key:
            return None
        source = before.source if before.source is not None else self._read(name, request.layout, request)
        return source.to(request.device)

    def _read(self, name: str, layout: Layout, request: _Request) -> Tensor:
        """τ of a rectangle, flat, on the parameter's device."""
        if layout.is_whole:
            values = self.delta.tensor(name, dtype=request.dtype)
        elif layout.numel == 0:
            values = torch.empty(0, dtype=request.dtype)
        else:
            values = self.delta.slice(name, layout.slices(), dtype=request.dtype)
        return values.detach().reshape(-1).to(request.device)

    def _from_host(self, name: str, entry: _Entry, device: torch.device) -> Tau:
        if name not in self._next:
            return entry.tau.map(lambda t: t.to(device, non_blocking=True, copy=True))
        following = self._entries.get(self._next[name])
        return self._buffer(device).take(entry.tau, following.tau if following else None)

    def _belongs_on_host(self, device: torch.device) -> bool:
        return self.device == "host" and device.type == "cuda"

    def _buffer(self, device: torch.device) -> DoubleBuffer:
        return self._copies.setdefault(device, DoubleBuffer(device))


class DoubleBuffer:
    """Two places on a device into which formats are copied from the host in turn, on a stream of their own.

    While the device works with one, the next is copied into the other; a copy waits for the work that was
    queued before it, since that may still read what it overwrites. On the CPU everything is done at once.

    Args:
        device: where the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        stream: Any = torch.cuda.Stream
        self._stream = stream(device) if device.type == "cuda" else None
        self._memory = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self._holds: list[tuple[Tau, Tau, Any] | None] = [None, None]  # (original, copy, event)
        self._in_use = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both places."""
        return sum(memory.nbytes for memory in self._memory)

    def take(self, tau: Tau, following: Tau | None = None) -> Tau:
        """The copy of ``tau`` for the current stream's work; begins to copy ``following``.

        It is good for work that is queued before the next call.
        """
        place = self._place_of(tau)
        if place is None:
            place = self.start(tau)
        self._in_use = place
        held = self._holds[place]
        assert held is not None
        _, copy, event = held
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        if following is not None and self._place_of(following) is None:
            self.start(following)
        return copy

    def start(self, tau: Tau) -> int:
        """Begin to copy ``tau`` into the place that is not in use; returns which it is."""
        present = self._place_of(tau)
        if present is not None:
            return present
        place = 1 - self._in_use
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_stream():
            copy = self._copied(tau, place)
        event = None if self._stream is None else self._stream.record_event()
        self._holds[place] = (tau, copy, event)
        return place

    def _place_of(self, tau: Tau) -> int | None:
        return next((i for i, held in enumerate(self._holds) if held is not None and held[0] is tau), None)

    def _copied(self, tau: Tau, place: int) -> Tau:
        needed = sum(_padded(t.nbytes) for t in tau.tensors())
        if self._memory[place].numel() < needed:
            self._memory[place] = torch.empty(needed, dtype=torch.uint8, device=self.device)
        used = 0

        def carve(t: Tensor) -> Tensor:
            nonlocal used
            room = self._memory[place][used : used + t.nbytes].view(t.dtype)
            used += _padded(t.nbytes)
            return room.copy_(t, non_blocking=True)

        return tau.map(carve)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
