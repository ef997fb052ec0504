"""The calibration set's way through a decoder: what each layer reads, one layer at a time.

The calibration tokens go through the layers in 16 bits, as prompts do through a prefill module: what a layer
reads is what the unquantised model makes, not what the layers quantised so far make of it.  Under SUN the
keys and values of the prompt come from 16-bit prefill modules, so this is closer to what the decode module
will see, and an early layer's error does not steer the search in a later one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qsun.core import ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.tensors import KVCache
from qsun.layers.linear import Linear, Normed, whole
from qsun.layers.mlp import GateUpSilu
from qsun.layers.norm import RMSNorm
from qsun.models.build import Placement, build_layer
from qsun.models.config import ModelConfig
from qsun.models.weights import LayerWeights
from qsun_kernels import rope_cache

BLOCK_SIZE = 16


class Collector(Protocol):
    """What takes in the rows that a linear layer reads."""

    def update(self, x: Tensor) -> None:
        """x: float (..., K)."""


def input_widths(config: ModelConfig) -> dict[str, int]:
    """Input features of each group of linear layers that read the same, by the group's name."""
    return {
        "attention_input": config.hidden_size,
        "attention_output": config.q_size,
        "mlp_input": config.hidden_size,
        "mlp_output": config.intermediate_size,
    }


class _Observed:
    """A linear layer that shows its inputs to a collector."""

    def __init__(self, linear: Linear, collector: Collector) -> None:
        self.linear = linear
        self.collector = collector

    @property
    def N(self) -> int:
        return self.linear.N

    @property
    def K(self) -> int:
        return self.linear.K

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, x: Normed) -> Tensor:
        self.collector.update(whole(x))
        return self.linear(x)

    def end_block(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        self.collector.update(x)
        return self.linear.end_block(x, stream, norm)


class CalibrationRun:
    """Carries the calibration set's activations from layer to layer.

    sequences: token ids, each sequence attending to itself.  embed_tokens: (V, H) in placement.dtype, on
        the host or on placement.device.
    Memory: the hidden states of all tokens, and the activations and KV of one layer and one sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        sequences: Sequence[Sequence[int]],
        embed_tokens: Tensor,
    ) -> None:
        self._config = config
        self._placement = placement
        self._hidden = [
            functional.embedding(torch.tensor(sequence, device=embed_tokens.device), embed_tokens).to(
                placement.device
            )
            for sequence in sequences
        ]
        longest = max(len(sequence) for sequence in sequences)
        self._cos_sin = rope_cache(config.rope, config.head_dim, longest, placement.device)
        blocks = -(-longest // BLOCK_SIZE)
        shape = (1, 2, blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self._cache = KVCache(torch.zeros(shape, dtype=placement.dtype, device=placement.device))

    def advance(self, layer: int, weights: LayerWeights, collectors: Mapping[str, Collector]) -> None:
        """Take the activations through the next layer, and show what its projections read.

        Layers must come in order, in placement.dtype.  collectors: one of each group of `input_widths`.
        """
        device = self._placement.device
        dense = build_layer(weights, layer, self._config, self._placement)
        dense.attention.qkv = _Observed(dense.attention.qkv, collectors["attention_input"])
        dense.attention.o = _Observed(dense.attention.o, collectors["attention_output"])
        assert not isinstance(dense.mlp.gate_up, GateUpSilu), "weights to be quantised are dense"
        dense.mlp.gate_up = _Observed(dense.mlp.gate_up, collectors["mlp_input"])
        dense.mlp.down = _Observed(dense.mlp.down, collectors["mlp_output"])
        for index, hidden in enumerate(self._hidden):
            length = hidden.shape[0]
            # One sequence at a time, in blocks 0, 1, 2, ...: a token's slot is its position.
            positions = torch.arange(length, device=device)
            block_ids = torch.arange(-(-length // BLOCK_SIZE), device=device)
            chunk = PrefillChunk(start=0, length=length, context_len=0, block_ids=block_ids)
            ctx = ForwardContext(positions, positions, PrefillAttention((chunk,)))
            # The next layer has no place yet, so its norm is made there: any norm serves to end this one.
            _, self._hidden[index] = dense(
                dense.attention_norm(hidden),
                hidden,
                ctx,
                self._cache.layer(0),
                self._cos_sin,
                next_norm=dense.attention_norm,
            )
