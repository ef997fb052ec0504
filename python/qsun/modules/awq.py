"""Activation-aware quantisation of a decoder, one layer at a time, on a calibration set.

Which scales are searched, and why keys and values keep their meaning, is told in
qsun_kernels.quant.awq_search.
"""

from __future__ import annotations

from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.models.weights import (
    ATTENTION_NORM,
    MLP_NORM,
    PROJECTIONS,
    LayerWeights,
    Projection,
    projection_path,
)
from qsun.modules.calibration import CalibrationRun, input_widths
from qsun_kernels import PackedWeight, QuantSpec
from qsun_kernels.quant.awq_search import quantize_layer
from qsun_kernels.quant.calibration import InputStatistics


class AwqCalibration:
    """Quantises the layers in order, by what the calibration set's run through them shows."""

    def __init__(self, config: ModelConfig, placement: Placement, run: CalibrationRun) -> None:
        self._config = config
        self._placement = placement
        self._run = run

    def quantize(self, layer: int, weights: LayerWeights, spec: QuantSpec) -> LayerWeights:
        """Quantise the next layer; layers must come in order, with dense float32 weights.

        Returns packed projections with the norms (and the bias of up_proj) that belong to them.
        Raises ValueError for activations or weights that are not finite.
        """
        rounded = weights.cast(self._placement.dtype)
        statistics = {
            name: InputStatistics(K, seed=layer, device=self._placement.device)
            for name, K in input_widths(self._config).items()
        }
        self._run.advance(layer, rounded, statistics)
        tensors = {ATTENTION_NORM: rounded.attention_norm, MLP_NORM: rounded.mlp_norm}
        for name, part in weights.projections.items():
            path = projection_path(name)
            assert not isinstance(part.weight, PackedWeight)
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
