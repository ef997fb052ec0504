"""The weights of a decoder between the checkpoint and the layers: one record a layer, dense or packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qsun.models.config import ModelConfig
from qsun_kernels import PackedWeight

ProjectionName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PROJECTIONS: tuple[ProjectionName, ...] = get_args(ProjectionName)

EMBED_TOKENS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
ATTENTION_NORM = "input_layernorm.weight"
MLP_NORM = "post_attention_layernorm.weight"
Q_NORM = "self_attn.q_norm.weight"
K_NORM = "self_attn.k_norm.weight"


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors start with."""
    return f"model.layers.{layer}."


def projection_path(name: ProjectionName) -> str:
    """A projection's name within its layer, for example self_attn.q_proj."""
    return f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"


def projection_shape(config: ModelConfig, name: ProjectionName) -> tuple[int, int]:
    """(N, K), output and input features."""
    if name == "q_proj":
        return config.q_size, config.hidden_size
    if name in ("k_proj", "v_proj"):
        return config.kv_size, config.hidden_size
    if name == "o_proj":
        return config.hidden_size, config.q_size
    if name == "down_proj":
        return config.hidden_size, config.intermediate_size
    return config.intermediate_size, config.hidden_size


def projection_has_bias(config: ModelConfig, name: ProjectionName) -> bool:
    """Whether the architecture has a bias there."""
    if name in ("q_proj", "k_proj", "v_proj"):
        return config.attention_bias
    return config.attention_output_bias if name == "o_proj" else config.mlp_bias


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, in one pass without a temporary: extremes propagate NaN and infinity."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


@dataclass(frozen=True, slots=True)
class Projection:
    """weight: (N, K), dense or packed.  bias: (N,) or None."""

    weight: Tensor | PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer.

    attention_norm, mlp_norm: (hidden_size,).  q_norm, k_norm: (head_dim,), both or neither.
    projections: all seven, by name.
    """

    attention_norm: Tensor
    mlp_norm: Tensor
    projections: dict[ProjectionName, Projection]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def named_tensors(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a name of its own, in a fixed order; a packed weight gives its parts."""
        prefix = layer_prefix(layer)
        for name, norm in self.norms():
            yield prefix + name, norm
        for projection_name, projection in self.projections.items():
            path = prefix + projection_path(projection_name)
            if isinstance(projection.weight, PackedWeight):
                spec = f"{projection.weight.spec}".replace(" ", "_")
                for part in ("qweight", "scales", "qzeros", "g_idx"):
                    tensor = getattr(projection.weight, part)
                    if tensor is not None:
                        yield f"{path}.{spec}.{part}", tensor
            else:
                yield f"{path}.weight", projection.weight
            if projection.bias is not None:
                yield f"{path}.bias", projection.bias

    def cast(self, dtype: torch.dtype) -> LayerWeights:
        """This layer with norms, biases and dense weights rounded to `dtype`; packed weights stay as they
        are.

        Raises ValueError naming the tensor when a finite value overflows.
        """
        rounded = LayerWeights(
            attention_norm=self.attention_norm.to(dtype),
            mlp_norm=self.mlp_norm.to(dtype),
            projections={
                name: Projection(
                    part.weight if isinstance(part.weight, PackedWeight) else part.weight.to(dtype),
                    None if part.bias is None else part.bias.to(dtype),
                )
                for name, part in self.projections.items()
            },
            q_norm=None if self.q_norm is None else self.q_norm.to(dtype),
            k_norm=None if self.k_norm is None else self.k_norm.to(dtype),
        )
        for name, tensor in rounded.named_tensors(0):
            if tensor.dtype == dtype and not is_finite(tensor):
                raise ValueError(
                    f"{name.removeprefix(layer_prefix(0))} overflows, expected values that {dtype} can hold"
                )
        return rounded

    def norms(self) -> Iterator[tuple[str, Tensor]]:
        """The norm weights by their names within the layer."""
        yield ATTENTION_NORM, self.attention_norm
        yield MLP_NORM, self.mlp_norm
        if self.q_norm is not None and self.k_norm is not None:
            yield Q_NORM, self.q_norm
            yield K_NORM, self.k_norm
