"""Machete, as vLLM ships it (`torch.ops._C.machete_mm`), with the schedule that it chooses itself."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared, _packages
from qsun_kernels.quant.packing import pack_codes

NAME = "machete"
OPERATOR = "wna16_linear"


def available(case: Case, device: torch.device) -> str | None:
    refused = _packages.refusal(
        case,
        device,
        bits=(4, 8),
        groups=(64, 128, "channel"),
        n_multiple=128,
        k_multiple=64,
        capability=(9, 0),
        act_order=True,
    )
    if refused is None and torch.cuda.get_device_capability(device) != (9, 0):
        refused = f"Hopper only, {device} is {torch.cuda.get_device_properties(device).name}"
    return refused or _packages.missing_vllm("machete_mm")


def prepare(operands: Wna16Operands) -> Prepared:
    weight = operands.weight
    spec, dtype = weight.spec, operands.dtype
    order: Tensor | None = None
    words = weight.qweight
    if weight.g_idx is not None:
        order, _ = _packages.sorted_columns(operands)
        words = pack_codes(weight.codes()[:, order.long()], spec.bits)
    code = _packages.vllm_scalar_type(spec.bits, spec.zero_point if spec.symmetric else 0)
    # It takes (K / codes a word, N) with the words of a row of N next to each other: our rows as they are.
    codes = torch.ops._C.machete_prepack_B(words.t(), dtype, code, dtype)
    scales = weight.scales.to(dtype).t().contiguous()
    # Zero points are added after the scaling: -zero * scale.
    zeros = None
    if weight.qzeros is not None:
        zeros = (-weight.qzeros.to(dtype) * weight.scales.to(dtype)).t().contiguous()
    group = -1 if spec.group_size == "channel" else spec.group_size

    def run(x: Tensor) -> Tensor:
        gathered = x if order is None else torch.ops._C.permute_cols(x, order)
        out: Tensor = torch.ops._C.machete_mm(
            gathered, codes, code, None, scales, zeros, group, None, None, None
        )
        return out

    return Prepared(run, tuple(t for t in (codes, scales, zeros, order) if t is not None))
