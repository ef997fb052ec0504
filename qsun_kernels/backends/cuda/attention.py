"""paged_attention_decode and write_kv_cache on the CUDA library."""

from __future__ import annotations

from dataclasses import dataclass
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
    index = problem.device.index
    sizes = (
        *(1, 1, problem.num_q_heads, problem.num_kv_heads, problem.head_dim, problem.block_size),
        *(0, -1 if problem.window is None else problem.window, library.DTYPE_CODES[problem.dtype]),
        library.device_props(torch.cuda.current_device() if index is None else index),
    )
    config = library.binding.choose_paged_attention_decode(*sizes)
    if config is not None:
        rows = "16 query rows a warp" if group > 16 else f"{group} query heads in a tensor-core tile of 16"
        return f"paged_attention_tiles: {rows}, all lengths cut into equal parts"
    tile = library.binding.choose_paged_attention_split(*sizes).head_tile
    return f"paged_attention_split: query heads in tiles of {tile}, lengths cut by batch size, then combined"


@dataclass(frozen=True, slots=True)
class _Launch:
    """How calls of given sizes run. plan_bytes is 0 where they take no plan."""

    config: library.binding.PagedAttentionDecodeConfig | None
    plan_bytes: int
    scratch_bytes: int


@lru_cache(maxsize=4096)
def _launch_of(
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    device: int,
    config: library.binding.PagedAttentionDecodeConfig | None,
) -> _Launch:
    sizes = (
        *(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks, window, dtype),
        library.device_props(device),
    )
    if config is None:
        config = library.binding.choose_paged_attention_decode(*sizes)
    return _Launch(
        config,
        library.binding.paged_attention_plan_bytes(config, *sizes),
        library.binding.paged_attention_decode_scratch_bytes(config, *sizes),
    )


def plan_paged_attention(
    problem: PagedAttentionDecodeProblem,
    seq_lens: Tensor,
    q_len: int,
    window: int | None,
    config: library.binding.PagedAttentionDecodeConfig | None = None,
) -> tuple[Tensor, ...]:
    """The plan (int32), or nothing where the kernel that serves the problem takes none.

    config: how the calls will run, for tests and tuning; by default the library chooses.
    """
    return _plan(
        seq_lens,
        q_len,
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.head_dim,
        problem.block_size,
        -1 if window is None else window,
        library.DTYPE_CODES[problem.dtype],
        config,
    )


def _plan(
    seq_lens: Tensor,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int,
    dtype: int,
    config: library.binding.PagedAttentionDecodeConfig | None,
) -> tuple[Tensor, ...]:
    batch = seq_lens.shape[0]
    if batch == 0:
        return ()
    device = seq_lens.get_device()
    sizes = (batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size)
    launch = _launch_of(*sizes, 0, window, dtype, device, config)
    if launch.plan_bytes == 0:
        return ()
    plan = torch.empty(launch.plan_bytes // 4, dtype=torch.int32, device=seq_lens.device)
    library.binding.plan_paged_attention(
        launch.config,
        seq_lens.data_ptr(),
        plan.data_ptr(),
        launch.plan_bytes,
        *sizes,
        window,
        dtype,
        device,
        library.stream(device),
    )
    return (plan,)


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    plan: tuple[Tensor, ...] | None = None,
    config: library.binding.PagedAttentionDecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B * q_len, Hq, D), into `out` when that is given, and lse (B * q_len, Hq).

    plan: of `plan_paged_attention` with the same sizes, window and config; by default planned here.
    """
    rows, num_q_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    batch, max_blocks = block_table.shape
    if out is None:
        out = torch.empty((rows, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, num_q_heads), dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    q_len = rows // batch
    device = q.get_device()
    dtype = library.DTYPE_CODES[q.dtype]
    last = -1 if window is None else window
    sizes = (batch, q_len, num_q_heads, num_kv_heads, head_dim)
    launch = _launch_of(*sizes, block_size, max_blocks, last, dtype, device, config)
    result = out
    if launch.plan_bytes:
        # The planned kernel reads pairs and stores 8 bytes: views at odd places are copied.
        if q.data_ptr() % 4 or q.stride(0) % 2:
            q = q.clone(memory_format=torch.contiguous_format)
        if out.data_ptr() % 8:
            result = torch.empty_like(out)
    if plan is None:
        plan = _plan(seq_lens, q_len, num_q_heads, num_kv_heads, head_dim, block_size, last, dtype, config)
    scratch = None
    if launch.scratch_bytes:
        scratch = torch.empty(launch.scratch_bytes // 4, dtype=torch.float32, device=q.device)
    library.binding.paged_attention_decode(
        launch.config,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        library.address(sinks),
        result.data_ptr(),
        lse.data_ptr(),
        plan[0].data_ptr() if plan else 0,
        plan[0].numel() * 4 if plan else 0,
        library.address(scratch),
        launch.scratch_bytes,
        *sizes,
        num_blocks,
        block_size,
        max_blocks,
        q.stride(0),
        block_table.stride(0),
        last,
        softmax_scale,
        0.0 if softcap is None else softcap,
        dtype,
        device,
        library.stream(device),
    )
    return (out if result is out else out.copy_(result)), lse


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
