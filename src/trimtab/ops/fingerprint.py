"""Content hashes of tensors: device-independent, and additive, so that shards can sum theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from trimtab.ops.masks import Place, _index_chunks, hash32

_SALT = (0x243F6A88, 0x85A308D3)  # digits of π: nothing up the sleeve
_LANE_A = (0x13198A2E, 0x03707344)
_LANE_B = (0xA4093822, 0x299F31D0)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_hash(x: Tensor, *, offset: int = 0, place: Place | None = None) -> int:
    """64-bit hash of the bit patterns of ``x`` and their positions.

    Σᵢ (A(bᵢ + s(i)) · 2³² + B(bᵢ + s(i))) mod 2⁶⁴ with bit pattern bᵢ, salt s(i) of the row-major index, and
    two 32-bit integer hashes A and B. The sum over disjoint index ranges is the hash of the whole. It tells
    apart what differs by accident; it is no defence against forgery.

    Args:
        x: tensor of any shape and dtype of 1, 2, 4 or 8 bytes.
        offset: index of its first entry in the unsharded tensor.
        place: instead of ``offset``, where the entries lie; those of a shard need not be neighbours.

    Examples:
        >>> x = torch.arange(6.0)
        >>> (content_hash(x[:2]) + content_hash(x[2:], offset=2)) % 2**64 == content_hash(x)
        True
    """
    flat = x.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start, index, high in _index_chunks(flat.numel(), offset, place, flat.device):
        bits = flat[start : start + index.numel()].view(_BITS[flat.element_size()])
        salt = hash32(index, _SALT[0] + high & 0xFFFFFFFF, _SALT[1])
        for word in _words(bits):
            salted = salt + word
            lane_a = hash32(salted, *_LANE_A).to(torch.int64)
            lane_b = hash32(salted, *_LANE_B).to(torch.int64) & 0xFFFFFFFF
            total += ((lane_a << 32) + lane_b).sum()
            salt = hash32(salt, *_LANE_A)  # the second half of an 8-byte entry is salted anew
    return int(total) % (1 << 64)


def combined_digest(parts: Iterable[str]) -> str:
    """BLAKE2b digest (32 hex digits) of a sequence of strings, order and boundaries included."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _words(bits: Tensor) -> list[Tensor]:
    if bits.dtype == torch.int64:
        return [(bits & 0xFFFFFFFF).to(torch.int32), (bits >> 32).to(torch.int32)]
    return [bits.to(torch.int32)]
