"""The decoder stack: all between embedding and lm_head, for prefill chunks and decode batches alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from qsun.core import DecodeAttention, ForwardContext, PrefillAttention
from qsun.kv_cache.tensors import KVCache, LayerKV
from qsun.layers.attention import Attention
from qsun.layers.linear import Linear, Normed, whole
from qsun.layers.mlp import GatedMLP
from qsun.layers.norm import RMSNorm
from qsun.layers.prefill_attention import plan_prefill_attention
from qsun.layers.residual import end_block
from qsun.models.config import ModelConfig
from qsun_kernels import plan_paged_attention


class DecoderLayer:
    """Attention and feed-forward, each behind a norm (pre-norm residual layer)."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self,
        normed: Normed,
        stream: Tensor,
        ctx: ForwardContext,
        kv: LayerKV,
        cos_sin: Tensor,
        next_norm: RMSNorm,
        next_reader: Linear | None = None,
    ) -> tuple[Normed, Tensor]:
        """normed (T, H) is the residual stream (T, H) after this layer's `attention_norm`.

        Returns the same two for the next layer, whose norm is `next_norm`: a block's last product, its
        addition to the stream and the norm that follows are one operation. next_reader: the one layer that
        reads that norm, to which a part of it may be left; None to have all of it.
        """
        attended = self.attention.attended(normed, ctx, kv, cos_sin)
        normed, stream = end_block(self.attention.o, attended, stream, self.mlp_norm, self.mlp.gate_up)
        return end_block(self.mlp.down, self.mlp.gated(normed), stream, next_norm, next_reader)


class DecoderStack:
    """All layers and the final norm of one module.

    Nothing here reads a tensor's value on the host, and for a decode batch no shape depends on lengths, so a
    decode step can be captured in a CUDA graph.

    cos_sin: float32 (max_positions, head_dim), the rotary table; modules of one shape can share it.
    """

    __slots__ = ("config", "cos_sin", "layers", "norm")

    def __init__(
        self, config: ModelConfig, layers: Sequence[DecoderLayer], norm: RMSNorm, cos_sin: Tensor
    ) -> None:
        if len(layers) != config.num_layers:
            raise ValueError(f"layers has {len(layers)} entries, expected {config.num_layers}")
        self.config = config
        self.layers = tuple(layers)
        self.norm = norm
        self.cos_sin = cos_sin

    def forward(self, hidden: Tensor, ctx: ForwardContext, kv_cache: KVCache) -> Tensor:
        """hidden (T, H) of embedded tokens -> (T, H) after the final norm; T may be 0.

        Writes the keys and values of the T tokens to `kv_cache` at ctx.slot_mapping in every layer.
        """
        normed, _ = self._through(self.layers, hidden, self._with_plans(ctx, hidden, kv_cache), kv_cache)
        return whole(normed)

    __call__ = forward

    def write_kv(self, hidden: Tensor, ctx: ForwardContext, kv_cache: KVCache) -> None:
        """What `forward` writes, without what only its result needs: the last layer ends with its write."""
        *layers, last = self.layers
        ctx = self._with_plans(ctx, hidden, kv_cache)
        normed, ctx = self._through(layers, hidden, ctx, kv_cache)
        last.attention.write_kv(normed, ctx, kv_cache.layer(len(layers)), self.cos_sin)

    def _through(
        self, layers: Sequence[DecoderLayer], hidden: Tensor, ctx: ForwardContext, kv_cache: KVCache
    ) -> tuple[Normed, ForwardContext]:
        """The input of what follows the first `layers`, and the context for it."""
        norms = [layer.attention_norm for layer in self.layers] + [self.norm]
        readers = [layer.attention.qkv for layer in self.layers[1:]] + [None]
        normed: Normed = norms[0](hidden)
        stream = hidden
        for index, layer in enumerate(layers):
            kv = kv_cache.layer(index)
            normed, stream = layer(normed, stream, ctx, kv, self.cos_sin, norms[index + 1], readers[index])
            if not ctx.settled:
                ctx = replace(ctx, settled=True)
        return normed, ctx

    def _with_plans(self, ctx: ForwardContext, hidden: Tensor, kv_cache: KVCache) -> ForwardContext:
        if isinstance(ctx.attention, DecodeAttention):
            return replace(ctx, attention=self._planned(ctx.attention, hidden, kv_cache))
        if ctx.attention.chunks:
            return replace(ctx, attention=self._prefill_planned(ctx.attention, hidden, kv_cache))
        return ctx

    def _planned(self, attention: DecodeAttention, hidden: Tensor, kv_cache: KVCache) -> DecodeAttention:
        """With a plan for each window that layers have: lengths and blocks are the same in every layer."""
        config = self.config
        plans = {
            window: plan_paged_attention(
                attention.seq_lens,
                num_q_heads=config.num_q_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=kv_cache.block_size,
                dtype=hidden.dtype,
                kv_dtype=kv_cache.dtype,
                window=window,
                block_table=attention.block_table if attention.shares_prefixes else None,
            )
            for window in dict.fromkeys(config.windows)
        }
        return replace(attention, plans=plans)

    def _prefill_planned(
        self, attention: PrefillAttention, hidden: Tensor, kv_cache: KVCache
    ) -> PrefillAttention:
        """The same for prompt chunks: what is gathered, in how many parts, and who sees whom."""
        config = self.config
        plans = {
            window: plan_prefill_attention(
                attention,
                num_q_heads=config.num_q_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=kv_cache.block_size,
                window=window,
                dtype=hidden.dtype,
                device=hidden.device,
            )
            for window in dict.fromkeys(config.windows)
        }
        return replace(attention, plans=plans)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all layers and norms, the rotary table not included."""
        return self.norm.weight.nbytes + sum(_layer_bytes(layer) for layer in self.layers)


def _layer_bytes(layer: DecoderLayer) -> int:
    attention, mlp = layer.attention, layer.mlp
    linears = (attention.qkv, attention.o, mlp.gate_up, mlp.down)
    norms = (layer.attention_norm, layer.mlp_norm, attention.q_norm, attention.k_norm)
    return sum(linear.nbytes for linear in linears) + sum(
        norm.weight.nbytes for norm in norms if norm is not None
    )
