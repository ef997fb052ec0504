"""Self-attention over the paged cache: one code path up to the cache, then chunks or a decode batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qsun.core import DecodeAttention, ForwardContext, PrefillChunk
from qsun.layers.linear import Linear
from qsun.layers.norm import RMSNorm
from qsun_kernels import apply_rope, paged_attention_decode, write_kv_cache


class Attention:
    """Grouped-query attention with rotary positions, optional normalised queries and keys, optional window.

    qkv: queries above keys above values as one matrix ((num_q_heads + 2 num_kv_heads) * head_dim, H).
    o: (H, num_q_heads * head_dim).  q_norm, k_norm: over head_dim, both or neither (Qwen3).
    window: a token attends to the last `window` positions, itself included; None is all of them.
    """

    __slots__ = (
        "head_dim",
        "k_norm",
        "num_kv_heads",
        "num_q_heads",
        "o",
        "q_norm",
        "qkv",
        "softmax_scale",
        "window",
    )

    def __init__(
        self,
        qkv: Linear,
        o: Linear,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        window: int | None = None,
    ) -> None:
        self.qkv = qkv
        self.o = o
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.softmax_scale = head_dim**-0.5
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.window = window

    def __call__(
        self,
        x: Tensor,
        ctx: ForwardContext,
        kv: tuple[Tensor, Tensor],
        cos_sin: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x (T, H) -> (T, H); writes the keys and values of these T tokens to the cache on the way.

        kv: this layer's (k_cache, v_cache).  cos_sin: float32 (max_positions, head_dim).  residual: (T, H),
        added to the output when given.
        """
        q, k, v = self._heads(self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, k, ctx.positions, cos_sin)
        k_cache, v_cache = kv
        write_kv_cache(k, v, k_cache, v_cache, ctx.slot_mapping)
        if isinstance(ctx.attention, DecodeAttention):
            out = paged_attention_decode(
                q,
                k_cache,
                v_cache,
                ctx.attention.block_table,
                ctx.attention.seq_lens,
                softmax_scale=self.softmax_scale,
                window=self.window,
                plan=ctx.attention.plans.get(self.window),
            )
        else:
            out = torch.empty_like(q)
            for chunk in ctx.attention.chunks:
                rows = slice(chunk.start, chunk.start + chunk.length)
                out[rows] = self._attend_chunk(q[rows], k_cache, v_cache, chunk)
        return self.o(out.view(x.shape[0], self.num_q_heads * self.head_dim), residual)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (T, heads, head_dim) of the queries, keys and values in qkv (T, N)."""
        sizes = [self.num_q_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv.view(qkv.shape[0], sum(sizes), self.head_dim).split(sizes, dim=1)
        return q, k, v

    def _attend_chunk(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: PrefillChunk) -> Tensor:
        """Causal attention of a chunk (length, num_q_heads, head_dim) to its sequence's cached tokens."""
        length, total = chunk.length, chunk.context_len + chunk.length
        # The earliest position that the chunk's first token can see; blocks before it are not even read.
        first = 0 if self.window is None else max(0, chunk.context_len - self.window + 1)
        k = self._gather(k_cache, chunk.block_ids, first, total)
        v = self._gather(v_cache, chunk.block_ids, first, total)
        if k.dtype != q.dtype:
            k, v = k.to(q.dtype), v.to(q.dtype)
        # The query heads of a group share keys and values: as further query rows they need no copy of them.
        group = self.num_q_heads // self.num_kv_heads
        grouped = q.view(length, self.num_kv_heads, group, self.head_dim).permute(1, 2, 0, 3)
        out = functional.scaled_dot_product_attention(
            grouped.reshape(1, self.num_kv_heads, group * length, self.head_dim),
            k,
            v,
            attn_mask=self._mask(chunk, first, q.device).repeat(group, 1),
            scale=self.softmax_scale,
        )
        out = out.view(self.num_kv_heads, group, length, self.head_dim).permute(2, 0, 1, 3)
        return out.reshape(length, self.num_q_heads, self.head_dim)

    def _gather(self, cache: Tensor, block_ids: Tensor, first: int, total: int) -> Tensor:
        """Tokens first..total-1 of a sequence, (1, num_kv_heads, total - first, head_dim).

        Slots past `total` may hold anything, not-a-number included, so they are cut off rather than masked.
        """
        block_size = cache.shape[2]
        skipped = first // block_size
        blocks = cache[block_ids[skipped : -(-total // block_size)]]
        tokens = blocks.transpose(0, 1).reshape(1, self.num_kv_heads, -1, self.head_dim)
        return tokens[:, :, first - skipped * block_size : total - skipped * block_size]

    def _mask(self, chunk: PrefillChunk, first: int, device: torch.device) -> Tensor:
        """Who sees whom: bool (length, total - first), row i being position context_len + i."""
        total = chunk.context_len + chunk.length
        queries = torch.arange(chunk.context_len, total, device=device)[:, None]
        keys = torch.arange(first, total, device=device)[None, :]
        visible = keys <= queries
        return visible if self.window is None else visible & (keys > queries - self.window)
