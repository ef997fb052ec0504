"""The weight kept dense in the activation's precision: cuBLAS on CUDA, oneDNN on the CPU, through torch.

It is what quantisation replaces, so speed-ups are told against it. It multiplies by the same dequantised
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared

NAME = "dense"
OPERATOR = "wna16_linear"


def available(case: Case, device: torch.device) -> str | None:
    """Always: torch multiplies any sizes on any device."""
    return None


def prepare(operands: Wna16Operands) -> Prepared:
    weight = operands.dense(operands.dtype).clone()

    def run(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    return Prepared(run, (weight,))
