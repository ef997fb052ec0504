"""The decoder's layers in the form a decode module keeps them: as stored, or quantised on the way in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from qsun.checkpoint.quantization import describe
from qsun.checkpoint.reader import CheckpointReader
from qsun.checkpoint.weights import read_layer
from qsun.errors import CheckpointError
from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.models.weights import LayerWeights, Projection
from qsun.modules.awq import AwqCalibration
from qsun.modules.calibration import CalibrationRun
from qsun.modules.gptq import GptqCalibration
from qsun_kernels import QuantSpec
from qsun_kernels.quant import Bits, GroupSize, quantize_rtn

Quantizer = Literal["rtn", "awq", "gptq"]

QUANTIZERS: tuple[Quantizer, ...] = get_args(Quantizer)

CALIBRATED: tuple[Quantizer, ...] = ("awq", "gptq")
"""Quantisers that look at the activations of a calibration set."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called as progress(done, total, what) after each step of a long piece of work."""

LayerSource: TypeAlias = Callable[[int], LayerWeights]
"""Gives the weights of one layer after the other, by number."""

DENSE_BITS = 16
"""What argument bits calls a module whose weights are not quantised, in whatever dtype they are."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """How 16-bit weights are to be quantised.

    calibration: sequences of token ids whose activations guide `CALIBRATED` quantisers; empty for "rtn".
    """

    spec: QuantSpec
    quantizer: Quantizer
    calibration: tuple[tuple[int, ...], ...]


def default_group_size(config: ModelConfig) -> GroupSize:
    """The largest group that divides the input features of every projection: 128, 64, 32, else "channel"."""
    inputs = (config.hidden_size, config.q_size, config.intermediate_size)
    sizes: tuple[GroupSize, ...] = (128, 64, 32)
    return next((size for size in sizes if all(K % cast(int, size) == 0 for K in inputs)), "channel")


def plan_quantization(
    reader: CheckpointReader,
    *,
    bits: int | None,
    group_size: GroupSize | None,
    symmetric: bool,
    quantizer: Quantizer,
    calibration: Sequence[Sequence[int]] | None,
) -> QuantizationPlan | None:
    """What is to be done with a checkpoint's weights; None when they are taken as they are.

    bits None or 16 takes 16-bit weights as they are, and bits None a quantised checkpoint too; for one that
    is quantised already, bits and group_size must be its own, and symmetric and quantizer do not apply.
    Raises ValueError naming a bad argument, CheckpointError when the checkpoint's quantisation is another
    one.
    """
    if bits is not None and (type(bits) is not int or bits not in (2, 3, 4, 8, DENSE_BITS)):
        raise ValueError(f"bits is {bits!r}, expected 2, 3, 4, 8, 16 or None")
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer is {quantizer!r}, expected one of {QUANTIZERS}")
    if reader.quantization is not None:
        stored = reader.quantization.spec
        for name, wanted, actual in (
            ("bits", bits, stored.bits),
            ("group_size", group_size, stored.group_size),
        ):
            if wanted is not None and wanted != actual:
                raise CheckpointError(
                    f"{reader.path} is quantised already ({describe(reader.quantization)}): "
                    f"{name} is {wanted!r}, expected {actual!r} or None to take it as it is"
                )
        return None
    if bits is None or bits == DENSE_BITS:
        return None
    tokens = tuple(tuple(sequence) for sequence in calibration or ())
    if quantizer in CALIBRATED:
        _check_calibration(tokens, reader.config, quantizer)
    elif tokens:
        raise ValueError(
            f"calibration has {len(tokens)} sequences, expected none for quantizer {quantizer!r}"
        )
    spec = QuantSpec(cast(Bits, bits), group_size or default_group_size(reader.config), symmetric)
    return QuantizationPlan(spec, quantizer, tokens)


def layer_source(
    reader: CheckpointReader, plan: QuantizationPlan | None, placement: Placement, embed_tokens: Tensor
) -> LayerSource:
    """What reads the layers of the decoder, quantised by `plan` when there is one.

    The result is called with 0, 1, 2, ... in this order, and holds nothing of a layer once it has returned
    it: peak memory is one layer.  Quantised weights are on placement.device with scales of placement.dtype,
    the others in host memory.  embed_tokens: (V, H), the embedding that calibration starts from.
    It raises CheckpointError for damage, and for weights that the quantiser cannot represent.
    """
    if plan is None:
        return lambda layer: read_layer(reader, layer, placement.dtype)
    spec = plan.spec
    if plan.quantizer in CALIBRATED:
        run = CalibrationRun(reader.config, placement, plan.calibration, embed_tokens)
        kind = AwqCalibration if plan.quantizer == "awq" else GptqCalibration
        calibration = kind(reader.config, placement, run)

        def quantise(layer: int, weights: LayerWeights) -> LayerWeights:
            return calibration.quantize(layer, weights, spec)
    else:

        def quantise(layer: int, weights: LayerWeights) -> LayerWeights:
            return _round_layer(weights, spec, placement)

    def read_and_quantise(layer: int) -> LayerWeights:
        # Quantised from what is stored, not from a rounding of it.
        stored = read_layer(reader, layer, torch.float32)
        try:
            return quantise(layer, stored)
        except ValueError as error:
            raise CheckpointError(f"{reader.path}: layer {layer} cannot be quantised: {error}") from error

    return read_and_quantise


def _round_layer(weights: LayerWeights, spec: QuantSpec, placement: Placement) -> LayerWeights:
    """The layer rounded to nearest, projection by projection."""
    projections = {}
    for name, part in weights.projections.items():
        assert isinstance(part.weight, Tensor)
        dense = part.weight.to(placement.device)
        projections[name] = Projection(quantize_rtn(dense, spec, scale_dtype=placement.dtype), part.bias)
    return LayerWeights(
        weights.attention_norm, weights.mlp_norm, projections, weights.q_norm, weights.k_norm
    ).cast(placement.dtype)


def _check_calibration(
    tokens: tuple[tuple[int, ...], ...], config: ModelConfig, quantizer: Quantizer
) -> None:
    if not tokens:
        raise ValueError(
            f"calibration is empty, expected at least one sequence of token ids for quantizer {quantizer!r}"
        )
    for index, sequence in enumerate(tokens):
        if not 1 <= len(sequence) <= config.max_position_embeddings:
            raise ValueError(
                f"calibration[{index}] has {len(sequence)} tokens, expected 1 to "
                f"{config.max_position_embeddings}"
            )
        for token in sequence:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"calibration[{index}] has token {token!r}, "
                    f"expected integers in 0..{config.vocab_size - 1}"
                )
