"""Counter-based random masks: every bit is a pure function of (seed, stream, step, name, index).

The same training therefore draws the same masks on one process or eight, sharded or not, after a resume, on
CPU and GPU.

The generator. For each parameter and *pair* of streams, BLAKE2b of (seed, pair, index >> 32, canonical
name) gives two 64-bit lanes a and b, once. At each step, with splitmix64's finalizer f and φ =
0x9e3779b97f4a7c15, f(a + step·φ) and f(b + step·φ) give four 32-bit keys: k0 and k1 are the low and the high
half of the first, k2 and k3 of the second (so that a GPU, or a captured graph, can advance the keys from a
step that lies on the device). Entry i (row-major index in the unsharded tensor, low 32 bits) has two words,
``coarse = h(i; k0, k1)`` and ``fine = h(i; k2, k3)``, with the 32-bit integer hash

    x = i + k0;  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;
    x ^= k1;     x *= 0x846ca68b;  x ^= x >> 16        (all mod 2^32).

Even streams use the high halves of both words, odd streams the low halves: stream s has the uniform 32-bit
number ``U = half(coarse) << 16 | half(fine)``. One word thus serves the masks of the update and of the
reference delta, and ``fine`` is needed only where the coarse half falls in the boundary cell (one entry in
65,536).
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops import bits
from trimtab.ops.bits import Words
from trimtab.ops.layout import Layout
from trimtab.ops.names import canonical_name

UPDATE = 0
"""Stream of the mask on the update Δ. Stream i ≥ 1 is that of the i-th delta."""
DELTA = 1
FIRST_MOMENT = 60
SECOND_MOMENT = 61
GRADIENT = 62
ROUNDING = 63

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_STEP = 0x9E3779B97F4A7C15
_ALL, _LOW = (1 << 64) - 1, (1 << 32) - 1
_CHUNK = 1 << 18  # entries hashed at a time: the temporaries stay in cache


@dataclass(frozen=True)
class MaskKey:
    """What a mask is a function of, beside the index.

    Args:
        seed: any integer in [0, 2^64).
        stream: which use of randomness (``UPDATE``, ``DELTA``, ``GRADIENT``, ``ROUNDING``), in [0, 64).
        step: the parameter's own step count; 0 for masks that are drawn once.
        name: parameter name; it is made canonical here, so wrappers do not change masks.
    """

    seed: int
    stream: int
    step: int
    name: str
    _canonical: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if not 0 <= self.stream < 64:
            raise ValueError(f"stream must be in [0, 64), got {self.stream}")
        if not 0 <= self.step < 1 << 64:
            raise ValueError(f"step must be in [0, 2**64), got {self.step}")
        object.__setattr__(self, "_canonical", canonical_name(self.name))

    def lanes(self, high: int = 0) -> tuple[int, int]:
        """The two 64-bit lanes from which the keys of every step follow."""
        return _lanes(self.seed, self.stream // 2, high, self._canonical)

    def words(self, high: int = 0) -> tuple[int, int, int, int]:
        """The four 32-bit keys for the indices whose bits above the 32nd are ``high``."""
        return _words(self.seed, self.stream // 2, high, self._canonical, self.step)


@lru_cache(maxsize=1 << 16)
def _lanes(seed: int, pair: int, high: int, canonical: str) -> tuple[int, int]:
    message = struct.pack("<QQQ", seed, pair, high) + canonical.encode()
    digest = hashlib.blake2b(message, digest_size=16, person=b"trimtab mask").digest()
    return struct.unpack("<2Q", digest)


@lru_cache(maxsize=1 << 12)
def _words(seed: int, pair: int, high: int, canonical: str, step: int) -> tuple[int, int, int, int]:
    one, other = (_finalized(lane + step * _STEP) for lane in _lanes(seed, pair, high, canonical))
    return one & _LOW, one >> 32, other & _LOW, other >> 32


def _finalized(x: int) -> int:
    """The finalizer of splitmix64: a bijection of 64 bits, every bit of the result on every bit of x."""
    x &= _ALL
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _ALL
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _ALL
    return x ^ x >> 31


def hash32(index: Tensor, key0: int, key1: int) -> Tensor:
    """Hash 32-bit integers with two 32-bit keys (the function h of the module's docstring).

    Args:
        index: int32 tensor, read as unsigned; not changed.
        key0: first key, in [0, 2^32).
        key1: second key, in [0, 2^32).

    Returns:
        int32 tensor of the same shape: the hash's bits.
    """
    return bits.tensor(_folded(_unfolded(index, key0, key1)))


def _unfolded(index: Tensor, key0: int, key1: int) -> Words:
    """The function h up to its last line."""
    x = bits.words(index + _signed(key0))
    x ^= bits.shifted(x, 16)
    return _multiplied(x, key1)


def _multiplied(x: Words, key1: int) -> Words:
    """The lines of h between its first and its last ``x ^= x >> 16``; x is written to."""
    x *= _MULTIPLIER_1
    x ^= bits.shifted(x, 15)
    x ^= _signed(key1)
    x *= _signed(_MULTIPLIER_2)
    return x


def _folded(x: Words) -> Words:
    """The last line of h; x is written to."""
    x ^= bits.shifted(x, 16)
    return x


def _hash_of_one(index: int, key0: int, key1: int) -> int:
    """The hash of one index in Python's integers: for so few that the calls of tensors are what costs."""
    x = index + key0 & _LOW
    x = (x ^ x >> 16) * _MULTIPLIER_1 & _LOW
    x = (x ^ x >> 15 ^ key1) * _MULTIPLIER_2 & _LOW
    return x ^ x >> 16


class Place(NamedTuple):
    """A range of a local tensor: its entries ``low … low + n − 1``, laid out as ``layout`` says."""

    layout: Layout
    low: int = 0


def uniform_u32(
    shape: Sequence[int],
    key: MaskKey,
    *,
    offset: int = 0,
    place: Place | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the uniform 32-bit numbers U of ``key`` for a row-major range of indices.

    Args:
        shape: shape of the result.
        key: what the numbers are a function of.
        offset: 64-bit row-major index of the first entry in the unsharded tensor.
        place: instead of ``offset``, where the entries lie; those of a shard need not be neighbours.
        device: where to draw them.

    Returns:
        int64 tensor of ``shape`` with values in [0, 2^32).
    """
    flat = torch.empty(prod(shape), dtype=torch.int64, device=device)
    for at, index, count, high in _chunks(flat.numel(), offset, place, flat.device):
        k0, k1, k2, k3 = key.words(high)
        coarse = _half(_hashed_range(index, count, k0, k1, flat.device), key.stream)
        fine = _half(_hashed_range(index, count, k2, k3, flat.device), key.stream)
        flat[at : at + count] = coarse.to(torch.int64).mul_(1 << 16).add_(fine)
    return flat.view(tuple(shape))


def bernoulli_mask(
    shape: Sequence[int],
    p: float,
    key: MaskKey,
    *,
    offset: int = 0,
    place: Place | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a mask that keeps each entry with probability ``p``, exact to 2⁻³².

    Entry i is kept when U_i < round(p·2³²). (DARE, arXiv 2311.03099, Eq. 2, with a keyed source of
    randomness.)

    Args:
        shape: shape of the mask, or of the shard that starts at ``offset``.
        p: probability of keeping, in (0, 1].
        key: what the mask is a function of.
        offset: 64-bit row-major index of the first entry in the unsharded tensor.
        place: instead of ``offset``, where the entries lie; those of a shard need not be neighbours.
        device: where to draw it.

    Returns:
        bool tensor of ``shape``.

    Examples:
        >>> key = MaskKey(seed=0, stream=UPDATE, step=1, name="lm_head.weight")
        >>> whole = bernoulli_mask((4, 6), 0.5, key)
        >>> bool((bernoulli_mask((2, 6), 0.5, key, offset=12) == whole[2:]).all())
        True
    """
    return bernoulli_masks(shape, (p,), (key,), offset=offset, place=place, device=device)[0]


def bernoulli_masks(
    shape: Sequence[int],
    rates: Sequence[float],
    keys: Sequence[MaskKey],
    *,
    offset: int = 0,
    place: Place | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Draw one mask for each rate and key; keys that differ in a pair's stream alone share their hash."""
    drawn = bernoulli_bits(prod(shape), rates, keys, offset=offset, place=place, device=device)
    return [mask.to(torch.bool).view(tuple(shape)) for mask in drawn]


def bernoulli_bits(
    n: int,
    rates: Sequence[float],
    keys: Sequence[MaskKey],
    *,
    offset: int = 0,
    place: Place | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """The masks of :func:`bernoulli_masks` as flat int32: −1 (all bits set) where kept, else 0."""
    for p in rates:
        if not 0 < p <= 1:
            raise ValueError(f"probability must be in (0, 1], got {p}")
    chunks = list(_chunks(n, offset, place, device))
    whole = len(chunks) == 1 or [torch.empty(n, dtype=torch.int32, device=device) for _ in keys]
    for at, index, count, high in chunks:
        parts, words = [], [key.words(high) for key in keys]
        uses = Counter((k0, k1, key.stream % 2) for key, (k0, k1, _, _) in zip(keys, words, strict=True))
        drawn = {
            (k0, k1): _halves(_unfolded_range(index, count, k0, k1, device), odd=uses[k0, k1, 1] > 0)
            for k0, k1 in {word[:2] for word in words}
        }
        for p, key, (k0, k1, k2, k3) in zip(rates, keys, words, strict=True):
            half = drawn[k0, k1][key.stream % 2]
            uses[k0, k1, key.stream % 2] -= 1
            half = half + 0 if uses[k0, k1, key.stream % 2] else half  # it is written over
            parts.append(bits.tensor(_kept(half, round(p * (1 << 32)), key.stream, (index, k2, k3))))
        if whole is True:
            return parts
        for mask, part in zip(whole, parts, strict=True):
            mask[at : at + count] = part
    return [torch.empty(0, dtype=torch.int32, device=device) for _ in keys] if whole is True else whole


def _kept(half: Words, threshold: int, stream: int, fine: tuple[int | Tensor, int, int]) -> Words:
    """−1 where U < threshold, in the memory of U's upper half; ``fine`` says how to draw the lower one."""
    cell, rest = threshold >> 16, threshold & 0xFFFF
    if not rest:
        return bits.less(half, cell)
    half -= cell + 1  # what is −1 now is kept unless its lower half says otherwise
    boundary = bits.places(half, -1)
    kept = bits.less(half, 0)
    if not boundary.numel():
        return kept
    index, k2, k3 = fine
    if boundary.device.type != "cpu":
        at = index[boundary] if isinstance(index, Tensor) else (boundary + index).to(torch.int32)
        kept[boundary] = bits.tensor(bits.less(_half(hash32(at, k2, k3), stream), rest))
        return kept
    for at in boundary.tolist():  # most often two
        word = _hash_of_one(int(index[at]) if isinstance(index, Tensor) else index + at, k2, k3)
        kept[at] = -((word & 0xFFFF if stream % 2 else word >> 16) < rest)
    return kept


def _half(word: Tensor, stream: int) -> Tensor:
    """The stream's 16 bits of each word."""
    return word.bitwise_and(0xFFFF) if stream % 2 else bits.tensor(bits.shifted(bits.words(word), 16))


def _halves(x: Words, *, odd: bool) -> tuple[Words, Words]:
    """Both halves of h, or the high one alone, before its last line (which leaves that as it is)."""
    high = bits.shifted(x, 16)
    if odd:
        x ^= high
        x &= 0xFFFF
    return high, x


def _chunks(
    n: int, offset: int, place: Place | None, device: torch.device | str | None
) -> Iterator[tuple[int, int | Tensor, int, int]]:
    """Yield (position, indices, count, high bits of the indices) over all entries.

    Indices are given by their low 32 bits: those of the first, where they are neighbours, else of each, as
    int32.
    """
    runs = [(0, offset, n)]
    if place is not None:
        layout, low = place
        if _scattered(layout):
            yield from _scattered_chunks(n, layout, low, device)
            return
        runs = [(at - low, index, count) for at, index, count in layout.runs(low, low + n)]
    for at, index, left in runs:
        while left:
            low, high = index & _LOW, index >> 32
            count = min(left, _CHUNK, (1 << 32) - low)
            yield at, low, count, high
            at, index, left = at + count, index + count, left - count


def _scattered(layout: Layout) -> bool:
    """Whether the runs are so short that listing indices is cheaper than going from run to run."""
    spans = layout.spans()
    return len(spans) > 1 or (len(spans) == 1 and spans[0].run < min(_CHUNK, spans[0].count))


def _scattered_chunks(
    n: int, layout: Layout, first: int, device: torch.device | str | None
) -> Iterator[tuple[int, Tensor, int, int]]:
    for low in range(0, n, _CHUNK):
        index = layout.indices(first + low, first + min(low + _CHUNK, n), device=device)
        at, end = low, int(index[-1]) >> 32
        for high in range(int(index[0]) >> 32, end + 1):
            part = index if high == end else index[: int(torch.searchsorted(index, high + 1 << 32))]
            if part.numel():
                yield at, part.to(torch.int32), part.numel(), high
            at, index = at + part.numel(), index[part.numel() :]


def _hashed_range(
    index: int | Tensor, count: int, key0: int, key1: int, device: torch.device | str | None
) -> Tensor:
    """h(i; key0, key1) of ``count`` indices (mod 2^32): those listed, or neighbours from the first on."""
    return bits.tensor(_folded(_unfolded_range(index, count, key0, key1, device)))


def _unfolded_range(
    index: int | Tensor, count: int, key0: int, key1: int, device: torch.device | str | None
) -> Words:
    """The numbers of :func:`_hashed_range` up to the last line of h."""
    if isinstance(index, Tensor):
        return _unfolded(index, key0, key1)
    # Among 65,536 neighbours x >> 16 is one number, and x ^ x >> 16 is another one's xor with the lower half.
    x, at = bits.words(torch.empty(count, dtype=torch.int32, device=device)), 0
    while at < count:
        high, low = divmod(index + key0 + at & _LOW, 1 << 16)
        part = x[at : at + (1 << 16) - low]
        bits.xor(_counter(low, len(part), device), _signed(high << 16 | high), out=part)
        at += len(part)
    return _multiplied(x, key1)


def _counter(low: int, count: int, device: torch.device | str | None) -> Tensor:
    """The numbers ``low … low + count − 1``."""
    if count > _CHUNK // 64 and low + count <= _CHUNK:  # worth keeping, 1 MB
        return _full_counter(_CHUNK, device)[low : low + count]
    return torch.arange(low, low + count, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _full_counter(size: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(size, dtype=torch.int32, device=device)


def _index_chunks(
    n: int, offset: int, place: Place | None, device: torch.device
) -> Iterator[tuple[int, Tensor, int]]:
    """Yield (position, low 32 bits of the indices as int32, high bits) over all entries."""
    for at, index, count, high in _chunks(n, offset, place, device):
        listed = index if isinstance(index, Tensor) else _counter(0, count, device) + _signed(index)
        yield at, listed, high


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
