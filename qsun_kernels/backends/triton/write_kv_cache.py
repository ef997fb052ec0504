"""Scatter of the keys and values of new tokens into their slots of the paged cache.

slot = block * block_size + offset in the cache (num_blocks, num_kv_heads, block_size, head_dim); a negative
slot is padding and is skipped. Values are copied when the cache has the dtype of the tokens, else rounded
once; with more to do on the way, write_kv_cache_steps does it. No two tokens of a call may share a slot:
which of them stayed would be chance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, WriteKvCacheProblem
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two, refuse, refuse_cache
from qsun_kernels.backends.triton.numerics import device_function, store_rounded, to_float32
from qsun_kernels.backends.triton.write_kv_cache_steps import write_kv_cache_steps

BLOCK_VALUES = 2048
"""Values of k (and of v) that one program moves, at most (unless one head has more)."""


@device_function
def _copy(source: tl.tensor, destination: tl.tensor, mask: tl.tensor) -> None:
    value = tl.load(source, mask=mask)
    if source.dtype.element_ty == destination.dtype.element_ty:
        tl.store(destination, value, mask=mask)
    else:
        store_rounded(destination, to_float32(value), mask)


@triton.jit
def write_kv_cache_kernel(
    k: tl.tensor,  # (T, num_kv_heads, head_dim), tokens k_stride apart
    v: tl.tensor,  # (T, num_kv_heads, head_dim), tokens v_stride apart
    k_cache: tl.tensor,  # (num_blocks, num_kv_heads, block_size, head_dim), contiguous
    v_cache: tl.tensor,  # as k_cache
    slot_mapping: tl.tensor,  # int64 (T,)
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    head_dim: tl.tensor,
    block_size: tl.tensor,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        mask = (head < num_kv_heads) & (d < head_dim)
        cache_row = ((slot // block_size) * num_kv_heads + head) * block_size + slot % block_size
        cached = cache_row * head_dim + d
        new = head * head_dim + d
        _copy(k + token * k_stride + new, k_cache + cached, mask)
        _copy(v + token * v_stride + new, v_cache + cached, mask)


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
    """k, v (T, Hkv, D) into the caches (num_blocks, Hkv, block_size, D) at slots slot_mapping (T,); q after
    its steps. settled: nothing here begins early."""
    if q is None and positions is None and k_norm is None and k_scale is None:
        _copy_all(k, v, k_cache, v_cache, slot_mapping)
        return None
    return write_kv_cache_steps(
        *(k, v, k_cache, v_cache, slot_mapping, q, positions, cos_sin, q_norm, k_norm, eps, rotate),
        *(k_scale, v_scale),
    )


def _copy_all(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    T, num_kv_heads, head_dim = k.shape
    if T == 0:
        return
    block_d = next_power_of_two(head_dim)
    block_h = max(1, min(BLOCK_VALUES // block_d, next_power_of_two(num_kv_heads)))

    def shapes() -> str:
        return f"T={T} num_kv_heads={num_kv_heads} head_dim={head_dim} cache={tuple(k_cache.shape)}"

    with Launching("write_kv_cache", k.device, shapes):
        write_kv_cache_kernel[(T, -(-num_kv_heads // block_h))](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            k.stride(0),
            v.stride(0),
            num_kv_heads,
            head_dim,
            k_cache.shape[2],
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4,
        )


def takes_steps(problem: WriteKvCacheProblem) -> bool:
    """Whether keys, values or queries are more than copied."""
    return problem.norm or problem.rope or problem.rotate or problem.kv_scales != "none"


def supports(problem: WriteKvCacheProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    if problem.kv_dtype == torch.uint8 and problem.head_dim % 4:
        return f"head_dim is {problem.head_dim}, expected a multiple of 4 for a cache of 4 bits"
    return refuse(problem.device, dtype=problem.dtype) or refuse_cache(problem.kv_dtype, problem.kv_scales)


def describe(problem: WriteKvCacheProblem) -> str:
    """Which kernel it would be."""
    heads = f"{problem.num_kv_heads} heads x {problem.head_dim}"
    if not takes_steps(problem):
        return f"write_kv_cache_kernel: one program a token, {heads}"
    steps = (("norm", problem.norm), ("rope", problem.rope), ("rotation", problem.rotate))
    names = [name for name, taken in steps if taken]
    if problem.kv_scales != "none":
        names.append("quantisation")
    return f"write_kv_cache_steps_kernel: {', '.join(names)} and append in one launch, {heads}"


WRITE_KV_CACHE = Implementation(supports, write_kv_cache, describe)
