"""A decode module of a given shape with random weights: the time of a step does not depend on values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun.layers.norm import RMSNorm
from qsun.models.build import Placement, build_layer, build_linear
from qsun.models.config import ModelConfig
from qsun.models.decoder import DecoderStack
from qsun.models.weights import PROJECTIONS, LayerWeights, Projection, projection_shape
from qsun.modules.card import DecoderFingerprint, ModuleCard
from qsun.modules.decode import DecodeModule
from qsun.modules.digest import base_digest
from qsun_bench.random_weights import random_packed_weight
from qsun_bench.shapes import ModelShape
from qsun_kernels import RopeParameters, rope_cache
from qsun_kernels.quant import QuantSpec


def model_config(shape: ModelShape, layers: int, max_positions: int) -> ModelConfig:
    """The configuration of the first `layers` layers of a shape."""
    return ModelConfig(
        architecture=shape.architecture,
        hidden_size=shape.hidden,
        num_layers=layers,
        num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        rms_norm_eps=1e-5,
        rope=RopeParameters(theta=shape.rope_theta),
        tie_word_embeddings=shape.tied,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=shape.architecture == "qwen3",
        windows=(None,) * layers,
        max_position_embeddings=max_positions,
    )


def random_decode_module(
    config: ModelConfig,
    spec: QuantSpec | None,
    placement: Placement,
    precision: torch.dtype,
    *,
    head_spec: QuantSpec | None = None,
) -> DecodeModule:
    """Weights drawn on the device, layer by layer; `spec` None keeps them dense, `head_spec` the lm_head.

    precision: what weights and scales are rounded to. It is placement.dtype, unless the same function is to
    be computed in a wider one.
    """
    generator = torch.Generator(placement.device).manual_seed(0)
    stack = random_stack(config, spec, placement, precision, generator)
    rows, width = config.vocab_size, config.hidden_size
    embed = _dense(rows, width, precision, generator).to(placement.dtype)
    head: Any = embed
    in_few_bits: dict[str, Any] = {}
    if head_spec is not None:
        packed = random_packed_weight(rows, width, head_spec, precision, generator)
        head = None
        in_few_bits = {"head": build_linear([Projection(packed)], placement), "lm_head_digest": "random"}
    elif not config.tie_word_embeddings:
        head = _dense(rows, width, precision, generator).to(placement.dtype)
    fingerprint = DecoderFingerprint.of(config, None, base_digest(embed))
    card = ModuleCard("random", "decode", fingerprint)
    return DecodeModule(Path("random"), stack, embed, head, spec, card, **in_few_bits)


def random_stack(
    config: ModelConfig,
    spec: QuantSpec | None,
    placement: Placement,
    precision: torch.dtype,
    generator: torch.Generator,
) -> DecoderStack:
    """The layers and the final norm alone: what a prefill module has of its own."""
    layers = [
        build_layer(_layer(config, spec, precision, generator), layer, config, placement)
        for layer in range(config.num_layers)
    ]
    ones = torch.ones(config.hidden_size, dtype=placement.dtype, device=placement.device)
    table = rope_cache(config.rope, config.head_dim, config.max_position_embeddings, placement.device)
    return DecoderStack(config, layers, RMSNorm(ones, config.rms_norm_eps), table)


def _layer(
    config: ModelConfig, spec: QuantSpec | None, precision: torch.dtype, generator: torch.Generator
) -> LayerWeights:
    ones = torch.ones(config.hidden_size, dtype=precision)
    head = torch.ones(config.head_dim, dtype=precision) if config.qk_norm else None
    projections = {}
    for name in PROJECTIONS:
        N, K = projection_shape(config, name)
        if spec is None:
            projections[name] = Projection(_dense(N, K, precision, generator))
        else:
            projections[name] = Projection(random_packed_weight(N, K, spec, precision, generator))
    return LayerWeights(ones, ones, projections, head, head)


def _dense(N: int, K: int, precision: torch.dtype, generator: torch.Generator) -> Tensor:
    """Entries of variance 1/K, so that activations keep their size."""
    weight = torch.empty(N, K, dtype=precision, device=generator.device)
    return weight.normal_(0.0, K**-0.5, generator=generator)
