"""Self-attention over the paged cache: one code path up to the cache, then chunks or a decode batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsun.core import DecodeAttention, ForwardContext, PrefillChunk
from qsun.kv_cache.tensors import LayerKV
from qsun.layers.linear import Linear
from qsun.layers.norm import RMSNorm
from qsun_kernels import paged_attention_decode, write_kv_cache
from qsun_kernels.backends.reference.kv_codes import dequantize_kv

# Without cuDNN's, which torch prefers on some GPUs: it compiles a plan for every pair of lengths that it has
# not seen, and prompts have any length.
_PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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

    def __call__(self, x: Tensor, ctx: ForwardContext, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """x (T, H) -> (T, H), through `attended` and `o`."""
        return self.o(self.attended(x, ctx, kv, cos_sin))

    def attended(self, x: Tensor, ctx: ForwardContext, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """The heads' outputs side by side, the input of `o`: x (T, H) -> (T, num_q_heads * head_dim).

        Writes the keys and values of these T tokens to the cache on the way.  kv: this layer's cache.
        cos_sin: float32 (max_positions, head_dim).
        """
        q, k, v = self._heads(self.qkv(x))
        # Where the cache holds rotated keys, q comes back rotated as well.
        q = write_kv_cache(
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
            out = torch.empty_like(q)
            for chunk in ctx.attention.chunks:
                rows = slice(chunk.start, chunk.start + chunk.length)
                out[rows] = self._attend_chunk(q[rows], kv, chunk)
        return out.view(x.shape[0], self.num_q_heads * self.head_dim)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (T, heads, head_dim) of the queries, keys and values in qkv (T, N)."""
        sizes = [self.num_q_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv.view(qkv.shape[0], sum(sizes), self.head_dim).split(sizes, dim=1)
        return q, k, v

    def _attend_chunk(self, q: Tensor, kv: LayerKV, chunk: PrefillChunk) -> Tensor:
        """Causal attention of a chunk (length, num_q_heads, head_dim) to its sequence's cached tokens.

        The chunk's own tokens, too, are read from the cache: what becomes of a token does not depend on how
        its prompt was cut into chunks, not even where the cache rounds to codes.
        """
        length, total = chunk.length, chunk.context_len + chunk.length
        # The earliest position that the chunk's first token can see; blocks before it are not even read.
        first = 0 if self.window is None else max(0, chunk.context_len - self.window + 1)
        k = self._gather(kv.k, kv.k_scale, chunk.block_ids, first, total).to(q.dtype)
        v = self._gather(kv.v, kv.v_scale, chunk.block_ids, first, total).to(q.dtype)
        # The query heads of a group share keys and values: as further query rows they need no copy of them.
        group = self.num_q_heads // self.num_kv_heads
        grouped = q.view(length, self.num_kv_heads, group, self.head_dim).permute(1, 2, 0, 3)
        with sdpa_kernel(_PREFILL_BACKENDS):
            out = functional.scaled_dot_product_attention(
                grouped.reshape(1, self.num_kv_heads, group * length, self.head_dim),
                k,
                v,
                attn_mask=self._mask(chunk, first, q.device).repeat(group, 1),
                scale=self.softmax_scale,
            )
        out = out.view(self.num_kv_heads, group, length, self.head_dim).permute(2, 0, 1, 3)
        return out.reshape(length, self.num_q_heads, self.head_dim)

    def _gather(
        self, cache: Tensor, scale: Tensor | None, block_ids: Tensor, first: int, total: int
    ) -> Tensor:
        """Tokens first..total-1 of a sequence, (1, num_kv_heads, total - first, head_dim).

        Slots past `total` may hold anything, not-a-number included, so they are cut off rather than masked.
        """
        block_size = cache.shape[2]
        skipped = first // block_size
        ids = block_ids[skipped : -(-total // block_size)]
        if scale is None:
            blocks = cache[ids]
        else:
            # torch moves bytes about where it does not move float8.
            codes = cache.view(torch.uint8)[ids].view(cache.dtype)
            blocks = dequantize_kv(codes, scale[ids])
        tokens = blocks.transpose(0, 1).reshape(1, self.num_kv_heads, -1, self.head_dim)
        return tokens[:, :, first - skipped * block_size : total - skipped * block_size]

    def _mask(self, chunk: PrefillChunk, first: int, device: torch.device) -> Tensor:
        """Who sees whom: bool (length, total - first), row i being position context_len + i."""
        total = chunk.context_len + chunk.length
        queries = torch.arange(chunk.context_len, total, device=device)[:, None]
        keys = torch.arange(first, total, device=device)[None, :]
        visible = keys <= queries
        return visible if self.window is None else visible & (keys > queries - self.window)
