"""A decoder stack whose weights may be trained.

Projections of one input are one matrix, as in serving: queries above keys above values, gate above up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from qsun.models.config import ModelConfig
from qsun.models.weights import (
    ATTENTION_NORM,
    FINAL_NORM,
    K_NORM,
    MLP_NORM,
    Q_NORM,
    LayerWeights,
    ProjectionName,
    layer_prefix,
    projection_path,
    projection_shape,
)
from qsun.training.lora import LoraPairs
from qsun_kernels import PackedWeight, dequantize

Joint = str
"""The name of a joint matrix: one of JOINTS."""

JOINTS: dict[Joint, tuple[ProjectionName, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(slots=True)
class LayerTensors:
    """The tensors of one layer: matrices (N, K), biases (N,), norms."""

    attention_norm: Tensor
    mlp_norm: Tensor
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @classmethod
    def of(cls, weights: LayerWeights, dtype: torch.dtype, device: torch.device) -> LayerTensors:
        """Join a layer's weights in `dtype`; packed ones become the dense weights that they stand for."""

        def dense(weight: Tensor | PackedWeight) -> Tensor:
            if isinstance(weight, PackedWeight):
                # The operator knows the dtypes that serve; float64 is for checks of gradients.
                stored = torch.float32 if dtype == torch.float64 else dtype
                return dequantize(weight, stored).to(device=device, dtype=dtype)
            return weight.to(device=device, dtype=dtype)

        def vector(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        joined: dict[str, Tensor | None] = {}
        for joint, names in JOINTS.items():
            parts = [weights.projections[name] for name in names]
            matrices = [dense(part.weight) for part in parts]
            joined[joint] = torch.cat(matrices)
            biases = [
                part.bias if part.bias is not None else torch.zeros(matrix.shape[0])
                for part, matrix in zip(parts, matrices, strict=True)
            ]
            if any(part.bias is not None for part in parts):
                joined[f"{joint}_bias"] = torch.cat([vector(bias) for bias in biases])  # type: ignore[misc]
        return cls(
            attention_norm=vector(weights.attention_norm),  # type: ignore[arg-type]
            mlp_norm=vector(weights.mlp_norm),  # type: ignore[arg-type]
            q_norm=vector(weights.q_norm),
            k_norm=vector(weights.k_norm),
            **joined,  # type: ignore[arg-type]
        )

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that there are, by field."""
        for item in fields(self):
            tensor = getattr(self, item.name)
            if tensor is not None:
                yield item.name, tensor


class TrainingStack:
    """All layers and the final norm of one module, computed in `dtype` whatever its weights are kept in.

    layers: their tensors; those of a fully trained stack are float32 and have gradients.
    lora: pairs that are added to the projections, None without.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[LayerTensors],
        norm: Tensor,
        dtype: torch.dtype,
        lora: LoraPairs | None = None,
    ) -> None:
        self.config = config
        self.layers = layers
        self.norm = norm
        self.dtype = dtype
        self.lora = lora

    def require_grad(self) -> None:
        """Train every weight of the stack."""
        for _, tensor in self._tensors():
            tensor.requires_grad_(True)

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name: all weights, or the pairs of an adapter."""
        if self.lora is not None:
            return self.lora.parameters()
        return {name: tensor for name, tensor in self._tensors() if tensor.requires_grad}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, layer in enumerate(self.layers):
            for name, tensor in layer.named():
                yield f"layers.{number}.{name}", tensor
        yield "norm", self.norm

    def linear(self, layer: int, joint: Joint, x: Tensor) -> Tensor:
        """x (T, K) through a joint matrix, with the adapter's pairs on top."""
        tensors = self.layers[layer]
        bias = getattr(tensors, f"{joint}_bias")
        y = functional.linear(
            x, getattr(tensors, joint).to(self.dtype), None if bias is None else bias.to(self.dtype)
        )
        if self.lora is None:
            return y
        sizes = [projection_shape(self.config, name)[0] for name in JOINTS[joint]]
        added = self.lora.apply(layer, JOINTS[joint], sizes, x)
        return y if added is None else y + added

    def vector(self, tensor: Tensor) -> Tensor:
        """A norm weight in the dtype that it is served in."""
        return tensor.to(self.dtype)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, adapters merged in float32 as the engine merges them."""
        for number, layer in enumerate(self.layers):
            prefix = layer_prefix(number)
            yield prefix + ATTENTION_NORM, layer.attention_norm
            yield prefix + MLP_NORM, layer.mlp_norm
            if layer.q_norm is not None and layer.k_norm is not None:
                yield prefix + Q_NORM, layer.q_norm
                yield prefix + K_NORM, layer.k_norm
            for joint, names in JOINTS.items():
                sizes = [projection_shape(self.config, name)[0] for name in names]
                bias = getattr(layer, f"{joint}_bias")
                biases = [None] * len(names) if bias is None else bias.split(sizes)
                for name, part, one in zip(names, getattr(layer, joint).split(sizes), biases, strict=True):
                    path = prefix + projection_path(name)
                    if self.lora is not None:
                        delta = self.lora.delta(number, name)
                        part = part if delta is None else part.float() + delta
                    yield f"{path}.weight", part
                    if one is not None:
                        yield f"{path}.bias", one
        yield FINAL_NORM, self.norm
