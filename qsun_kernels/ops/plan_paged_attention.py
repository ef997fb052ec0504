"""plan_paged_attention: share the attention of one decode step out, once for all of its layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import requested_backend, select
from qsun_kernels.backends.problems import (
    KV_SCALES,
    AttentionImplementation,
    AttentionPlan,
    BackendName,
    KvScales,
    PagedAttentionDecodeProblem,
)
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced

__all__ = ["MAX_Q_LEN", "check_plan", "check_q_len", "plan_paged_attention"]

MAX_Q_LEN = 8
"""Most query tokens a request in one call: what speculative decoding verifies, not a prompt."""

_SIZES = (
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
    "block_size",
    "window",
    "dtype",
    "kv_dtype",
    "device",
    "kv_scales",
    "batch",
    "q_len",
)


def plan_paged_attention(
    seq_lens: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    kv_scales: KvScales | None = None,
    q_len: int = 1,
    window: int | None = None,
    block_table: Tensor | None = None,
    backend: BackendName | None = None,
) -> AttentionPlan:
    """Share the work of `paged_attention_decode` over these lengths out, for every layer of the step.

    seq_lens int32 (B,), contiguous, as the calls will get it; it is read on the device, nothing waits. The
    other arguments are the sizes of those calls: q (B * q_len, num_q_heads, head_dim) of `dtype`, caches
    (num_blocks, num_kv_heads, block_size, head_dim) of `kv_dtype` (that of q by default; torch.uint8 for
    pairs of 4-bit codes), `window`. kv_scales: "tensor" for float8_e4m3fn with scales of shape (1,); by
    default "token" where a cache of `kv_dtype` has scales.

    block_table: int32 (B, max_blocks), that of those calls, to look for prefixes: requests whose rows begin
    with the same blocks have these read once for all of them, wherever they stand in the batch. Results are
    the same to rounding. It costs three small launches a plan and one a call, so give it where requests are
    likely to share. The CUDA kernel for 16-bit caches shares, without a window, with up to 32 query rows a
    key head (q_len * Hq / Hkv) and up to 4096 requests; for all else block_table changes nothing.

    A call takes the plan while `seq_lens`, and a block_table that was given, hold what they held here; a call
    without one plans by itself. Calls that share a plan run one after another, on one stream, since a kernel
    may count in it. Captured in a CUDA graph, the plan is made anew at every replay.

    A plan that was made outside serves code that is traced (torch.compile). Inside, where there is nothing to
    read and only a backend knows what its plans look like, this returns one whose calls plan by themselves.

    Raises TypeError or ValueError naming the argument, BackendUnavailable.
    """
    for name, size in (
        ("num_q_heads", num_q_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("block_size", block_size),
    ):
        checks.positive(name, size)
    if num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads is {num_q_heads}, expected a multiple of num_kv_heads, {num_kv_heads}")
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    for name, one, known in (("dtype", dtype, checks.FLOATING), ("kv_dtype", kv_dtype, KV_SCALES)):
        if one not in known:
            raise TypeError(f"{name} is {one!r}, expected one of {', '.join(map(str, known))}")
    if kv_scales is None:
        kv_scales = KV_SCALES[kv_dtype][0]
    elif kv_scales not in KV_SCALES[kv_dtype]:
        allowed = " or ".join(map(repr, KV_SCALES[kv_dtype]))
        raise ValueError(f"kv_scales is {kv_scales!r}, expected {allowed} for a cache of {kv_dtype}")
    check_q_len(q_len)
    if window is not None:
        checks.positive("window", window)
    if not isinstance(seq_lens, Tensor):
        raise TypeError(f"seq_lens is a {type(seq_lens).__name__}, expected a torch.Tensor")
    checks.index("seq_lens", seq_lens, torch.int32, seq_lens.device)
    checks.rank("seq_lens", seq_lens, 1, "(B,)")
    if block_table is not None:
        if not isinstance(block_table, Tensor):
            raise TypeError(f"block_table is a {type(block_table).__name__}, expected a torch.Tensor or None")
        checks.index("block_table", block_table, torch.int32, seq_lens.device)
        checks.rank("block_table", block_table, 2, "(B, max_blocks)")
        if block_table.shape[0] != seq_lens.shape[0]:
            raise ValueError(
                f"block_table has {block_table.shape[0]} rows, expected one for each of the "
                f"{seq_lens.shape[0]} requests of seq_lens"
            )
    problem = PagedAttentionDecodeProblem(
        *(num_q_heads, num_kv_heads, head_dim, block_size, window, dtype, kv_dtype, seq_lens.device),
        kv_scales=kv_scales,
    )
    batch = seq_lens.shape[0]
    if is_traced(seq_lens, block_table):
        return AttentionPlan(problem, batch, q_len, backend, None)
    choice = select(problem, requested_backend(backend))
    implementation = cast(AttentionImplementation, choice.implementation)
    tensors = implementation.plan(problem, seq_lens, q_len, window, block_table)
    return AttentionPlan(problem, batch, q_len, choice.backend, tensors)


def check_q_len(q_len: int) -> None:
    """A number of query tokens a request that the operator takes."""
    checks.positive("q_len", q_len)
    if q_len > MAX_Q_LEN:
        raise ValueError(f"q_len is {q_len}, expected at most {MAX_Q_LEN}")


def check_plan(
    plan: AttentionPlan,
    q: Tensor,
    k_cache: Tensor,
    kv_scales: KvScales,
    batch: int,
    q_len: int,
    window: int | None,
    backend: BackendName | None,
) -> None:
    """A plan that was made for a call of these sizes, and for `backend` if one was asked for."""
    if not isinstance(plan, AttentionPlan):
        raise TypeError(
            f"plan is a {type(plan).__name__}, expected an AttentionPlan (see plan_paged_attention)"
        )
    made_for = (*plan.problem.sizes, plan.batch, plan.q_len)
    _, num_kv_heads, block_size, _ = k_cache.shape
    called_with = (
        *(q.shape[1], num_kv_heads, q.shape[2], block_size),
        *(window, q.dtype, k_cache.dtype, q.device, kv_scales),
        *(batch, q_len),
    )
    if made_for != called_with:
        for name, made, called in zip(_SIZES, made_for, called_with, strict=True):
            if made != called:
                raise ValueError(f"plan was made for {name} {made}, expected one for {name} {called}")
    if backend is not None and plan.backend is not None and plan.backend != backend:
        raise ValueError(f"plan was made for backend {plan.backend!r}, expected one for {backend!r}")
