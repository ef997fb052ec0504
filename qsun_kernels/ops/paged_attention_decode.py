"""paged_attention_decode: a request's new tokens against its cached keys and values."""

from __future__ import annotations

import math
from typing import Literal, cast, overload

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import (
    AttentionPlan,
    BackendName,
    KvScales,
    PagedAttentionDecodeProblem,
)
from qsun_kernels.ops import checked_mode, checks
from qsun_kernels.ops.cache_checks import cache_head_dim, check_cache, check_scales, kind_of
from qsun_kernels.ops.library import is_traced, refuse_gradient, register
from qsun_kernels.ops.plan_paged_attention import MAX_Q_LEN, check_plan

__all__ = ["paged_attention_decode"]


@overload
def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: AttentionPlan | None = None,
    lse: Literal[False] = False,
    out: Tensor | None = None,
    follows_write: bool = False,
    backend: BackendName | None = None,
) -> Tensor: ...


@overload
def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: AttentionPlan | None = None,
    lse: Literal[True],
    out: Tensor | None = None,
    follows_write: bool = False,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]: ...


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: AttentionPlan | None = None,
    lse: bool = False,
    out: Tensor | None = None,
    follows_write: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softmax_scale * q K^T) V`` for a request's newest tokens, K and V in blocks of the cache.

    q (B * q_len, Hq, D) float32, float16 or bfloat16, 1 <= q_len <= 8: row b * q_len + j is query token j of
    request b; the heads of a token lie side by side, the token stride is free. k_cache, v_cache (num_blocks,
    Hkv, block_size, D) contiguous, Hq a multiple of Hkv (query heads of a group follow one another).
    block_table int32 (B, max_blocks): the blocks of each request in order; entries past its length are never
    followed. seq_lens int32 (B,): cached tokens of each request, all q_len new ones included.

    Caches of codes (docs/formats.md): float8_e4m3fn, int8, or uint8 for 4 bits, (..., D / 2), with k_scale
    and v_scale float32 (num_blocks, Hkv, block_size), or (1,) for float8_e4m3fn. K and V are then
    code * scale, as `write_kv_cache` made them; where it rotated the keys, q has to be rotated.

    Token j stands at position seq_len - q_len + j and attends to the positions up to its own; with `window`
    to the last `window` of them. softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv
    2408.00118). sinks float32 (Hq,): a logit a query head that joins the softmax's denominator and has no
    value (gpt-oss, arXiv 2508.10925). plan: of `plan_paged_attention`, to share one among the layers of a
    step, one call after another on one stream; the call then runs on the backend of the plan. out: where the
    result goes, (B * q_len, Hq, D) of the dtype of q, contiguous, and sharing no memory with the inputs.

    follows_write: a promise that the launch directly in front of this one on the stream is the
    `write_kv_cache` of these q_len new tokens, and that it writes nothing else that this call reads, q apart:
    neither older positions nor block_table, seq_lens or plan. A kernel may then read all that while the write
    still runs; without a plan, and in traced code, it does not. A promise that does not hold is not noticed,
    and gives old values for new ones.

    Returns out; with lse=True also float32 (B * q_len, Hq), the natural logarithm of the softmax's
    denominator, the sink included, by which partial results merge. A token without positions (a request of
    length 0) gets zeros and -inf, or the sink. Sums are float32. With a 16-bit dtype the softmax's weights
    may be rounded to it before they multiply V, though not in the denominator. Lengths are read on the
    device; that they fit the block table, and that the blocks of their tokens are in the cache, is the
    caller's contract: else ValueError or IndexError on the CPU, undefined on a GPU, and CacheIndexError with
    ``QSUN_CHECK=1`` (`checked_mode`). With q_len above 1 a value that is not finite at one new token may
    reach the other new tokens of its request.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    if not isinstance(follows_write, bool):
        raise TypeError(f"follows_write is {follows_write!r}, expected True or False")
    q_len, kv_scales = _check(
        *(q, k_cache, v_cache, block_table, seq_lens, softmax_scale, window, softcap, sinks),
        *(k_scale, v_scale, out),
    )
    traced = is_traced(q, k_cache, v_cache, block_table, seq_lens, sinks, k_scale, v_scale, out)
    planned: tuple[Tensor, ...] | None = None
    if plan is not None:
        # Traced code asks the context when it runs, not when it is traced.
        named = backend if traced else requested_backend(backend)
        check_plan(plan, q, k_cache, kv_scales, seq_lens.shape[0], q_len, window, named)
        planned, backend = plan.tensors, plan.backend or backend
    if traced:
        result, log_sum = cast(
            "tuple[Tensor, Tensor]",
            torch.ops.qsun.paged_attention_decode(
                q,
                k_cache,
                v_cache,
                block_table,
                seq_lens,
                softmax_scale,
                window,
                softcap,
                sinks,
                None if planned is None else list(planned),
                k_scale,
                v_scale,
                backend=backend,
            ),
        )
        if out is not None:
            result = out.copy_(result)
    else:
        result, log_sum = _launch(
            q,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            softmax_scale,
            window,
            softcap,
            sinks,
            out,
            planned,
            k_scale,
            v_scale,
            follows_write,
            backend,
        )
    return (result, log_sum) if lse else result


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor | None,
) -> tuple[int, KvScales]:
    """Raise for what no backend takes; else the number of query tokens a request and the kind of scales."""
    checks.floating("q", q)
    checks.heads("q", q, "(B * q_len, Hq, D)")
    check_cache(k_cache, v_cache, q.device)
    _, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if cache_head_dim(k_cache) != head_dim:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)} and dtype {k_cache.dtype}, expected a head_dim of "
            f"{head_dim} as q has"
        )
    kv_scales = check_scales(k_cache, k_scale, v_scale)
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, expected a multiple of the {num_kv_heads} heads of k_cache"
        )
    checks.index("block_table", block_table, torch.int32, q.device)
    checks.rank("block_table", block_table, 2, "(B, max_blocks)")
    checks.index("seq_lens", seq_lens, torch.int32, q.device)
    checks.shape("seq_lens", seq_lens, (block_table.shape[0],), "one for each row of block_table, (B,)")
    q_len = _query_tokens(q, block_table.shape[0])
    if not (isinstance(softmax_scale, float | int) and math.isfinite(softmax_scale)):
        raise ValueError(f"softmax_scale is {softmax_scale!r}, expected a finite number")
    if window is not None:
        checks.positive("window", window)
    if softcap is not None and not (
        isinstance(softcap, float | int) and math.isfinite(softcap) and softcap > 0
    ):
        raise ValueError(f"softcap is {softcap!r}, expected None or a finite number above 0")
    if sinks is not None:
        checks.beside("sinks", sinks, torch.float32, q.device, "a logit a query head, on the device of q")
        checks.shape("sinks", sinks, (num_q_heads,), "(Hq,)")
        checks.contiguous("sinks", sinks)
    if out is not None:
        checks.beside("out", out, q.dtype, q.device, "like q")
        checks.shape("out", out, tuple(q.shape), "(B * q_len, Hq, D)")
        checks.contiguous("out", out)
        if out is q:
            raise ValueError("out is q, expected memory of its own")
    refuse_gradient(
        "paged_attention_decode",
        **{"q": q, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks},
        **{"k_scale": k_scale, "v_scale": v_scale, "out": out},
    )
    return q_len, kv_scales


def _query_tokens(q: Tensor, batch: int) -> int:
    """q_len; ValueError where the rows of q are no such number of tokens for each request."""
    rows = q.shape[0]
    if rows == batch:
        return 1
    q_len = rows // batch if batch else 0
    if q_len * batch != rows or not 1 <= q_len <= MAX_Q_LEN:
        raise ValueError(
            f"q has {rows} rows, expected q_len * B with 1 <= q_len <= {MAX_Q_LEN} and B = {batch}, "
            "the rows of block_table"
        )
    return q_len


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor | None,
    plan: tuple[Tensor, ...] | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    follows_write: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    if checked_mode.ENABLED:
        checked_mode.check_attended(block_table, seq_lens, num_blocks, block_size)
    run = launcher(
        requested_backend(backend),
        PagedAttentionDecodeProblem,
        q.shape[1],
        num_kv_heads,
        q.shape[2],
        block_size,
        window,
        q.dtype,
        k_cache.dtype,
        q.device,
        kind_of(k_scale),
    )
    both = run(
        *(q, k_cache, v_cache, block_table, seq_lens, softmax_scale, window, softcap, sinks, out, plan),
        *(k_scale, v_scale, follows_write),
    )
    return cast("tuple[Tensor, Tensor]", both)


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: list[Tensor] | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    planned = None if plan is None else tuple(plan)
    return _launch(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        softmax_scale,
        window,
        softcap,
        sinks,
        None,
        planned,
        k_scale,
        v_scale,
        False,
        backend,
    )


def _fake(q: Tensor, *others: object, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


register(
    "paged_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "float softmax_scale, int? window, float? softcap=None, Tensor? sinks=None, Tensor[]? plan=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, *, str? backend=None) -> (Tensor, Tensor)",
    _run,
    _fake,
)
