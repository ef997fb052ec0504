"""Activation-aware quantisation of a decoder, one layer at a time, on a calibration set.

The calibration tokens go through the layers in 16 bits, as prompts do through a prefill module: what a layer
reads is what the unquantised model makes, not what the layers quantised so far make of it.  Under SUN the
keys and values of the prompt come from 16-bit prefill modules, so this is closer to what the decode module
will see, and an early layer's error does not steer the search in a later one.

Which scales are searched, and why keys and values keep their meaning, is told in
qsun_kernels.quant.awq_search.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qsun.core import ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.tensors import KVCache
from qsun.layers.linear import Linear
from qsun.layers.mlp import GateUpSilu
from qsun.layers.norm import RMSNorm
from qsun.models.build import Placement, build_layer
from qsun.models.config import ModelConfig
from qsun.models.weights import (
    ATTENTION_NORM,
    MLP_NORM,
    PROJECTIONS,
    LayerWeights,
    Projection,
    projection_path,
)
from qsun_kernels import QuantSpec, rope_cache
from qsun_kernels.quant.awq_search import quantize_layer
from qsun_kernels.quant.calibration import InputStatistics

BLOCK_SIZE = 16


class _Observed:
    """A linear layer that shows its inputs to a collector of statistics."""

    def __init__(self, linear: Linear, statistics: InputStatistics) -> None:
        self.linear = linear
        self.statistics = statistics

    @property
    def N(self) -> int:
        return self.linear.N

    @property
    def K(self) -> int:
        return self.linear.K

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        self.statistics.update(x)
        return self.linear(x)

    def end_block(self, x: Tensor, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        self.statistics.update(x)
        return self.linear.end_block(x, stream, norm)


class AwqCalibration:
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

    def quantize(self, layer: int, weights: LayerWeights, spec: QuantSpec) -> LayerWeights:
        """Quantise the next layer; layers must come in order, with dense float32 weights.

        Returns packed projections with the norms (and the bias of up_proj) that belong to them.
        Raises ValueError for activations or weights that are not finite.
        """
        rounded = weights.cast(self._placement.dtype)
        statistics = self._run(layer, rounded)
        tensors = {ATTENTION_NORM: rounded.attention_norm, MLP_NORM: rounded.mlp_norm}
        for name, part in weights.projections.items():
            path = projection_path(name)
            assert isinstance(part.weight, Tensor)
            tensors[f"{path}.weight"] = part.weight
            bias = rounded.projections[name].bias
            if bias is not None:
                tensors[f"{path}.bias"] = bias
        on_device = {name: tensor.to(self._placement.device) for name, tensor in tensors.items()}
        result = quantize_layer(on_device, statistics, spec, scale_dtype=self._placement.dtype)
        current = {**on_device, **result.changed}
        return LayerWeights(
            attention_norm=current[ATTENTION_NORM],
            mlp_norm=current[MLP_NORM],
            projections={
                name: Projection(
                    result.packed[projection_path(name)], current.get(f"{projection_path(name)}.bias")
                )
                for name in PROJECTIONS
            },
            q_norm=rounded.q_norm,
            k_norm=rounded.k_norm,
        )

    def _run(self, layer: int, weights: LayerWeights) -> dict[str, InputStatistics]:
        """Take the activations through a layer, and gather what each group of its projections reads."""
        config, device = self._config, self._placement.device
        dense = build_layer(weights, layer, config, self._placement)
        widths = {
            "attention_input": config.hidden_size,
            "attention_output": config.q_size,
            "mlp_input": config.hidden_size,
            "mlp_output": config.intermediate_size,
        }
        statistics = {name: InputStatistics(K, seed=layer, device=device) for name, K in widths.items()}
        dense.attention.qkv = _Observed(dense.attention.qkv, statistics["attention_input"])
        dense.attention.o = _Observed(dense.attention.o, statistics["attention_output"])
        assert not isinstance(dense.mlp.gate_up, GateUpSilu), "weights to be quantised are dense"
        dense.mlp.gate_up = _Observed(dense.mlp.gate_up, statistics["mlp_input"])
        dense.mlp.down = _Observed(dense.mlp.down, statistics["mlp_output"])
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
        return statistics
