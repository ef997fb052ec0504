"""torch's int4 CUDA kernel (`_weight_int4pack_mm`, known as tinygemm)."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared, _int4

NAME = "tinygemm"
OPERATOR = "wna16_linear"

_INNER_K_TILES = 8  # the widest of the three that the kernel offers


def available(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"a CUDA kernel, device is {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, {device} has {torch.cuda.get_device_capability(device)}"
    return _int4.refusal(case, device, n_multiple=8, k_multiple=_INNER_K_TILES * 16)


def prepare(operands: Wna16Operands) -> Prepared:
    codes = operands.weight.codes()
    # Two codes a byte, the even column in the high half.
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
    scales = _int4.scales_and_zeros(operands)
    group = _int4.group_size(operands)

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)
        return out

    return Prepared(run, (packed, scales))
