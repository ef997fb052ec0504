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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((num_requests, num_q_heads), -torch.inf, dtype=torch.float32, device=q.device)
    capacity = block_table.shape[1] * block_size
    if capacity == 0 or num_requests == 0:
        return out, lse
    queries = q.float().view(num_requests, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    attend = _attend_by_host if q.device.type == "cpu" else _attend_by_device
    attend(queries, k_cache, v_cache, block_table, seq_lens, softmax_scale, window, out, lse)
    return out, lse


def _attend_by_host(
    queries: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Read the lengths, and gather for each request exactly the tokens that it attends to."""
    block_size = k_cache.shape[2]
    for request, (start, stop) in enumerate(_host_spans(seq_lens, window, block_table.shape[1] * block_size)):
        if start == stop:
            continue
        first = start // block_size
        blocks = block_table[request, first : -(-stop // block_size)]
        span = slice(start - first * block_size, stop - first * block_size)
        keys, values = _gather(k_cache, blocks)[:, span], _gather(v_cache, blocks)[:, span]
        scores = (queries[request] @ keys.transpose(1, 2)).mul_(softmax_scale)
        out[request], lse[request] = _softmax(scores, values)


def _attend_by_device(
    queries: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Leave the lengths where they are: gather whole rows of the table, mask what a request cannot see."""
    block_size = k_cache.shape[2]
    positions = torch.arange(block_table.shape[1] * block_size, device=out.device)
    for request in range(out.shape[0]):
        length = seq_lens[request]
        visible = positions < length
        if window is not None:
            visible &= positions >= length - window
        # Block ids past the length mean nothing, so they are not followed.
        blocks = block_table[request].where(positions[::block_size] < length, 0)
        scores = (queries[request] @ _gather(k_cache, blocks).transpose(1, 2)).mul_(softmax_scale)
        # Unwritten slots may hold NaN, and 0 * NaN would reach the sum.
        values = _gather(v_cache, blocks).masked_fill_(~visible[:, None], 0.0)
        out[request], lse[request] = _softmax(scores.masked_fill_(~visible, -torch.inf), values)


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted values (Hq, D) and logarithms of the denominators (Hq,).

    scores (Hkv, Hq / Hkv, L), -inf where nothing is to be seen; values (Hkv, L, D), both float32.
    """
    largest = scores.amax(-1, keepdim=True)
    # With nothing to see the largest score is -inf, and -inf - -inf is no weight.
    weights = torch.exp(scores - largest.where(largest != -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    out = (weights @ values) / total.where(total != 0, 1.0)
    return out.flatten(0, 1), (largest + total.log()).flatten()


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
    """The tokens of some blocks in order, float32 (Hkv, len(blocks) * block_size, D), a copy."""
    tokens = cache.index_select(0, blocks).transpose(0, 1)
    return tokens.reshape(cache.shape[1], -1, cache.shape[3]).float()


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
