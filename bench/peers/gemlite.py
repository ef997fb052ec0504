"""GemLite's Triton kernels, where it brings a tuned configuration for this GPU and shape.

Without one it tunes itself for minutes a shape, which a comparison cannot wait for, so those shapes are told
as not run. For 2 to 4 and for 64 tokens its automatic choice is a kernel without a configuration, where its
split-K kernel has one: that one is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.peers import Prepared, _packages

NAME = "gemlite"
OPERATOR = "wna16_linear"
NOTE = "its shipped configurations, not tuned here; split-K where its choice has none; float32 partial sums"

_WORD = 32  # bits of the words it packs codes to


def available(case: Case, device: torch.device) -> str | None:
    refused = _packages.refusal(
        case,
        device,
        bits=(2, 4, 8),
        groups=(32, 64, 128),
        n_multiple=32,
        k_multiple=32,
        capability=(8, 0),
    )
    if refused is None:
        refused = _packages.missing("gemlite.core")
    if refused is not None:
        return refused
    problem = _packages.problem_of(case, device)
    rows = case.fields()["M"]
    assert isinstance(rows, int) and isinstance(problem.group_size, int)
    if _kernel(rows, problem.N, problem.K, problem.bits, problem.group_size) is None:
        return f"brings no configuration for M={rows} N={problem.N} K={problem.K}: tuning takes minutes"
    return None


def _kernel(M: int, N: int, K: int, bits: int, group_size: int) -> str | None:
    """The kernel to call: its own choice, else its split-K one; None where neither has a configuration."""
    core, utils = _packages.load("gemlite.core"), _packages.load("gemlite.triton_kernels.utils")
    # It tunes float16 for both dtypes.
    kind = core.DType.FP16.value * 100 + bits
    key = str((utils.get_closest_m(M), N, K, group_size, _WORD // bits, kind))
    for name in (core.get_matmul_type(M, bits), "GEMM_SPLITK"):
        if key in core.GEMLITE_TRITON_CONFIG_CACHE.get(name, {}):
            return str(name)
    return None


def prepare(operands: Wna16Operands) -> Prepared:
    gemlite = _packages.load("gemlite")
    # Up to K / 16 partial sums meet in the output by atomic additions; in bfloat16 those round each time.
    gemlite.set_native_atomic_bfp16(False)
    weight = operands.weight
    spec = weight.spec
    assert spec.group_size != "channel"
    dtype = gemlite.DType.BF16 if operands.dtype == torch.bfloat16 else gemlite.DType.FP16
    layer = gemlite.GemLiteLinear(
        spec.bits,
        group_size=spec.group_size,
        in_features=weight.K,
        out_features=weight.N,
        input_dtype=dtype,
        output_dtype=dtype,
    )
    zeros = spec.zero_point if weight.qzeros is None else weight.qzeros.to(operands.dtype)
    layer.pack(weight.codes(), weight.scales.to(operands.dtype), zeros, bias=None, fma_mode=False)
    group, N, K, bits = spec.group_size, weight.N, weight.K, spec.bits

    def run(x: Tensor) -> Tensor:
        out: Tensor = layer.forward_manual(x, _kernel(x.shape[0], N, K, bits, group) or "GEMM_SPLITK")
        return out

    streamed = [layer.W_q.data, layer.scales.data]
    if weight.qzeros is not None:
        streamed.append(layer.zeros.data)
    return Prepared(run, tuple(streamed))
