"""paged_attention_decode: one new token a request against its cached keys and values."""

from __future__ import annotations

import math
from typing import Literal, cast, overload

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import BackendName, PagedAttentionDecodeProblem
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register
from qsun_kernels.ops.write_kv_cache import check_cache

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
    lse: Literal[False] = False,
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
    lse: Literal[True],
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
    lse: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softmax_scale * q K^T) V`` for one query token a request, with K and V in blocks of the
    cache.

    q (B, Hq, D) float32, float16 or bfloat16; the heads of a request lie side by side, the request stride is
    free. k_cache, v_cache (num_blocks, Hkv, block_size, D) contiguous, Hq a multiple of Hkv (query heads of a
    group follow one another). block_table int32 (B, max_blocks): the blocks of each request in order; entries
    past its length are never followed. seq_lens int32 (B,): cached tokens to attend to, the current one
    included. window: attend to the last `window` of them only.

    Returns out (B, Hq, D) of the dtype of q; with lse=True also float32 (B, Hq), the natural logarithm of
    the softmax's denominator, by which partial results merge. A request of length 0 gets zeros and -inf.
    Arithmetic is at least as precise as float32 accumulation over products of the stored values. Lengths are
    read on the device; one above max_blocks * block_size is a ValueError on the CPU and undefined on a GPU.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    _check(q, k_cache, v_cache, block_table, seq_lens, softmax_scale, window)
    if is_traced(q, k_cache, v_cache, block_table, seq_lens):
        both = cast(
            "tuple[Tensor, Tensor]",
            torch.ops.qsun.paged_attention_decode(
                q, k_cache, v_cache, block_table, seq_lens, softmax_scale, window, backend=backend
            ),
        )
    else:
        both = _launch(q, k_cache, v_cache, block_table, seq_lens, softmax_scale, window, backend=backend)
    return both if lse else both[0]


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
) -> None:
    checks.floating("q", q)
    checks.heads("q", q, "(B, Hq, D)")
    check_cache(k_cache, v_cache, q.device)
    B, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)}, expected a head_dim of {head_dim} as q has"
        )
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, expected a multiple of the {num_kv_heads} heads of k_cache"
        )
    checks.index("block_table", block_table, torch.int32, q.device)
    checks.rank("block_table", block_table, 2, "(B, max_blocks)")
    checks.shape("block_table", block_table, (B, block_table.shape[1]), "(B, max_blocks)")
    checks.index("seq_lens", seq_lens, torch.int32, q.device)
    checks.shape("seq_lens", seq_lens, (B,), "(B,)")
    if not (isinstance(softmax_scale, float | int) and math.isfinite(softmax_scale)):
        raise ValueError(f"softmax_scale is {softmax_scale!r}, expected a finite number")
    if window is not None:
        checks.positive("window", window)
    refuse_gradient("paged_attention_decode", q=q, k_cache=k_cache, v_cache=v_cache)


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    run = launcher(
        requested_backend(backend),
        PagedAttentionDecodeProblem,
        q.shape[1],
        num_kv_heads,
        head_dim,
        block_size,
        window,
        q.dtype,
        k_cache.dtype,
        q.device,
    )
    return cast(
        "tuple[Tensor, Tensor]", run(q, k_cache, v_cache, block_table, seq_lens, softmax_scale, window)
    )


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


register(
    "paged_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "float softmax_scale, int? window, *, str? backend=None) -> (Tensor, Tensor)",
    _launch,
    _fake,
)
