"""bitsandbytes' NF4: four bits a weight from a table of 16 values, one float32 scale a block.

The format cannot hold the cases' values, so it quantises the same dense weight and is judged by what that
became.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import DenseOracle, Wna16Operands
from qsun_bench.peers import Prepared, _packages

NAME = "bitsandbytes"
OPERATOR = "wna16_linear"
NOTE = "NF4: values of its own, scales in float32"


def available(case: Case, device: torch.device) -> str | None:
    refused = _packages.refusal(
        case, device, bits=(4,), groups=(64, 128), n_multiple=1, k_multiple=64, capability=(7, 5)
    )
    if refused is None and not _packages.problem_of(case, device).symmetric:
        refused = "no zero points"
    return refused or _packages.missing("bitsandbytes")


def prepare(operands: Wna16Operands) -> Prepared:
    bitsandbytes, functional = _packages.load("bitsandbytes"), _packages.load("bitsandbytes.functional")
    dense = operands.dense(operands.dtype)
    codes, state = functional.quantize_4bit(
        dense, blocksize=operands.weight.spec.group_size, quant_type="nf4"
    )

    def run(x: Tensor) -> Tensor:
        out: Tensor = bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)
        return out

    values = functional.dequantize_4bit(codes, state).double()
    return Prepared(run, (codes, state.absmax), DenseOracle(values, operands.dtype))
