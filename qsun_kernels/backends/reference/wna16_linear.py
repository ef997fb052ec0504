"""wna16_linear in torch, over one of two layouts.

``torch.int4pack``: the int4 matmul of torch for CPUs, which reads a quarter of the bytes: about five times
faster than 16-bit weights at M = 1 on matrices that no cache holds, and no faster from M = 8 on. It
multiplies bfloat16 by ``(code - 8) * scale`` with float32 accumulation, so it serves the weights whose ``code
- zero`` lies in -8..7. Its floating point offset would be rounded to bfloat16 and is left at zero. It is bit
for bit the dense product with every one-hot x. Its float16 and float32 forms are scalar loops, 20 times
slower than the dense product, and not used. Tensors: (packed codes, scales and offsets (K / group, N, 2)[,
column order (K,)]).

``torch.dense``: the dequantised weight (N, K) in the dtype of the activations, made once. Tensors: (weight,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import LinearImplementation, PreparedWeight, Wna16Problem
from qsun_kernels.backends.reference import dequantize
from qsun_kernels.backends.reference.dtypes import refuse_dtypes
from qsun_kernels.quant import PackedWeight

INT4PACK = "torch.int4pack"
DENSE = "torch.dense"

_INT4_GROUP_SIZES = (128, 64, 32)
_INT4_ROWS = 16


def supports(problem: Wna16Problem) -> str | None:
    """Every shape, bits and group size, on every device."""
    return refuse_dtypes(dtype=problem.dtype)


def _int4_group_size(columns: int, K: int) -> int | None:
    """The widest group of the int4 kernel that tiles both a group of the weight and a row; None if there is
    none.

    Groups that are wider repeat their scale over several of the kernel's.
    """
    return next((size for size in _INT4_GROUP_SIZES if columns % size == 0 and K % size == 0), None)


def refuse_int4pack(problem: Wna16Problem) -> str | None:
    """Why the int4 kernel cannot take the weight, whatever its values; None when it can."""
    columns = problem.K if problem.group_size == "channel" else problem.group_size
    if problem.device.type != "cpu":
        return f"the int4 kernel of torch is for the CPU, device is {problem.device}"
    if problem.dtype != torch.bfloat16:
        return f"the int4 kernel of torch is fast for bfloat16 only, dtype is {problem.dtype}"
    if problem.bits > 4 or (problem.bits == 4 and not problem.symmetric):
        zeros = "symmetric" if problem.symmetric else "asymmetric"
        return f"code - zero must lie in -8..7, which {problem.bits}-bit {zeros} weights exceed"
    if problem.N % _INT4_ROWS:
        return f"N={problem.N} is not a multiple of {_INT4_ROWS}"
    if _int4_group_size(columns, problem.K) is None:
        return f"no group of {_INT4_GROUP_SIZES} divides K={problem.K} and group_size={problem.group_size}"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu"
    return None


def describe(problem: Wna16Problem) -> str:
    """Which layout, and why not the other."""
    reason = refuse_int4pack(problem)
    if reason is not None:
        return f"{DENSE}: dequantised weight kept in {problem.dtype} ({reason})"
    if problem.has_g_idx:
        return f"{INT4PACK}: x gathered into group order; {DENSE} where the groups are of uneven size"
    return f"{INT4PACK}: int4 matmul of torch for CPUs"


def prepare(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """Lay the weight out as `describe` says. Raises ValueError when a dequantised value overflows `dtype`."""
    spec = packed.spec
    problem = Wna16Problem(
        packed.N,
        packed.K,
        spec.bits,
        spec.group_size,
        spec.symmetric,
        packed.g_idx is not None,
        dtype,
        packed.device,
    )
    tensors = _pack_int4(packed) if refuse_int4pack(problem) is None else None
    if tensors is not None:
        return PreparedWeight(spec, packed.N, packed.K, dtype, "torch", INT4PACK, tensors)
    weight = dequantize.run(packed, dtype)
    overflows = weight.isinf()
    if bool(overflows.any()):
        n, k = (int(i) for i in overflows.nonzero()[0])
        raise ValueError(
            f"weight[{n}, {k}] is {float(weight[n, k])} once dequantised to {dtype}, "
            "expected values that it can hold"
        )
    return PreparedWeight(spec, packed.N, packed.K, dtype, "torch", DENSE, (weight,))


def _pack_int4(packed: PackedWeight) -> tuple[Tensor, ...] | None:
    """Tensors of ``torch.int4pack``; None when act-order groups are of sizes that the kernel cannot tile."""
    spec, groups = packed.spec, packed.column_groups()
    codes = packed.codes().int()
    # The kernel takes 8 off each code itself.
    codes += 8 - (spec.zero_point if packed.qzeros is None else packed.qzeros.int()[:, groups])
    order: Tensor | None = None
    if packed.g_idx is None:
        group_size = _int4_group_size(spec.columns_per_group(packed.K), packed.K)
    else:
        order = groups.argsort(stable=True)
        counts = torch.bincount(groups, minlength=spec.num_groups(packed.K))
        fitting = [size for size in _INT4_GROUP_SIZES if not bool((counts % size).any())]
        group_size = fitting[0] if fitting else None
        codes, groups = codes[:, order], groups[order]
    if group_size is None:
        return None
    scales = packed.scales[:, groups[::group_size]]
    # (K / group, N, 2): each scale beside the offset that the kernel would add.
    scales_and_offsets = torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    return (weight, scales_and_offsets) if order is None else (weight, scales_and_offsets, order)


def run(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    """``x (M, K) @ weight.T (+ bias (N,)) (+ residual (M, N))`` -> (M, N), accumulated in float32.

    Torch has no fused form for a bias and a residual together, nor for either on the int4 layout: there, what
    it can fuse is rounded, and then the rest added in float32 and rounded again.

    batch_invariant: multiply row by row. The libraries under torch choose kernels, and so the order of sums,
    by the number of rows; one row from memory of its own is always the same problem. It reads the weight once
    a row.
    """
    multiply = _multiply_rows if batch_invariant else _multiply
    y = multiply(x, weight, bias, residual)
    return y if out is None else out.copy_(y)


def _multiply_rows(
    x: Tensor, prepared: PreparedWeight, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    y = x.new_empty((x.shape[0], prepared.N))
    for i in range(x.shape[0]):
        # Kernels differ by alignment, too, and a row of x starts anywhere.
        row = x[i : i + 1].clone(memory_format=torch.contiguous_format)
        y[i : i + 1] = _multiply(row, prepared, bias, None if residual is None else residual[i : i + 1])
    return y


def _multiply(x: Tensor, prepared: PreparedWeight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if prepared.stored_layout == INT4PACK:
        return _add(_multiply_int4(x, prepared), bias, residual)
    (weight,) = prepared.tensors
    if bias is not None:
        return _add(torch.addmm(bias, x, weight.T), residual)
    if residual is not None:
        return torch.addmm(residual, x, weight.T)
    return torch.mm(x, weight.T)


def _multiply_int4(x: Tensor, prepared: PreparedWeight) -> Tensor:
    weight, scales_and_offsets, *order = prepared.tensors
    if x.shape[0] == 0:
        return x.new_empty((0, prepared.N))
    x = x.index_select(1, order[0]) if order else x.contiguous()
    group_size = prepared.K // scales_and_offsets.shape[0]
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scales_and_offsets)
    return y


def _add(product: Tensor, *terms: Tensor | None) -> Tensor:
    """The product plus the terms that there are, summed in float32 and rounded once to its dtype."""
    given = [term for term in terms if term is not None]
    if not given:
        return product
    total = product.float()
    for term in given:
        total += term
    return total.to(product.dtype)


IMPLEMENTATION = LinearImplementation(supports=supports, run=run, describe=describe, prepare=prepare)
