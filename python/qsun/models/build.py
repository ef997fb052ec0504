"""From weights in host memory to layers on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.layers.attention import Attention
from qsun.layers.linear import DenseLinear, Linear, QuantLinear, SplitLinear, are_one_matrix
from qsun.layers.mlp import GatedMLP, GateUpSilu
from qsun.layers.norm import RMSNorm
from qsun.models.config import ModelConfig
from qsun.models.decoder import DecoderLayer
from qsun.models.weights import LayerWeights, Projection
from qsun_kernels import BackendUnavailable, PackedWeight, prepare_gate_up, prepare_weight
from qsun_kernels.backends.dispatch import requested_backend, select
from qsun_kernels.backends.problems import BackendName, Wna16GateUpSiluProblem
from qsun_kernels.quant import concatenate_rows


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a module lives and what computes it.

    dtype: of activations, norms, biases and dense weights.  backend: of low-bit weights; None is the best
    there is.
    """

    dtype: torch.dtype
    device: torch.device
    backend: BackendName | None = None


def build_layer(weights: LayerWeights, layer: int, config: ModelConfig, placement: Placement) -> DecoderLayer:
    """Layer number `layer` on its device.

    Raises BackendUnavailable when no backend, or not the one that was named, can compute a packed weight.
    """
    parts = weights.projections

    def norm(weight: Tensor | None) -> RMSNorm | None:
        if weight is None:
            return None
        return RMSNorm(weight.to(device=placement.device, dtype=placement.dtype), config.rms_norm_eps)

    attention_norm, mlp_norm = norm(weights.attention_norm), norm(weights.mlp_norm)
    assert attention_norm is not None and mlp_norm is not None
    attention = Attention(
        build_linear([parts["q_proj"], parts["k_proj"], parts["v_proj"]], placement),
        build_linear([parts["o_proj"]], placement),
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        q_norm=norm(weights.q_norm),
        k_norm=norm(weights.k_norm),
        window=config.windows[layer],
    )
    mlp = GatedMLP(
        build_gate_up([parts["gate_proj"], parts["up_proj"]], placement),
        build_linear([parts["down_proj"]], placement),
    )
    return DecoderLayer(attention_norm, attention, mlp_norm, mlp)


def build_linear(parts: Sequence[Projection], placement: Placement) -> Linear:
    """Projections of one input as one layer, outputs side by side: one matrix wherever they can be one."""
    packed = [part.weight for part in parts if isinstance(part.weight, PackedWeight)]
    dense = [part.weight for part in parts if isinstance(part.weight, Tensor)]
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) != len(parts):
        return SplitLinear([build_linear([part], placement) for part in parts])
    bias = torch.cat(biases).to(device=placement.device, dtype=placement.dtype) if biases else None
    if not packed:
        # The parts are moved first, so that the copy that joins them is not made in host memory.
        moved = [weight.to(device=placement.device, dtype=placement.dtype) for weight in dense]
        return DenseLinear(moved[0] if len(moved) == 1 else torch.cat(moved), bias)
    if dense or not are_one_matrix(packed):
        return SplitLinear([build_linear([part], placement) for part in parts])
    prepared = prepare_weight(
        concatenate_rows(packed), dtype=placement.dtype, device=placement.device, backend=placement.backend
    )
    return QuantLinear(prepared, bias)


def build_gate_up(parts: Sequence[Projection], placement: Placement) -> Linear | GateUpSilu:
    """Gate and up, with silu and the product in the same call where they are one low-bit matrix.

    They stay a linear layer where they have biases, and where the backend that would multiply has no kernel
    for the whole: it would be computed by another backend, or not at all.
    """
    packed = [part.weight for part in parts if isinstance(part.weight, PackedWeight)]
    has_bias = any(part.bias is not None for part in parts)
    if has_bias or len(packed) != len(parts) or not are_one_matrix(packed):
        return build_linear(parts, placement)
    joined = concatenate_rows(packed)
    if not _is_fused(joined, placement):
        return build_linear(parts, placement)
    prepared = prepare_gate_up(
        joined, dtype=placement.dtype, device=placement.device, backend=placement.backend
    )
    return GateUpSilu(prepared)


def _is_fused(weight: PackedWeight, placement: Placement) -> bool:
    """Whether the backend that multiplies by this weight also has the product with silu behind it."""
    spec = weight.spec
    problem = Wna16GateUpSiluProblem(
        weight.N,
        weight.K,
        spec.bits,
        spec.group_size,
        spec.symmetric,
        weight.g_idx is not None,
        placement.dtype,
        placement.device,
    )
    requested = requested_backend(placement.backend)
    multiplies = select(problem.linear, requested).backend
    try:
        return select(problem, requested).backend == multiplies
    except BackendUnavailable:
        return False
