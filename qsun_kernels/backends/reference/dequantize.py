"""dequantize in torch: float32 arithmetic, one rounding to the output dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import DequantizeProblem, Implementation
from qsun_kernels.backends.reference.dtypes import refuse_dtypes
from qsun_kernels.quant import PackedWeight, unpack_codes

# Weights that are float32 at one time: large enough to keep torch busy, small beside the layer itself.
_CHUNK = 1 << 22


def supports(problem: DequantizeProblem) -> str | None:
    """Every shape, bits and group size, on every device."""
    return refuse_dtypes(dtype=problem.dtype)


def describe(problem: DequantizeProblem) -> str:
    """What runs."""
    return "torch operations in float32, some rows at a time"


def run(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``w[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)]`` in float32, rounded to dtype -> (N, K)."""
    out = torch.empty((packed.N, packed.K), dtype=dtype, device=packed.device)
    groups = packed.column_groups()
    rows = max(1, _CHUNK // packed.K)
    for start in range(0, packed.N, rows):
        chunk = slice(start, start + rows)
        weight = unpack_codes(packed.qweight[chunk], packed.spec.bits, packed.K).float()
        if packed.qzeros is None:
            weight -= packed.spec.zero_point
        else:
            weight -= packed.qzeros[chunk].float()[:, groups]
        weight *= packed.scales[chunk].float()[:, groups]
        out[chunk] = weight
    return out


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
