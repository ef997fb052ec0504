"""write_kv_cache on the CUDA library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library
from qsun_kernels.backends.problems import KV_SCALES, KvScales, PendingSums, WriteKvCacheProblem

MAX_HEAD_BYTES = 1024
"""Of one head of k: a warp holds it in registers, two vectors of 16 bytes a lane."""


def supports(problem: WriteKvCacheProblem) -> str | None:
    if problem.kv_dtype not in library.CACHE_DTYPE_CODES:
        expected = ", ".join(map(str, library.CACHE_DTYPE_CODES))
        return f"kv_dtype is {problem.kv_dtype}, expected one of {expected}"
    if problem.kv_scales not in KV_SCALES[problem.kv_dtype]:
        expected = " or ".join(KV_SCALES[problem.kv_dtype])
        return f"kv_scales is {problem.kv_scales}, a cache of {problem.kv_dtype} has {expected}"
    reason = library.refuse(problem.device, dtype=problem.dtype)
    if reason is not None or _copies(problem):
        return reason
    head_dim, size = problem.head_dim, problem.dtype.itemsize
    if head_dim * size > MAX_HEAD_BYTES:
        return f"head_dim is {head_dim}, expected at most {MAX_HEAD_BYTES // size} of {problem.dtype}"
    if problem.rope and head_dim % 2:
        return f"head_dim is {head_dim}, expected an even number"
    if problem.rotate and head_dim * size < 32:
        return f"head_dim is {head_dim}, expected at least {32 // size} of {problem.dtype} to rotate"
    if problem.kv_dtype == torch.uint8 and head_dim % 4:
        return f"head_dim is {head_dim}, expected a multiple of 4 for 4-bit codes"
    return None


def describe(problem: WriteKvCacheProblem) -> str:
    if _copies(problem):
        return "write_kv_copy: a thread copies 16 bytes of k and of v, or one element where unaligned"
    index = problem.device.index
    lanes = library.binding.choose_write_kv_cache(
        *(0, 0, problem.num_q_heads, problem.head_dim, problem.rope),
        library.CACHE_DTYPE_CODES[problem.kv_dtype],
        library.DTYPE_CODES[problem.dtype],
        library.device_props(torch.cuda.current_device() if index is None else index),
    ).lanes
    return f"write_kv_heads: {lanes} lanes a head, all steps in registers"


def _copies(problem: WriteKvCacheProblem) -> bool:
    """Whether bits are copied and nothing else is done."""
    has_steps = problem.num_q_heads > 0 or problem.norm or problem.rope or problem.rotate
    return not has_steps and problem.kv_dtype == problem.dtype


def write_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotate: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    settled: bool = False,
) -> Tensor | None:
    steps = (positions, cos_sin, q_norm, k_norm, eps, rotate, k_scale, v_scale)
    return _launch(k, v, k_cache, v_cache, slot_mapping, q, *steps, settled, dtype=k.dtype)


def write_sums(
    k: PendingSums,
    v: PendingSums,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: PendingSums | None,
    *steps_and_settled: Any,
) -> Tensor | None:
    """The same of rows that a product left as sums, all of them of one product."""
    splits, distance = k.parts.shape[0], k.parts.stride(0)
    first_q = None if q is None else q.parts[0]  # which lies where rows would
    rows = (k.parts[0], v.parts[0], k_cache, v_cache, slot_mapping, first_q)
    return _launch(*rows, *steps_and_settled, dtype=k.dtype, splits=splits, split_stride=distance)


def _launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotate: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    settled: bool,
    *,
    dtype: torch.dtype,
    splits: int = 0,
    split_stride: int = 0,
) -> Tensor | None:
    """k, v and q are rows of `dtype`, or with splits the first of so many float32 parts."""
    num_tokens, num_kv_heads, head_dim = k.shape
    scales: KvScales = "none"
    if k_scale is not None:
        scales = "tensor" if k_scale.dim() == 1 else "token"
    out = None
    if q is not None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    device = k.get_device()
    library.binding.write_kv_cache(
        k.data_ptr(),
        v.data_ptr(),
        library.address(q),
        library.address(out),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        library.address(k_scale),
        library.address(v_scale),
        slot_mapping.data_ptr(),
        library.address(positions),
        library.address(cos_sin),
        library.address(q_norm),
        library.address(k_norm),
        eps,
        rotate,
        num_tokens,
        0 if q is None else q.shape[1],
        num_kv_heads,
        head_dim,
        k_cache.shape[0],
        k_cache.shape[2],
        0 if cos_sin is None else cos_sin.shape[0],
        library.row_stride(q),
        k.stride(0),
        v.stride(0),
        splits,
        split_stride,
        library.CACHE_DTYPE_CODES[k_cache.dtype],
        library.SCALES_CODES[scales],
        settled,
        library.DTYPE_CODES[dtype],
        device,
        library.stream(device),
    )
    return out
