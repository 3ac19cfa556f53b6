import pytest
import torch

from trimtab.ops import combined_digest, content_hash

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_of_parts_adds_up_to_the_hash_of_the_whole(dtype):
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    parts = [(0, 1), (1, 400), (400, 400), (400, 1000)]
    assert sum(content_hash(x[a:b], offset=a) for a, b in parts) % 2**64 == content_hash(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_sees_one_bit_and_the_order(dtype):
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    changed = x.clone()
    changed.view(torch.uint8)[3] ^= 1
    assert content_hash(changed) != content_hash(x)
    assert content_hash(x.flip(0)) != content_hash(x)


def test_hash_sees_both_halves_of_a_double_and_their_places():
    a = torch.tensor([1, 2], dtype=torch.int32).view(torch.int64)
    b = torch.tensor([2, 1], dtype=torch.int32).view(torch.int64)
    assert content_hash(a) != content_hash(b)


def test_hash_is_by_logical_order_not_by_memory():
    x = torch.arange(12.0).view(3, 4)
    assert content_hash(x.t().contiguous().t()) == content_hash(x)
    assert content_hash(torch.empty(0)) == 0


def test_hash_beyond_32_bits_of_index_differs():
    x = torch.ones(4)
    assert content_hash(x, offset=1 << 32) != content_hash(x)


def test_hashes_are_pinned_across_versions():
    # Saved deltas carry these hashes: a change here makes every saved delta unreadable.
    assert content_hash(torch.arange(5.0)) == 4311639576514571584
    assert combined_digest(["a", "bc"]) != combined_digest(["ab", "c"])
