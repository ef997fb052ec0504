"""Error-compensating rounding (GPTQ): each column makes up for the columns that were rounded before it.

Rounding to nearest minimises the error of every weight. What matters is the error of the output,

    || X (Q - W).T ||**2 = sum over rows n of  d[n] H d[n].T,        d = Q - W,   H = X.T X

and H is far from diagonal: inputs are correlated, so a column's error can be undone in part by the columns
that are still free. Columns are rounded one after the other; behind each, all that are left move to the
minimum of the quadratic form (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", arXiv 2210.17323, section 3, equations 2 and 3; the rule is that of Optimal Brain
Surgeon). With the upper triangular U of H^-1 = U.T U, the step of column k is

    error[n] = (w[n, k] - q[n, k]) / U[k, k]             w[n, j] -= error[n] * U[k, j]   for all j > k

- Order. Columns go by falling H[k, k]: what the large inputs read is rounded while much is left to make up
  for it. Groups are of neighbouring columns all the same, because their scales and zero points are set
  before the first column is rounded, from the weights as they are: no g_idx is stored, and the kernels read
  the weight as any other.
- Damping. H gets a part of its mean diagonal added to the diagonal (section 3.3 of the paper): directions
  in which the calibration set says next to nothing are not used to make up for anything.
- U. H = R R.T with R upper triangular is a Cholesky factorisation with rows and columns in reverse, and
  U = R^-1. H itself is never inverted.
- Blocks. The step above touches only a block of columns; the others follow by one matrix product a block.
- Ranges. With few codes it pays to cut a group's largest weights off for a smaller step. Each group takes the
  part of its range with the least sum over k of H[k, k] (w - q)**2, the error that its own rounding makes.
- Scales. They were set for the weights as they were, before any moved. With the codes fixed the error is
  quadratic in the scales of a row, so they are set anew, all groups of a row at once: with c_g the codes of
  group g less their zero point (0 elsewhere), and r = w - sum_g s_g c_g what is left, the step t solves

      sum_h (c_g H c_h.T) t_h = c_g H r.T            for every g

A column of zeros in X has no correlations: each of its weights takes the nearest code. Float32 for weights,
float64 for H and its factor; the same input gives the same codes on one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qsun_kernels.quant.calibration import InputGram
from qsun_kernels.quant.folding import DECODER_LAYER, LinearGroup, require_tensor
from qsun_kernels.quant.packed import PackedWeight
from qsun_kernels.quant.rtn import fake_quantize, round_to_nearest, stored_scale_dtype
from qsun_kernels.quant.spec import QuantSpec

# Columns that are updated one by one; behind them stands one matrix product for all the others.
BLOCK_COLUMNS = 128

NARROWER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)

# Of the systems for the scales that are built at one time: 256 MiB in float32.
SYSTEM_ELEMENTS = 1 << 26

# Of their diagonals: float32 solves them safely, and no scale moves visibly less.
RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """damping: what is added to the diagonal of H, as a part of its mean; see the top of the file.

    range_ratios: parts of a group's range to try besides all of it; () narrows nothing, None narrows at 2
    bits alone: with more codes it gains less than it takes from the columns that make up for others.
    """

    damping: float = 0.01
    range_ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping is {self.damping!r}, expected a number in (0, 1]")
        for ratio in self.range_ratios or ():
            if not 0 < ratio <= 1:
                raise ValueError(f"range_ratios has {ratio!r}, expected numbers in (0, 1]")

    def ratios_for(self, spec: QuantSpec) -> tuple[float, ...]:
        """The parts of a range to try for weights of this kind."""
        if self.range_ratios is not None:
            return self.range_ratios
        return NARROWER if spec.bits == 2 else ()


class _Grid(NamedTuple):
    """Of every column and row, as float32 (K, N): scale and zero point."""

    scale: Tensor
    zero: Tensor
    max_code: int


@torch.no_grad()
def quantize_gptq(
    weights: Sequence[Tensor],
    gram: InputGram,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    options: GptqOptions | None = None,
) -> list[PackedWeight]:
    """Quantise linear layers that read the same input, making up for errors along the way.

    weights: float (N_i, K) each, on the device of `gram`; they are not modified. gram: X.T X of their input.
    scale_dtype: as in `quantize_rtn`, whose zero points these are.
    Returns packed weights in the order given, none with a g_idx.

    Memory besides weights and result: 16 bytes a weight, and four float64 matrices (K, K).
    Raises what `quantize_rtn` raises, and ValueError for no weights, another K or device, and no calibration
    rows.
    """
    options = GptqOptions() if options is None else options
    if not weights:
        raise ValueError("weights is empty, expected at least one matrix")
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != gram.K:
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}, expected (N, {gram.K})")
        if weight.device != gram.device:
            raise ValueError(f"weights[{i}] is on {weight.device}, expected {gram.device} like gram")
    importance = gram.matrix.diagonal().float()
    ratios = options.ratios_for(spec)
    rounded = [
        round_to_nearest(
            weight,
            spec,
            scale_dtype=scale_dtype,
            range_ratio=_range_ratio(weight, importance, spec, scale_dtype, ratios),
        )
        for weight in weights
    ]
    damped = _damped(gram.matrix, options.damping)
    factor, order = _factor(damped)
    columns = order // spec.columns_per_group(gram.K)
    scale = torch.cat([part.scales.float() for part in rounded]).t()[columns]
    if spec.symmetric:
        zero = torch.full_like(scale, float(spec.zero_point))
    else:
        zero = torch.cat([part.qzeros.float() for part in rounded if part.qzeros is not None]).t()[columns]
    # Columns are rows here, in the order in which they are rounded: each step reads and writes whole runs.
    remaining = torch.cat([weight.float() for weight in weights]).t()[order]
    codes = _round_columns(remaining, factor, _Grid(scale, zero, spec.max_code))
    restored = torch.empty_like(codes)
    restored[order] = codes
    del remaining, factor, scale, zero
    parts = restored.t().split([weight.shape[0] for weight in weights])
    H = damped.float()
    return [
        _with_best_scales(
            weight, PackedWeight.from_codes(part.contiguous(), plain.scales, spec, plain.qzeros), H
        )
        for weight, part, plain in zip(weights, parts, rounded, strict=True)
    ]


def _range_ratio(
    weight: Tensor,
    importance: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype | None,
    ratios: Sequence[float],
) -> Tensor | None:
    """The part of each group's range to keep, float32 (N, G), importance float32 (K,); None: all of all."""
    if not ratios:
        return None
    N, K = weight.shape
    columns, groups = spec.columns_per_group(K), spec.num_groups(K)
    stored = scale_dtype if scale_dtype is not None else stored_scale_dtype(weight)
    best = torch.ones(N, groups, device=weight.device)
    least = torch.full_like(best, torch.inf)
    exact = weight.float()
    # Ties go to the wider range.
    for ratio in sorted({1.0, *ratios}, reverse=True):
        narrowed = torch.full_like(best, ratio)
        delta = fake_quantize(exact, spec, scale_dtype=stored, range_ratio=narrowed).sub_(exact)
        weighted = functional.pad(delta.square_().mul_(importance), (0, groups * columns - K))
        error = weighted.view(N, groups, columns).sum(dim=-1)
        best = torch.where(error < least, narrowed, best)
        least = torch.minimum(error, least)
    return best


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """A copy with its diagonal raised by a part of its mean."""
    mean = float(matrix.diagonal().mean())
    damped = matrix.clone()
    # A matrix of zeros has nothing to say on any direction: the damping alone is left of it.
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return damped


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(U, order): float32 (K, K) and int64 (K,), of the matrix with its columns in that order."""
    # Stable: equal columns stay in the order of the weight, on every device.
    order = matrix.diagonal().argsort(descending=True, stable=True)
    backward = order.flip(0)
    root = torch.linalg.cholesky(matrix[backward.unsqueeze(1), backward]).flip(0, 1)
    identity = torch.eye(len(order), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(root, identity, upper=True).float(), order


def _round_columns(remaining: Tensor, factor: Tensor, grid: _Grid) -> Tensor:
    """Codes uint8 (K, N) of `remaining` (K, N), which is used up: every step of the top of the file."""
    K, N = remaining.shape
    codes = torch.empty(K, N, dtype=torch.uint8, device=remaining.device)
    for start in range(0, K, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, K)
        errors = torch.empty(stop - start, N, device=remaining.device)
        # Divided once: the steps below read no number back from the device.
        block = factor[start:stop, start:stop] / factor.diagonal()[start:stop, None]
        for k in range(start, stop):
            column, scale, zero = remaining[k], grid.scale[k], grid.zero[k]
            code = (column / scale).round_().add_(zero).clamp_(0, grid.max_code)
            codes[k] = code
            error = torch.sub(column, code.sub_(zero).mul_(scale), out=errors[k - start])
            remaining[k + 1 : stop].addr_(block[k - start, k + 1 - start :], error, alpha=-1)
        if stop < K:
            tail = factor[start:stop, stop:] / factor.diagonal()[start:stop, None]
            remaining[stop:].addmm_(tail.t(), errors, alpha=-1)
    return codes


def _with_best_scales(weight: Tensor, packed: PackedWeight, H: Tensor) -> PackedWeight:
    """The same codes with the scales of least error, H float32 (K, K); see the top of the file.

    A row keeps the scales it has where one of the new ones would be another than half to twice as large:
    then its codes say too little to set all of them.
    """
    spec, K = packed.spec, packed.K
    columns, groups = spec.columns_per_group(K), spec.num_groups(K)
    zeros = float(spec.zero_point) if packed.qzeros is None else packed.qzeros.float().unsqueeze(-1)
    scales = packed.scales.clone()
    rows = max(1, SYSTEM_ELEMENTS // max(groups * groups, K))
    padding = (0, groups * columns - K)
    codes = packed.codes()
    for start in range(0, packed.N, rows):
        part = slice(start, min(start + rows, packed.N))
        zero = zeros if isinstance(zeros, float) else zeros[part]
        steps = functional.pad(codes[part].float(), padding).view(-1, groups, columns) - zero
        before = scales[part].float()
        left = weight[part].float() - (steps * before.unsqueeze(-1)).view(len(steps), -1)[:, :K]
        pull = functional.pad(left @ H, padding).view_as(steps)
        system = torch.empty(len(steps), groups, groups, device=H.device)
        for g in range(groups):
            own = slice(g * columns, min((g + 1) * columns, K))
            seen = functional.pad(steps[:, g, : own.stop - own.start] @ H[own], padding).view_as(steps)
            system[:, g] = (seen * steps).sum(dim=-1)
        wanted = (pull * steps).sum(dim=-1)
        # A group without any code but its zero point has no scale to find.
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(diagonal > 0, RIDGE * diagonal, 1.0)
        after = (before + torch.linalg.solve(system, wanted)).to(scales.dtype)
        ratio = after.float() / before
        usable = ((ratio >= 0.5) & (ratio <= 2)).all(dim=1, keepdim=True)
        scales[part] = torch.where(usable, after, scales[part])
    return replace(packed, scales=scales)


@torch.no_grad()
def quantize_layer_gptq(
    tensors: Mapping[str, Tensor],
    grams: Mapping[str, InputGram],
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    options: GptqOptions | None = None,
    groups: Sequence[LinearGroup] = DECODER_LAYER,
) -> dict[str, PackedWeight]:
    """Quantise the linear layers of one decoder layer.

    tensors: the layer's weights by their names within it ("self_attn.q_proj.weight"), on the device of the
    Gram matrices. grams: of the input of each group, by group name.
    Returns the packed weight of each linear layer by name. Norms and biases stay as they are.
    Raises ValueError naming a missing tensor or group, or what does not fit.
    """
    packed: dict[str, PackedWeight] = {}
    for group in groups:
        if group.name not in grams:
            raise ValueError(f"grams has no {group.name!r}, expected one of each: {', '.join(grams)} given")
        weights = [require_tensor(tensors, f"{linear}.weight") for linear in group.linears]
        found = quantize_gptq(weights, grams[group.name], spec, scale_dtype=scale_dtype, options=options)
        packed.update(zip(group.linears, found, strict=True))
    return packed
