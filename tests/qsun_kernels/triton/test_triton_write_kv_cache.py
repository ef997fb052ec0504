"""write_kv_cache through Triton: every bit of both caches, written or not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import write_kv_cache
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_write_kv_cache

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    *,
    tokens: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_blocks: int,
    std: float = 1.0,
) -> None:
    source = inputs.generator(tokens + head_dim)
    _, k, v = inputs.qkv_views(source, tokens, 1, num_kv_heads, head_dim, dtype, device)
    if std != 1.0:
        k, v = k * std, v * std
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    before = tuple(torch.full(shape, torch.nan, dtype=kv_dtype, device=device) for _ in range(2))
    after = tuple(cache.clone() for cache in before)
    slots = inputs.slot_mapping(source, tokens, num_blocks * block_size, skip=0.3, device=device)
    write_kv_cache(k, v, *after, slots, backend="triton")
    judge_write_kv_cache(after, before, k, v, slots).require()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 3e4 * 3 in float16 is infinite
@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    sizes = {"tokens": 7, "num_kv_heads": 3, "head_dim": 20, "block_size": 5, "num_blocks": 4}
    check(device, dtype, kv_dtype, **sizes)
    # Past what float16 holds, and among its subnormal numbers.
    check(device, dtype, kv_dtype, **sizes, std=3e4)
    check(device, dtype, kv_dtype, **sizes, std=1e-6)


@pytest.mark.parametrize(
    ("tokens", "num_kv_heads", "head_dim", "block_size"),
    [(0, 2, 8, 4), (1, 1, 1, 1), (3, 1, 256, 16), (2, 40, 128, 3), (5, 2, 3000, 2), (9, 8, 64, 32)],
)
def test_shapes(device: torch.device, tokens: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    check(
        device,
        torch.bfloat16,
        torch.bfloat16,
        tokens=tokens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=-(-max(1, tokens) // block_size) + 1,
    )


def test_nan_is_copied_with_its_payload(device: torch.device) -> None:
    bits = torch.tensor([[[0x7FC1, 0x7F81, -0x7F, 0x7F80]]], dtype=torch.int16, device=device)
    k = bits.view(torch.bfloat16)
    caches = torch.zeros(2, 1, 1, 2, 4, dtype=torch.bfloat16, device=device)
    write_kv_cache(k, k, caches[0], caches[1], torch.tensor([1], device=device), backend="triton")
    assert torch.equal(caches.view(torch.int16)[:, 0, 0, 1], bits[0].expand(2, 4))
    assert not caches[:, 0, 0, 0].any()


def test_nan_stays_nan_where_rounding_carries(device: torch.device) -> None:
    """All bits set: adding half a unit in the last place to them would give zero."""
    k = torch.tensor([[[0x7FFFFFFF, -1, 0x7FC00000]]], dtype=torch.int32, device=device).view(torch.float32)
    caches = torch.zeros(2, 1, 1, 1, 3, dtype=torch.bfloat16, device=device)
    write_kv_cache(k, k, caches[0], caches[1], torch.tensor([0], device=device), backend="triton")
    assert caches.isnan().all()


@pytest.mark.gpu
@pytest.mark.slow
def test_slots_past_2_to_the_31_values(device: torch.device) -> None:
    num_blocks = 2**31 // (8 * 16 * 128) + 3
    caches = torch.zeros(2, num_blocks, 8, 16, 128, dtype=torch.bfloat16, device=device)
    k = inputs.normal(inputs.generator(0), (2, 8, 128), torch.bfloat16, device)
    slots = torch.tensor([num_blocks * 16 - 1, 2], device=device)
    write_kv_cache(k, k, caches[0], caches[1], slots, backend="triton")
    assert torch.equal(caches[1, -1, :, -1], k[0]) and torch.equal(caches[0, 0, :, 2], k[1])
    assert int((caches != 0).any(-1).sum()) == 2 * 2 * 8
