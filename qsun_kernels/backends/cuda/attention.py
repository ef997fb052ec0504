"""paged_attention_decode and write_kv_cache on the CUDA library."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.problems import PagedAttentionDecodeProblem, WriteKvCacheProblem


def supports_attention(problem: PagedAttentionDecodeProblem) -> str | None:
    if problem.kv_dtype != problem.dtype:
        return f"kv_dtype is {problem.kv_dtype}, expected that of q ({problem.dtype})"
    if problem.head_dim % 8 or problem.head_dim > 256:
        return f"head_dim is {problem.head_dim}, expected a multiple of 8, at most 256"
    size = problem.block_size
    if not 8 <= size <= 65536 or size & (size - 1):
        return f"block_size is {size}, expected a power of two from 8 to 65536"
    return library.refuse(problem.device, dtype=problem.dtype)


def describe_attention(problem: PagedAttentionDecodeProblem) -> str:
    group = problem.num_q_heads // problem.num_kv_heads
    tile = 1 if group <= 1 else 4 if group <= 4 else 8
    return f"paged_attention_split: {tile} query heads a block, lengths cut by batch size, then combined"


@lru_cache(maxsize=4096)
def _scratch_bytes(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    device: int,
) -> int:
    scratch: int = library.binding.paged_attention_decode_scratch_bytes(
        batch,
        num_q_heads,
        num_kv_heads,
        head_dim,
        block_size,
        max_blocks,
        window,
        library.device_props(device),
    )
    return scratch


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, D) and lse (B, Hq)."""
    batch, num_q_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    max_blocks = block_table.shape[1]
    device = q.get_device()
    out = torch.empty((batch, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_q_heads), dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    last = -1 if window is None else window
    scratch_bytes = _scratch_bytes(
        batch, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks, last, device
    )
    scratch = torch.empty(scratch_bytes // 4, dtype=torch.float32, device=q.device) if scratch_bytes else None
    library.binding.paged_attention_decode(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        library.address(scratch),
        scratch_bytes,
        batch,
        num_q_heads,
        num_kv_heads,
        head_dim,
        num_blocks,
        block_size,
        max_blocks,
        q.stride(0),
        block_table.stride(0),
        last,
        softmax_scale,
        library.DTYPE_CODES[q.dtype],
        device,
        library.stream(device),
    )
    return out, lse


def supports_write(problem: WriteKvCacheProblem) -> str | None:
    if problem.kv_dtype != problem.dtype:
        return f"kv_dtype is {problem.kv_dtype}, expected that of k and v ({problem.dtype})"
    return library.refuse(problem.device, dtype=problem.dtype)


def write_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    device = k.get_device()
    library.binding.write_kv_cache(
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        num_kv_heads,
        head_dim,
        k_cache.shape[0],
        k_cache.shape[2],
        k.stride(0),
        v.stride(0),
        library.DTYPE_CODES[k.dtype],
        device,
        library.stream(device),
    )
