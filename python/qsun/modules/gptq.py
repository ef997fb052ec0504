"""Error-compensating quantisation of a decoder, one layer at a time, on a calibration set.

How columns make up for each other's rounding is told in qsun_kernels.quant.gptq.
"""

from __future__ import annotations

from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.models.weights import PROJECTIONS, LayerWeights, Projection, projection_path
from qsun.modules.calibration import CalibrationRun, input_widths
from qsun_kernels import PackedWeight, QuantSpec
from qsun_kernels.quant.calibration import InputGram
from qsun_kernels.quant.gptq import quantize_layer_gptq


class GptqCalibration:
    """Quantises the layers in order, by what the calibration set's run through them shows."""

    def __init__(self, config: ModelConfig, placement: Placement, run: CalibrationRun) -> None:
        self._config = config
        self._placement = placement
        self._run = run

    def quantize(self, layer: int, weights: LayerWeights, spec: QuantSpec) -> LayerWeights:
        """Quantise the next layer; layers must come in order, with dense float32 weights.

        Returns packed projections with the norms and biases as they were, in placement.dtype.
        Raises ValueError for activations or weights that are not finite.
        """
        device = self._placement.device
        rounded = weights.cast(self._placement.dtype)
        grams = {name: InputGram(K, device=device) for name, K in input_widths(self._config).items()}
        self._run.advance(layer, rounded, grams)
        tensors = {}
        for name, part in weights.projections.items():
            assert not isinstance(part.weight, PackedWeight)
            tensors[f"{projection_path(name)}.weight"] = part.weight.to(device)
        packed = quantize_layer_gptq(tensors, grams, spec, scale_dtype=self._placement.dtype)
        return LayerWeights(
            rounded.attention_norm,
            rounded.mlp_norm,
            {
                name: Projection(packed[projection_path(name)], rounded.projections[name].bias)
                for name in PROJECTIONS
            },
            rounded.q_norm,
            rounded.k_norm,
        )
