"""Round to nearest: each group's scale and zero point from its range, each weight to its nearest code.

The scale. A group's weights lie in [-a, b] with a, b >= 0 (zero is always part of the range). Codes 0..C
with zero point z stand for (code - z) * s, and a weight up to half a step outside the end values still
rounds with an error of at most s / 2. So every weight of the group is off by at most s / 2 exactly when

    s >= a / (z + 1/2)        and        s >= b / (C - z + 1/2)

and the smallest such s is the one with the smallest guaranteed error. (The common max|w| / 7 for 4 bits
wastes code -8; max|w| / 7.5 is this formula for the worse of the two signs.)

- Symmetric, z = 2**(bits-1): there is one more code below zero than above. The sign of the scale is free, so
  it is chosen to give the larger side the extra code: with M = max(a, b) and m = min(a, b),
  |s| = max(M / (z + 1/2), m / (z - 1/2)), s > 0 when a >= b and s < 0 otherwise. llama.cpp's Q4_0 and
  AutoRound store signed scales for the same reason. It matters most at 2 bits: two codes against one.
- Asymmetric: z is the integer in 0..C with the smallest s. The two bounds cross at
  z* = (a * (C + 1/2) - b / 2) / (a + b); one falls and one rises with z, so z is floor(z*) or ceil(z*).

The scale is rounded to the dtype it is stored in before any code is computed, so codes fit the stored scale.
A stored scale is subnormal only for a group whose weights all lie below about 2**(bits-1) * 6e-5 (float16).
It is then rounded away from zero, because rounding to nearest could halve it, or make it zero, and clip the
group. A group of zeros (or of numbers so small that their scale is zero in float32, below 1e-43) gets scale 1
and codes equal to the zero point: safe in any dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsun_kernels.quant.packed import SCALE_DTYPES, PackedWeight
from qsun_kernels.quant.spec import QuantSpec

WEIGHT_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Weights handled at once: bounds the float32 copies to a few times 64 MiB however large the matrix is.
CHUNK_ELEMENTS = 1 << 24


class RoundedWeight(NamedTuple):
    """What rounding gives, before packing.

    codes: uint8 (N, K); scales: (N, G) in the stored dtype; qzeros: uint8 (N, G), None when symmetric.
    """

    codes: Tensor
    scales: Tensor
    qzeros: Tensor | None


def quantize_rtn(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    range_ratio: Tensor | None = None,
) -> PackedWeight:
    """Quantise a weight matrix by rounding to nearest.

    weight: float (N, K), any strides.
    scale_dtype: dtype of the stored scales; None: that of the weight, float32 for float64.
    range_ratio: float (N, G) in (0, 1], the part of each group's range to keep (weights outside it are
        clipped); None for all of it.
    Returns a PackedWeight on the weight's device.

    Raises TypeError for a dtype that is not floating point, ValueError for a shape other than (N, K) with
    N, K >= 1, for NaN or infinite weights, and for a scale beyond the range of scale_dtype.
    """
    rounded = round_to_nearest(weight, spec, scale_dtype=scale_dtype, range_ratio=range_ratio)
    return PackedWeight.from_codes(rounded.codes, rounded.scales, spec, rounded.qzeros)


def round_to_nearest(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    range_ratio: Tensor | None = None,
) -> RoundedWeight:
    """Codes, scales and zero points of `quantize_rtn`, not packed; same arguments and errors."""
    scale_dtype = _check(weight, spec, scale_dtype, range_ratio)
    N, K = weight.shape
    groups = spec.num_groups(K)
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(N, groups, dtype=scale_dtype, device=weight.device)
    qzeros = None if spec.symmetric else torch.empty(N, groups, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK_ELEMENTS // K)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        ratio = None if range_ratio is None else range_ratio[part]
        grouped, scale, zero = _round_rows(weight[part], spec, scale_dtype, ratio, start)
        codes[part] = _ungroup(grouped, K)
        scales[part] = scale
        if qzeros is not None:
            qzeros[part] = zero
    return RoundedWeight(codes, scales, qzeros)


def fake_quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    range_ratio: Tensor | None = None,
) -> Tensor:
    """The weight that `quantize_rtn` with the same arguments would stand for, float32 (N, K); same errors."""
    scale_dtype = _check(weight, spec, scale_dtype, range_ratio)
    N, K = weight.shape
    out = torch.empty(N, K, dtype=torch.float32, device=weight.device)
    rows = max(1, CHUNK_ELEMENTS // K)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        ratio = None if range_ratio is None else range_ratio[part]
        grouped, scale, zero = _round_rows(weight[part], spec, scale_dtype, ratio, start)
        grouped.sub_(zero.unsqueeze(-1)).mul_(scale.float().unsqueeze(-1))
        out[part] = _ungroup(grouped, K)
    return out


def stored_scale_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of scales where none was asked for: that of the weight, float32 for float64."""
    return torch.float32 if weight.dtype == torch.float64 else weight.dtype


def _check(
    weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype | None, range_ratio: Tensor | None
) -> torch.dtype:
    """Check the arguments common to all entry points and return the scale dtype to use."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}, expected one of {WEIGHT_DTYPES}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K) with N and K at least 1")
    if scale_dtype is None:
        scale_dtype = stored_scale_dtype(weight)
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype is {scale_dtype}, expected one of {SCALE_DTYPES}")
    if range_ratio is not None:
        groups = (weight.shape[0], spec.num_groups(weight.shape[1]))
        if tuple(range_ratio.shape) != groups:
            raise ValueError(f"range_ratio has shape {tuple(range_ratio.shape)}, expected {groups}")
        if not bool(((range_ratio > 0) & (range_ratio <= 1)).all()):
            raise ValueError(
                f"range_ratio spans {float(range_ratio.min())!r} to {float(range_ratio.max())!r}, "
                "expected values in (0, 1]"
            )
    return scale_dtype


def _round_rows(
    weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, range_ratio: Tensor | None, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round some rows.

    Returns codes as float32 (n, G, columns_per_group), padded in the last group; the stored scales (n, G);
    the zero points as float32 (n, G). first_row is the row's index in the whole matrix, for messages.
    """
    exact_weight = weight.float()
    grouped = _group(exact_weight, spec)
    low, high = grouped.aminmax(dim=-1)
    # One look at the ends finds NaN and infinity anywhere: aminmax propagates NaN.
    if not bool((low.isfinite() & high.isfinite()).all()):
        row, column = (int(i) for i in (~exact_weight.isfinite()).nonzero()[0])
        raise ValueError(
            f"weight[{first_row + row}, {column}] is {float(weight[row, column])!r}, expected finite float32"
        )
    below, above = (-low).clamp_(min=0), high.clamp_(min=0)
    if range_ratio is not None:
        below, above = below * range_ratio, above * range_ratio
    exact, zero = _scale_and_zero(below, above, spec)
    scale = _store_scale(exact, scale_dtype)
    if not bool(scale.isfinite().all()):
        row, group = (int(i) for i in (~scale.isfinite()).nonzero()[0])
        raise ValueError(
            f"weight[{first_row + row}] needs the scale {float(exact[row, group])!r} in group {group}, "
            f"expected at most {torch.finfo(scale_dtype).max} in {scale_dtype}"
        )
    # A fresh tensor: `grouped` may share memory with the caller's float32 weight.
    codes = grouped / scale.float().unsqueeze(-1)
    return codes.round_().add_(zero.unsqueeze(-1)).clamp_(0, spec.max_code), scale, zero


def _scale_and_zero(below: Tensor, above: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of groups that span [-below, above]; see the top of the file."""
    top = float(spec.max_code)
    if spec.symmetric:
        # Tensor by tensor: dividing by a Python number, CUDA multiplies by its inverse, an ulp off the CPU.
        zero = torch.full_like(below, float(spec.zero_point))
        larger, smaller = torch.maximum(below, above), torch.minimum(below, above)
        scale = torch.maximum(larger / (zero + 0.5), smaller / (zero - 0.5))
        scale = torch.where(below >= above, scale, -scale)
    else:
        # Relative to the larger side: the sum of both may overflow.
        larger = torch.maximum(below, above).clamp(min=torch.finfo(torch.float32).tiny)
        low, high = below / larger, above / larger
        crossing = ((low * (top + 0.5) - high * 0.5) / (low + high).clamp(min=0.5)).clamp(0, top)
        candidates = torch.stack((crossing.floor(), crossing.ceil()))
        scales = torch.maximum(below / (candidates + 0.5), above / (top + 0.5 - candidates))
        scale, choice = scales.min(dim=0)
        zero = torch.where(choice == 0, candidates[0], candidates[1])
    return torch.where(scale == 0, 1.0, scale), zero


def _store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 scales to `dtype`: to nearest, and away from zero where the result is subnormal."""
    stored = scale.to(dtype)
    if dtype == torch.float32:
        return stored
    shrunk = (stored.abs() < torch.finfo(dtype).smallest_normal) & (stored.float().abs() < scale.abs())
    # Floats of one sign order like integers, so the next bit pattern is the next number away from zero.
    next_larger = (stored.view(torch.int16) + 1).view(dtype)
    return torch.where(shrunk, next_larger, stored)


def _group(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View (n, K) as (n, G, columns_per_group), padding a short last group with zeros."""
    n, K = weight.shape
    columns = spec.columns_per_group(K)
    groups = spec.num_groups(K)
    if groups * columns != K:
        weight = torch.nn.functional.pad(weight, (0, groups * columns - K))
    return weight.reshape(n, groups, columns)


def _ungroup(grouped: Tensor, K: int) -> Tensor:
    """The inverse of `_group`: (n, G, columns_per_group) to (n, K)."""
    return grouped.reshape(grouped.shape[0], -1)[:, :K]
