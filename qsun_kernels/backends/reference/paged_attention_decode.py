"""paged_attention_decode in torch: request by request, float32 arithmetic, one rounding to the dtype of q."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, PagedAttentionDecodeProblem
from qsun_kernels.backends.reference.dtypes import refuse_dtypes


def supports(problem: PagedAttentionDecodeProblem) -> str | None:
    """Every shape, group of heads and window, on every device."""
    return refuse_dtypes(dtype=problem.dtype, kv_dtype=problem.kv_dtype)


def describe(problem: PagedAttentionDecodeProblem) -> str:
    """What runs."""
    if problem.device.type == "cpu":
        return "torch operations in float32, one request after another over its own length"
    return "torch operations in float32, one request after another over the whole block table"


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """``softmax(softmax_scale * q K^T) V`` over the cached tokens of each request, and the logarithm of its
    denominator.

    q (B, Hq, D); caches (num_blocks, Hkv, block_size, D); block_table int32 (B, max_blocks); seq_lens int32
    (B,).
    Returns out (B, Hq, D) and lse float32 (B, Hq), natural logarithm; a request of length 0 gets 0 and -inf.
    On the CPU a length outside 0..max_blocks * block_size raises ValueError, and a block id outside the cache
    IndexError. On a GPU the lengths stay on the device, so that the operations can be captured in a graph.
    """
    num_requests, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    capacity = block_table.shape[1] * block_size
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((num_requests, num_q_heads), -torch.inf, dtype=torch.float32, device=q.device)
    spans = (
        _host_spans(seq_lens, window, capacity) if q.device.type == "cpu" else [(0, capacity)] * num_requests
    )
    queries = q.float().view(num_requests, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    for request, (start, stop) in enumerate(spans):
        first_block, last_block = start // block_size, -(-stop // block_size)
        if first_block == last_block:
            continue
        positions = torch.arange(first_block * block_size, last_block * block_size, device=q.device)
        length = seq_lens[request]
        visible = positions < length
        if window is not None:
            visible &= positions >= length - window
        blocks = block_table[request, first_block:last_block]
        # Block ids past the length mean nothing, so they are not followed.
        blocks = blocks.where(positions[::block_size] < length, 0)
        keys = _gather(k_cache, blocks)
        # Unwritten slots may hold NaN, and 0 * NaN would reach the sum.
        values = _gather(v_cache, blocks).masked_fill_(~visible[:, None], 0.0)
        scores = (queries[request] @ keys.transpose(1, 2)).mul_(softmax_scale)
        scores.masked_fill_(~visible, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        # With nothing to see the largest score is -inf, and -inf - -inf is no weight.
        weights = torch.exp(scores - largest.where(largest != -torch.inf, 0.0))
        total = weights.sum(-1, keepdim=True)
        attended = (weights @ values) / total.where(total != 0, 1.0)
        out[request] = attended.view(num_q_heads, head_dim)
        lse[request] = (largest + total.log()).view(num_q_heads)
    return out, lse


def _host_spans(seq_lens: Tensor, window: int | None, capacity: int) -> list[tuple[int, int]]:
    """The positions that each request attends to, as (first, one past the last)."""
    lengths: list[int] = seq_lens.tolist()
    for request, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"seq_lens[{request}] is {length}, "
                f"expected 0..{capacity} (the tokens that a row of block_table holds)"
            )
    return [(0 if window is None else max(0, length - window), length) for length in lengths]


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """The tokens of some blocks in order, float32 (Hkv, len(blocks) * block_size, D)."""
    tokens = cache.index_select(0, blocks).transpose(0, 1)
    return tokens.to(torch.float32, copy=True).reshape(cache.shape[1], -1, cache.shape[3])


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
