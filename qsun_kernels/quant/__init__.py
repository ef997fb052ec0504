"""Low-bit weights: what they are, how they are made, and the checkpoint formats they are read from."""

from __future__ import annotations

from qsun_kernels.quant.awq_search import AwqOptions, QuantizedLayer, quantize_layer
from qsun_kernels.quant.calibration import InputGram, InputStatistics
from qsun_kernels.quant.gptq import GptqOptions, quantize_gptq, quantize_layer_gptq
from qsun_kernels.quant.packed import PackedWeight, concatenate_rows
from qsun_kernels.quant.packing import pack_codes, unpack_codes
from qsun_kernels.quant.rtn import quantize_rtn
from qsun_kernels.quant.spec import Bits, GroupSize, QuantSpec

__all__ = [
    "AwqOptions",
    "Bits",
    "GptqOptions",
    "GroupSize",
    "InputGram",
    "InputStatistics",
    "PackedWeight",
    "QuantSpec",
    "QuantizedLayer",
    "concatenate_rows",
    "pack_codes",
    "quantize_gptq",
    "quantize_layer",
    "quantize_layer_gptq",
    "quantize_rtn",
    "unpack_codes",
]
