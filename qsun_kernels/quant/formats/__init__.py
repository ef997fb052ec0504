"""Checkpoint formats of other projects: AWQ, GPTQ, compressed-tensors, GGUF."""

from __future__ import annotations

from qsun_kernels.quant.formats.awq import from_awq
from qsun_kernels.quant.formats.compressed_tensors import (
    from_compressed_tensors,
    quantization_config,
    to_compressed_tensors,
)
from qsun_kernels.quant.formats.detect import CheckpointFormat, UnsupportedQuantization, detect
from qsun_kernels.quant.formats.gguf import GGUFFile, undo_rotary_permutation
from qsun_kernels.quant.formats.gptq import from_gptq

__all__ = [
    "CheckpointFormat",
    "GGUFFile",
    "UnsupportedQuantization",
    "detect",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "quantization_config",
    "to_compressed_tensors",
    "undo_rotary_permutation",
]
