"""torch's int4 CPU kernel (`_weight_int4pack_mm_for_cpu`), called bare: our CPU path without its overhead."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared, _int4

NAME = "int4pack_cpu"
OPERATOR = "wna16_linear"

_IGNORED_INNER_K_TILES = 2  # the CPU conversion takes the argument of its CUDA sibling and does not use it


def available(case: Case, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"a CPU kernel, device is {device}"
    return _int4.refusal(case, device, n_multiple=16, k_multiple=2)


def prepare(operands: Wna16Operands) -> Prepared:
    codes = operands.weight.codes().int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _IGNORED_INNER_K_TILES)
    scales = _int4.scales_and_zeros(operands)
    group = _int4.group_size(operands)

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)
        return out

    return Prepared(run, (packed, scales))
