"""paged_attention_decode in torch: request by request, float32 arithmetic, one rounding to the dtype of q."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsun_kernels.backends.problems import AttentionImplementation, PagedAttentionDecodeProblem
from qsun_kernels.backends.reference.dtypes import refuse_cache, refuse_dtypes
from qsun_kernels.backends.reference.kv_codes import dequantize_kv


def supports(problem: PagedAttentionDecodeProblem) -> str | None:
    """Every shape, group of heads, window and cache, on every device."""
    return refuse_dtypes(dtype=problem.dtype) or refuse_cache(problem.kv_dtype, problem.kv_scales)


def describe(problem: PagedAttentionDecodeProblem) -> str:
    """What runs."""
    if problem.device.type == "cpu":
        return "torch operations in float32, one request after another over its own length"
    return "torch operations in float32, one request after another over the whole block table"


def plan(
    problem: PagedAttentionDecodeProblem,
    seq_lens: Tensor,
    q_len: int,
    window: int | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Nothing: requests are taken one by one, whatever blocks they share."""
    return ()


@dataclass(frozen=True, slots=True)
class _Cache:
    """Keys or values in blocks, and their scales if they are codes."""

    blocks: Tensor
    scale: Tensor | None

    def tokens(self, blocks: Tensor) -> Tensor:
        """The tokens of some blocks in order, float32 (Hkv, len(blocks) * block_size, D), a copy."""
        scale = self.scale
        if scale is not None and scale.shape != (1,):
            scale = scale.index_select(0, blocks)
        if self.blocks.dtype == torch.float8_e4m3fn:
            # torch moves bytes about where it does not move float8.
            chosen = self.blocks.view(torch.uint8).index_select(0, blocks).view(torch.float8_e4m3fn)
        else:
            chosen = self.blocks.index_select(0, blocks)
        return dequantize_kv(chosen, scale).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What scores become before the softmax, and what joins it."""

    softmax_scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def softmax(
        self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, length: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Softmax-weighted values (q_len, Hq, D) and logarithms of the denominators (q_len, Hq), float32.

        queries (q_len, Hkv, group, D) at the positions up to `length`; keys, values (Hkv, L, D) at
        `positions` (L,). Values at positions that no query sees must be numbers, keys need not.
        """
        q_len, num_kv_heads, group, head_dim = queries.shape
        own = torch.arange(q_len, device=positions.device)[:, None] + (length - q_len)
        visible = (positions <= own) & (positions < length)
        if self.window is not None:
            visible &= positions > own - self.window
        # Query tokens and heads of a group are rows of one product: token j of head g is row j * group + g.
        rows = queries.transpose(0, 1).reshape(num_kv_heads, q_len * group, head_dim)
        scores = (rows @ keys.transpose(1, 2)).mul_(self.softmax_scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores.masked_fill_(~visible.repeat_interleave(group, 0), -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        sinks = None
        if self.sinks is not None:
            sinks = self.sinks.view(num_kv_heads, group).repeat(1, q_len)[..., None]
            largest = largest.maximum(sinks)
        # With nothing to see the largest score is -inf, and -inf - -inf is no weight.
        largest = largest.where(largest != -torch.inf, 0.0)
        weights = torch.exp(scores - largest)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total += torch.exp(sinks - largest)
        out = (weights @ values) / total.where(total != 0, 1.0)
        out = out.view(num_kv_heads, q_len, group, head_dim).transpose(0, 1)
        lse = (largest + total.log()).view(num_kv_heads, q_len, group).transpose(0, 1)
        return out.flatten(1, 2), lse.flatten(1, 2)


def run(
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
) -> tuple[Tensor, Tensor]:
    """Causal attention of each request's last tokens to its cached ones, and the logarithm of the softmax's
    denominator.

    q (B * q_len, Hq, D); caches (num_blocks, Hkv, block_size, D), or D / 2 for 4-bit codes; scales
    (num_blocks, Hkv, block_size), (1,) or None; block_table int32 (B, max_blocks); seq_lens int32 (B,); sinks
    float32 (Hq,); out as q or None. k and v are code * scale, rounded to float32, where there are scales.
    With s[t] = softmax_scale * q . k[t], capped to softcap * tanh(s[t] / softcap), over the positions t that
    a token sees:

        lse = log(sum_t exp(s[t]) + exp(sink)),    out = sum_t exp(s[t] - lse) v[t]

    Returns out (B * q_len, Hq, D) and lse float32 (B * q_len, Hq), natural logarithm; a token that sees
    nothing gets 0 and -inf, or its sinks.
    On the CPU a length outside 0..max_blocks * block_size raises ValueError, and a block id outside the cache
    IndexError. On a GPU the lengths stay on the device, so that the operations can be captured in a graph.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    num_requests, max_blocks = block_table.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    out.zero_()
    lse = torch.full((num_rows, num_q_heads), -torch.inf, dtype=torch.float32, device=q.device)
    if sinks is not None:
        lse.copy_(sinks.expand_as(lse))
    if max_blocks * block_size == 0 or num_rows == 0:
        return out, lse
    q_len = num_rows // num_requests
    queries = q.float().view(num_requests, q_len, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    attend = _attend_by_host if q.device.type == "cpu" else _attend_by_device
    attend(
        queries,
        _Cache(k_cache, k_scale),
        _Cache(v_cache, v_scale),
        block_table,
        seq_lens,
        _Scoring(softmax_scale, window, softcap, sinks),
        out.view(num_requests, q_len, num_q_heads, head_dim),
        lse.view(num_requests, q_len, num_q_heads),
    )
    return out, lse


def _attend_by_host(
    queries: Tensor,
    k_cache: _Cache,
    v_cache: _Cache,
    block_table: Tensor,
    seq_lens: Tensor,
    scoring: _Scoring,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Read the lengths, and gather for each request exactly the tokens that it attends to."""
    block_size, q_len = k_cache.blocks.shape[2], queries.shape[1]
    capacity = block_table.shape[1] * block_size
    for request, length in enumerate(_host_lengths(seq_lens, capacity)):
        if length == 0:
            continue
        start = 0 if scoring.window is None else max(0, length - q_len - scoring.window + 1)
        first = start // block_size
        blocks = block_table[request, first : -(-length // block_size)]
        span = slice(start - first * block_size, length - first * block_size)
        keys, values = k_cache.tokens(blocks)[:, span], v_cache.tokens(blocks)[:, span]
        positions = torch.arange(start, length)
        out[request], lse[request] = scoring.softmax(queries[request], keys, values, positions, length)


def _attend_by_device(
    queries: Tensor,
    k_cache: _Cache,
    v_cache: _Cache,
    block_table: Tensor,
    seq_lens: Tensor,
    scoring: _Scoring,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Leave the lengths where they are: gather whole rows of the table, mask what a request cannot see."""
    block_size, q_len = k_cache.blocks.shape[2], queries.shape[1]
    positions = torch.arange(block_table.shape[1] * block_size, device=out.device)
    for request in range(out.shape[0]):
        length = seq_lens[request]
        read = positions < length
        if scoring.window is not None:
            read &= positions > length - q_len - scoring.window
        # Block ids past the length mean nothing, so they are not followed.
        blocks = block_table[request].where(positions[::block_size] < length, 0)
        keys = k_cache.tokens(blocks)
        # Unwritten slots may hold NaN, and 0 * NaN would reach the sum.
        values = v_cache.tokens(blocks).masked_fill_(~read[:, None], 0.0)
        out[request], lse[request] = scoring.softmax(queries[request], keys, values, positions, length)


def _host_lengths(seq_lens: Tensor, capacity: int) -> list[int]:
    """The lengths; ValueError for one that a row of the block table cannot hold."""
    lengths: list[int] = seq_lens.tolist()
    for request, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"seq_lens[{request}] is {length}, "
                f"expected 0..{capacity} (the tokens that a row of block_table holds)"
            )
    return lengths


IMPLEMENTATION = AttentionImplementation(supports=supports, run=run, describe=describe, plan=plan)
