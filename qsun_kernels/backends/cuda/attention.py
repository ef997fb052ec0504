"""paged_attention_decode on the CUDA library."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.problems import KvScales, PagedAttentionDecodeProblem

_WHOLE_GROUP = {64: 16, 128: 16, 256: 8}
"""Query heads a key head that the kernels of codes take with every q_len, by head_dim."""


def supports_attention(problem: PagedAttentionDecodeProblem) -> str | None:
    size = problem.block_size
    if not 8 <= size <= 65536 or size & (size - 1):
        return f"block_size is {size}, expected a power of two from 8 to 65536"
    if problem.kv_scales != "none":
        return _supports_codes(problem)
    if problem.kv_dtype != problem.dtype:
        return f"kv_dtype is {problem.kv_dtype}, expected that of q ({problem.dtype}) or codes with scales"
    if problem.head_dim % 8 or problem.head_dim > 256:
        return f"head_dim is {problem.head_dim}, expected a multiple of 8, at most 256"
    return library.refuse(problem.device, dtype=problem.dtype)


def _supports_codes(problem: PagedAttentionDecodeProblem) -> str | None:
    codes = problem.kv_dtype
    if problem.dtype == torch.float32:
        return f"dtype is {problem.dtype}, expected a dtype of 16 bits beside a cache of {codes}"
    if problem.head_dim not in _WHOLE_GROUP:
        expected = ", ".join(map(str, _WHOLE_GROUP))
        return f"head_dim is {problem.head_dim}, expected one of {expected} for a cache of {codes}"
    if problem.block_size < 16:
        return f"block_size is {problem.block_size}, expected at least 16 for a cache of {codes}"
    group = problem.num_q_heads // problem.num_kv_heads
    if group > _WHOLE_GROUP[problem.head_dim]:
        return (
            f"{group} query heads share a key head, expected at most {_WHOLE_GROUP[problem.head_dim]} "
            f"for a cache of {codes} with head_dim {problem.head_dim}"
        )
    reason = library.refuse(problem.device, dtype=problem.dtype)
    if reason is None and _choose(problem) is None:
        return f"two steps of {codes} with head_dim {problem.head_dim} do not fit a block's shared memory"
    return reason


def describe_attention(problem: PagedAttentionDecodeProblem) -> str:
    group = problem.num_q_heads // problem.num_kv_heads
    config = _choose(problem)
    if config is not None and problem.kv_scales != "none":
        return f"paged_attention_codes: {group} query heads in tensor-core tiles of 8, codes in registers"
    if config is not None:
        rows = "16 query rows a warp" if group > 16 else f"{group} query heads in a tensor-core tile of 16"
        return f"paged_attention_tiles: {rows}, cut into equal parts, or whole{_describe_sharing(config)}"
    tile = library.binding.choose_paged_attention_split(*_sizes(problem)).head_tile
    return f"paged_attention_split: query heads in tiles of {tile}, lengths cut by batch size, then combined"


def _describe_sharing(config: library.binding.PagedAttentionDecodeConfig) -> str:
    if config.prefix_parts == 0:
        return ""
    return (
        f"; with a block table in the plan shared prefixes of {64 * config.min_prefix_tiles} tokens or more "
        f"are read once, where that saves {config.min_saved_tiles} tiles (64 tokens of a key head)"
    )


def _choose(problem: PagedAttentionDecodeProblem) -> library.binding.PagedAttentionDecodeConfig | None:
    """How one token of one request would run; None where the kernel without a plan serves it."""
    return library.binding.choose_paged_attention_decode(*_sizes(problem))


def _sizes(problem: PagedAttentionDecodeProblem) -> tuple[Any, ...]:
    index = problem.device.index
    return (
        *(1, 1, problem.num_q_heads, problem.num_kv_heads, problem.head_dim, problem.block_size),
        *(0, -1 if problem.window is None else problem.window, *_kind(problem)),
        library.device_props(torch.cuda.current_device() if index is None else index),
    )


def _kind(problem: PagedAttentionDecodeProblem) -> tuple[int, int, int]:
    """dtype, kv_dtype and kv_scales as the binding takes them."""
    return (
        library.DTYPE_CODES[problem.dtype],
        library.CACHE_DTYPE_CODES[problem.kv_dtype],
        library.SCALES_CODES[problem.kv_scales],
    )


@dataclass(frozen=True, slots=True)
class _Launch:
    """How calls of given sizes run. plan_bytes is 0 where they take no plan, prefixes_bytes where they share
    no prefixes."""

    config: library.binding.PagedAttentionDecodeConfig | None
    plan_bytes: int
    prefixes_bytes: int
    scratch_bytes: int
    sharing_scratch_bytes: int


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
    kv_dtype: int,
    kv_scales: int,
    device: int,
    config: library.binding.PagedAttentionDecodeConfig | None,
) -> _Launch:
    sizes = (
        *(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks, window),
        *(dtype, kv_dtype, kv_scales),
        library.device_props(device),
    )
    if config is None:
        config = library.binding.choose_paged_attention_decode(*sizes)
    prefixes_bytes = library.binding.paged_attention_prefixes_bytes(config, *sizes)
    return _Launch(
        config,
        library.binding.paged_attention_plan_bytes(config, *sizes),
        prefixes_bytes,
        library.binding.paged_attention_decode_scratch_bytes(config, *sizes),
        library.binding.paged_attention_sharing_scratch_bytes(config, *sizes) if prefixes_bytes else 0,
    )


def plan_paged_attention(
    problem: PagedAttentionDecodeProblem,
    seq_lens: Tensor,
    q_len: int,
    window: int | None,
    block_table: Tensor | None = None,
    config: library.binding.PagedAttentionDecodeConfig | None = None,
) -> tuple[Tensor, ...]:
    """The plan (int32), or nothing where the kernel that serves the problem takes none.

    block_table: of the calls, to find the prefixes that requests share: a second tensor (int32), for sizes
    that can share any. config: how the calls will run, for tests and tuning; by default the library chooses.
    """
    return _plan(
        seq_lens,
        block_table,
        q_len,
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.head_dim,
        problem.block_size,
        -1 if window is None else window,
        _kind(problem),
        config,
    )


def _plan(
    seq_lens: Tensor,
    block_table: Tensor | None,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int,
    kind: tuple[int, int, int],
    config: library.binding.PagedAttentionDecodeConfig | None,
) -> tuple[Tensor, ...]:
    batch = seq_lens.shape[0]
    if batch == 0:
        return ()
    device = seq_lens.get_device()
    sizes = (batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size)
    launch = _launch_of(*sizes, 0, window, *kind, device, config)
    if launch.plan_bytes == 0:
        return ()
    plan = torch.empty(launch.plan_bytes // 4, dtype=torch.int32, device=seq_lens.device)
    prefixes = None
    if block_table is not None and launch.prefixes_bytes:
        prefixes = torch.empty(launch.prefixes_bytes // 4, dtype=torch.int32, device=seq_lens.device)
    library.binding.plan_paged_attention(
        launch.config,
        seq_lens.data_ptr(),
        library.address(block_table),
        plan.data_ptr(),
        launch.plan_bytes,
        library.address(prefixes),
        0 if prefixes is None else launch.prefixes_bytes,
        *sizes,
        0 if block_table is None else block_table.shape[1],
        0 if block_table is None else block_table.stride(0),
        window,
        *kind,
        device,
        library.stream(device),
    )
    return (plan,) if prefixes is None else (plan, prefixes)


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    follows_write: bool = False,
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
    kind = _kind_of(q, k_cache, k_scale)
    last = -1 if window is None else window
    sizes = (batch, q_len, num_q_heads, num_kv_heads, head_dim)
    launch = _launch_of(*sizes, block_size, max_blocks, last, *kind, device, config)
    result = out
    if launch.plan_bytes:
        # The planned kernel reads pairs and stores 8 bytes: views at odd places are copied.
        if q.data_ptr() % 4 or q.stride(0) % 2:
            q = q.clone(memory_format=torch.contiguous_format)
        if out.data_ptr() % 8:
            result = torch.empty_like(out)
    if plan is None:
        follows_write = False  # the launch in front is the one that plans
        one = (seq_lens, None, q_len, num_q_heads, num_kv_heads, head_dim, block_size, last, kind, config)
        plan = _plan(*one)
    prefixes = plan[1] if len(plan) == 2 else None
    scratch_bytes = launch.scratch_bytes if prefixes is None else launch.sharing_scratch_bytes
    scratch = None
    if scratch_bytes:
        scratch = torch.empty(scratch_bytes // 4, dtype=torch.float32, device=q.device)
    library.binding.paged_attention_decode(
        launch.config,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        library.address(k_scale),
        library.address(v_scale),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        library.address(sinks),
        result.data_ptr(),
        lse.data_ptr(),
        plan[0].data_ptr() if plan else 0,
        plan[0].numel() * 4 if plan else 0,
        library.address(prefixes),
        0 if prefixes is None else prefixes.numel() * 4,
        library.address(scratch),
        scratch_bytes,
        *sizes,
        num_blocks,
        block_size,
        max_blocks,
        q.stride(0),
        block_table.stride(0),
        last,
        softmax_scale,
        0.0 if softcap is None else softcap,
        follows_write,
        *kind,
        device,
        library.stream(device),
    )
    return (out if result is out else out.copy_(result)), lse


def _kind_of(q: Tensor, k_cache: Tensor, k_scale: Tensor | None) -> tuple[int, int, int]:
    """The same as `_kind`, of a call."""
    scales: KvScales = "none" if k_scale is None else "tensor" if k_scale.dim() == 1 else "token"
    dtypes = library.DTYPE_CODES[q.dtype], library.CACHE_DTYPE_CODES[k_cache.dtype]
    return (*dtypes, library.SCALES_CODES[scales])
