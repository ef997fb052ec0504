"""Marlin, as vLLM ships it (`torch.ops._C.marlin_gemm`), with sums in float32 across blocks.

Its layouts: codes in tiles, by its own repacking operator; scales and zero points of a group transposed as an
8 x 8 square in every 64 rows; one scale a row in fours of pairs in every 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared, _packages
from qsun_kernels.quant.packing import pack_codes

NAME = "marlin"
OPERATOR = "wna16_linear"


def available(case: Case, device: torch.device) -> str | None:
    refused = _packages.refusal(
        case,
        device,
        bits=(4, 8),
        groups=(32, 64, 128, "channel"),
        n_multiple=64,
        k_multiple=128,
        capability=(8, 0),
        act_order=True,
    )
    problem = _packages.problem_of(case, device)
    if refused is None and not problem.symmetric:
        if problem.bits != 4:
            refused = f"zero points with 4 bits only, got {problem.bits}"
        elif problem.has_g_idx:
            refused = "zero points without act-order only"
    return refused or _packages.missing_vllm("marlin_gemm")


def prepare(operands: Wna16Operands) -> Prepared:
    weight = operands.weight
    spec, N, K, device = weight.spec, weight.N, weight.K, weight.device
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    order, groups = nothing, nothing
    if weight.g_idx is not None:
        order, groups = _packages.sorted_columns(operands)
    # Eight codes of a column of K to a word, as GPTQ stores them: our rows, transposed.
    words = weight.qweight.t().contiguous()
    codes = torch.ops._C.gptq_marlin_repack(words, order, K, N, spec.bits, False)
    scales = _tile_scales(weight.scales.to(operands.dtype), one_a_row=spec.num_groups(K) == 1)
    zeros = nothing if weight.qzeros is None else _tile_zeros(weight.qzeros)
    code = _packages.vllm_scalar_type(spec.bits, spec.zero_point if spec.symmetric else 0)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    locks = torch.zeros(blocks, dtype=torch.int32, device=device)

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops._C.marlin_gemm(
            x,
            None,  # output
            codes,
            None,  # bias
            scales,
            None,  # scales of activations
            None,  # scale of the tensor
            zeros,
            groups,
            order,
            locks,
            code,
            x.shape[0],
            N,
            K,
            True,  # the whole of K is here
            False,  # no atomic additions
            True,  # sums in float32
            False,  # zero points are integers
        )
        return out

    streamed = (codes, scales) if weight.qzeros is None else (codes, scales, zeros)
    return Prepared(run, streamed)


def _tile_scales(scales: Tensor, *, one_a_row: bool) -> Tensor:
    """(N, G) -> (G, N), each 64 (or 32) rows in the order in which the kernel's lanes hold them."""
    columns = scales.t().contiguous()
    if one_a_row:
        return columns.reshape(-1, 4, 4, 2).permute(0, 2, 1, 3).reshape(columns.shape).contiguous()
    return columns.reshape(-1, 8, 8).transpose(1, 2).reshape(columns.shape).contiguous()


def _tile_zeros(zeros: Tensor) -> Tensor:
    """uint8 (N, G) -> int32 (G, N / 8): the order of the scales, in each word the even ones first."""
    tiled = _tile_scales(zeros, one_a_row=False)
    return pack_codes(tiled.reshape(-1, 4, 2).transpose(1, 2).reshape(tiled.shape).contiguous(), 4)
