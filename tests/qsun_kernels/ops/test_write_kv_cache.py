"""write_kv_cache: every bit of both caches against a loop."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels import write_kv_cache
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def caches(
    source: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches that are NaN in their first block and numbers elsewhere: what is not written keeps its bits."""
    pair = tuple(inputs.normal(source, shape, dtype, device) for _ in range(2))
    for cache in pair:
        cache[0] = torch.nan
    return pair[0], pair[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [(2, 64, 16), (3, 80, 1), (1, 2, 5), (8, 128, 32)]
)
def test_writes_exactly_the_slots(
    heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    source = inputs.generator(head_dim)
    for tokens in inputs.ODD_ROWS:
        num_blocks = -(-tokens // block_size) + 3
        k_cache, v_cache = caches(source, (num_blocks, heads, block_size, head_dim), dtype, device)
        before = k_cache.clone(), v_cache.clone()
        _, k, v = inputs.qkv_views(source, tokens, heads, heads, head_dim, dtype, device)
        slots = inputs.slot_mapping(source, tokens, num_blocks * block_size, skip=0.3, device=device)
        write_kv_cache(k, v, k_cache, v_cache, slots, backend="torch")
        judge.judge_write_kv_cache((k_cache, v_cache), before, k, v, slots).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
def test_rounds_to_the_dtype_of_the_cache(
    dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> None:
    source = inputs.generator(1)
    k_cache, v_cache = caches(source, (3, 2, 4, 8), kv_dtype, device)
    before = k_cache.clone(), v_cache.clone()
    _, k, v = inputs.qkv_views(source, 5, 2, 2, 8, dtype, device)
    slots = inputs.slot_mapping(source, 5, 12, device=device)
    write_kv_cache(k, v, k_cache, v_cache, slots, backend="torch")
    judge.judge_write_kv_cache((k_cache, v_cache), before, k, v, slots).require()


@pytest.mark.parametrize("first", [-1, -7])
def test_skipping_every_token_changes_nothing(first: int, device: torch.device) -> None:
    source = inputs.generator(2)
    k_cache, v_cache = caches(source, (2, 2, 4, 8), torch.float32, device)
    before = k_cache.clone(), v_cache.clone()
    _, k, v = inputs.qkv_views(source, 3, 2, 2, 8, torch.float32, device)
    slots = torch.full((3,), first, dtype=torch.int64, device=device)
    write_kv_cache(k, v, k_cache, v_cache, slots, backend="torch")
    judge.judge_write_kv_cache((k_cache, v_cache), before, k, v, slots).require()


@pytest.mark.parametrize(
    "slots", [[3, -1, 7, -4], [-1, -2, 5, 0], [-1, -1, -1, -1], [0, 1, 2, 3], [-3, 0, -1, 6]], ids=str
)
def test_the_form_without_host_reads_is_the_same_function(slots: list[int]) -> None:
    """What runs on a GPU, where nothing may be counted on the host, here on the CPU."""
    from qsun_kernels.backends.reference.write_kv_cache import _replace_skipped

    source = inputs.generator(3)
    before = caches(source, (2, 2, 4, 8), torch.float32, torch.device("cpu"))
    _, k, v = inputs.qkv_views(source, 4, 2, 2, 8, torch.float32)
    mapping = torch.tensor(slots)
    after = tuple(cache.clone() for cache in before)
    stored, all_slots = _replace_skipped(list(zip(after, (k, v), strict=True)), mapping)
    assert len(all_slots) == 4
    for cache, rows in stored:
        cache[all_slots // 4, :, all_slots % 4] = rows
    judge.judge_write_kv_cache((after[0], after[1]), before, k, v, mapping).require()


@pytest.mark.damaged
def test_a_slot_past_the_cache_is_an_error_on_the_cpu() -> None:
    cache = torch.zeros(2, 1, 4, 8)
    rows = torch.ones(1, 1, 8)
    with pytest.raises(IndexError, match="out of bounds"):
        write_kv_cache(rows, rows, cache, cache.clone(), torch.tensor([8]))
    assert not cache.any()
