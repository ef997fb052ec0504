"""Self-attention over the paged cache: one code path up to the cache, then chunks or a decode batch."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun.core import DecodeAttention, ForwardContext, PrefillAttention
from qsun.kv_cache.tensors import LayerKV
from qsun.layers.linear import Linear, Normed, QuantLinear
from qsun.layers.norm import RMSNorm
from qsun.layers.prefill_attention import attend_chunks, plan_prefill_attention
from qsun_kernels import PendingSums, paged_attention_decode, write_kv_cache


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
        if (q_norm is None) != (k_norm is None):
            raise ValueError("q_norm and k_norm: one is given, expected both or neither")
        if q_norm is not None and k_norm is not None and q_norm.eps != k_norm.eps:
            raise ValueError(f"k_norm has an eps of {k_norm.eps}, expected {q_norm.eps} as q_norm has")
        self.qkv = qkv
        self.o = o
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.softmax_scale = head_dim**-0.5
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.window = window

    def __call__(self, x: Normed, ctx: ForwardContext, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """x (T, H) -> (T, H), through `attended` and `o`."""
        return self.o(self.attended(x, ctx, kv, cos_sin))

    def attended(self, x: Normed, ctx: ForwardContext, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """The heads' outputs side by side, the input of `o`: x (T, H) -> (T, num_q_heads * head_dim).

        Writes the keys and values of these T tokens to the cache on the way.  kv: this layer's cache.
        cos_sin: float32 (max_positions, head_dim).
        """
        q = self.write_kv(x, ctx, kv, cos_sin)
        if isinstance(ctx.attention, DecodeAttention):
            out = paged_attention_decode(
                q,
                kv.k,
                kv.v,
                ctx.attention.block_table,
                ctx.attention.seq_lens,
                softmax_scale=self.softmax_scale,
                window=self.window,
                k_scale=kv.k_scale,
                v_scale=kv.v_scale,
                plan=ctx.attention.plans.get(self.window),
                # The write in front is of these very tokens; a step's plan, tables and lengths are older.
                follows_write=True,
            )
        else:
            out = self._attend_chunks(q, kv, ctx.attention)
        return out.view(q.shape[0], self.num_q_heads * self.head_dim)

    def write_kv(self, x: Normed, ctx: ForwardContext, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """Write the keys and values of x (T, H) to the cache; gives the queries (T, num_q_heads, head_dim).

        Queries are as attention takes them: where the cache holds rotated keys, they are rotated as well. The
        write adds up what a low-bit product splits along its columns, which spares a launch.
        """
        sums = self.qkv.leave_sums(x) if isinstance(self.qkv, QuantLinear) else None
        q, k, v = self._heads(self.qkv(x) if sums is None else sums)
        return write_kv_cache(
            k,
            v,
            kv.k,
            kv.v,
            ctx.slot_mapping,
            q=q,
            positions=ctx.positions,
            cos_sin=cos_sin,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
            rotate=kv.rotates,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            settled=ctx.settled,
        )

    def _heads(
        self, qkv: Tensor | PendingSums
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[PendingSums, PendingSums, PendingSums]:
        """Views (T, heads, head_dim) of the queries, keys and values in qkv (T, N)."""
        sizes = [self.num_q_heads, self.num_kv_heads, self.num_kv_heads]
        if isinstance(qkv, PendingSums):
            sums_q, sums_k, sums_v = qkv.heads(sizes, self.head_dim)
            return sums_q, sums_k, sums_v
        q, k, v = qkv.view(qkv.shape[0], sum(sizes), self.head_dim).split(sizes, dim=1)
        return q, k, v

    def _attend_chunks(self, q: Tensor, kv: LayerKV, attention: PrefillAttention) -> Tensor:
        """Of all chunks' tokens, (T, num_q_heads, head_dim); without a plan, one is made for this call."""
        if not attention.chunks:
            return torch.empty_like(q)
        plans = attention.plans.get(self.window)
        if plans is None:
            plans = plan_prefill_attention(
                attention,
                num_q_heads=self.num_q_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                block_size=kv.k.shape[2],
                window=self.window,
                dtype=q.dtype,
                device=q.device,
            )
        return attend_chunks(q, kv, plans, softmax_scale=self.softmax_scale)
