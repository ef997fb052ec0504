"""Activation-aware scaling (AWQ): give the input channels that matter more of the code range.

Multiplying column k of W by s[k] and dividing input channel k by s[k] leaves x @ W.T as it is, but changes
what rounding does to it: a column scaled up loses less. Channels with large activations matter most, so
(Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978, section 3.2, equations 4 and 5)

    s = mean|x| ** alpha,     alpha in [0, 1] chosen to minimise  || X W.T - (X / s) Q(W * s).T ||

over the linear layers that read the same x; alpha = 0 is plain rounding, so the result is never worse than
that on the calibration sample. A second family, mean|x| ** alpha / mean|w| ** (1 - alpha), with |w|
relative to the largest of its group, evens out the columns of a group as well; the better of the two is
taken. Then the range of each group may be narrowed (clipping): a smaller step for all its weights against
an error in the few largest.

What absorbs 1/s, and why keys and values keep their meaning, is in folding.py. o_proj has nothing that may
absorb its scale and is not scaled; its ranges are narrowed like those of the others.

Everything here works on the tensors of one decoder layer. A loader drives it layer by layer:

    for each layer:
        run its float weights over the calibration hidden states, with one InputStatistics per group of
        DECODER_LAYER updated with the group's input                                     (calibration.py)
        result = quantize_layer(tensors, statistics, spec)
        keep result.packed and result.changed, drop the float weights

so the peak is one layer of float32 weights and a few matrices of candidates above the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from qsun_kernels.quant.calibration import InputStatistics
from qsun_kernels.quant.folding import DECODER_LAYER, LinearGroup, fold_scales, require_tensor
from qsun_kernels.quant.packed import PackedWeight
from qsun_kernels.quant.rtn import fake_quantize, quantize_rtn, stored_scale_dtype
from qsun_kernels.quant.spec import QuantSpec

ScaleFamily = Literal["activation", "activation_over_weight"]

# Channels that are almost never active would get scales that are almost zero, and the least activity at
# run time would be magnified: no scale is below this part of what the most active channel's mean gives.
ACTIVITY_FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """What the search tries.

    steps: exponents 0, 1/steps, ..., 1 of each family. families: see the top of the file; () scales nothing.
    range_ratios: parts of a group's range to try besides all of it; () narrows nothing.
    """

    steps: int = 20
    families: tuple[ScaleFamily, ...] = ("activation", "activation_over_weight")
    range_ratios: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
        for family in self.families:
            if family not in ("activation", "activation_over_weight"):
                raise ValueError(
                    f"families has {family!r}, expected 'activation' or 'activation_over_weight'"
                )
        for ratio in self.range_ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"range_ratios has {ratio!r}, expected numbers in (0, 1]")


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What was found for one group.

    family, exponent: of the chosen scale, None and 0 when plain rounding is best or nothing may absorb a
    scale. rtn_error, scaled_error, error: ||X W.T - X' Q.T|| / ||X W.T|| on the calibration sample, for
    plain rounding, after scaling, and after narrowing ranges too.
    """

    name: str
    family: ScaleFamily | None
    exponent: float
    rtn_error: float
    scaled_error: float
    error: float


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """The result for one decoder layer.

    packed: quantised weight of each linear layer, by its name within the layer.
    changed: the tensors that are not quantised but changed by folding (norm weights, the bias of up_proj), by
    their names within the layer, in their own dtype. They must replace the old ones in this module and
    only in this module: the packed weights are wrong without them, and a prefill module's own weights are
    wrong with them. reports: one per group.
    """

    packed: Mapping[str, PackedWeight]
    changed: Mapping[str, Tensor]
    reports: tuple[GroupReport, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScaleSearch:
    """scale: float32 (K,), the factor of every input column; family and exponent as in `GroupReport`;
    errors squared and summed over the sample: rtn_error of plain rounding, error with the scale."""

    scale: Tensor
    family: ScaleFamily | None
    exponent: float
    rtn_error: float
    error: float


@torch.no_grad()
def search_scale(
    weights: Sequence[Tensor],
    inputs: InputStatistics,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    options: AwqOptions | None = None,
) -> ScaleSearch:
    """Find the input scale of linear layers that read the same input.

    weights: float (N_i, K) each, on the device of `inputs`; scale_dtype: as in `quantize_rtn`.
    Ties go to the smaller exponent. Raises ValueError for no weights, another K or no calibration rows.
    """
    options = AwqOptions() if options is None else options
    if not weights:
        raise ValueError("weights is empty, expected at least one matrix")
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != inputs.K:
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}, expected (N, {inputs.K})")
        if weight.device != inputs.sample.device:
            raise ValueError(
                f"weights[{i}] is on {weight.device}, expected {inputs.sample.device} like inputs"
            )
    plain = torch.ones(inputs.K, device=inputs.sample.device)
    rtn_error = _output_error(weights, inputs.sample, plain, spec, scale_dtype)
    best = ScaleSearch(plain, None, 0.0, rtn_error, rtn_error)
    for family, exponent, scale in _candidates(weights, inputs, spec, options):
        error = _output_error(weights, inputs.sample, scale, spec, scale_dtype)
        if error < best.error:
            best = ScaleSearch(scale, family, exponent, rtn_error, error)
    return best


def _candidates(
    weights: Sequence[Tensor], inputs: InputStatistics, spec: QuantSpec, options: AwqOptions
) -> Iterator[tuple[ScaleFamily, float, Tensor]]:
    """Every scale to try except all ones, smaller exponents first."""
    activity = inputs.mean_abs
    top = float(activity.max())
    if top == 0:
        return
    activity = activity.clamp(min=ACTIVITY_FLOOR * top)
    share = _weight_share(weights, spec) if "activation_over_weight" in options.families else activity
    for step in range(options.steps + 1):
        alpha = step / options.steps
        for family in options.families:
            if family == "activation":
                if step == 0:
                    continue
                scale = activity**alpha
            else:
                scale = activity**alpha / share ** (1 - alpha)
            # Only ratios matter to rounding: centred on 1, the folded tensors keep their magnitude.
            yield family, alpha, scale / (scale.max() * scale.min()).sqrt()


def _weight_share(weights: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """Mean over all rows of |w| relative to the largest of its group, float32 (K,), floored like activity."""
    K = weights[0].shape[1]
    columns = spec.columns_per_group(K)
    total = torch.zeros(K, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        padded = torch.nn.functional.pad(weight.float().abs(), (0, -K % columns))
        grouped = padded.view(weight.shape[0], -1, columns)
        largest = grouped.amax(dim=-1, keepdim=True)
        relative = grouped / largest.clamp(min=torch.finfo(torch.float32).tiny)
        total += relative.view(weight.shape[0], -1)[:, :K].sum(dim=0, dtype=torch.float64)
    share = (total / sum(weight.shape[0] for weight in weights)).float()
    return share.clamp(min=max(ACTIVITY_FLOOR * float(share.max()), torch.finfo(torch.float32).tiny))


def _output_error(
    weights: Sequence[Tensor], x: Tensor, scale: Tensor, spec: QuantSpec, scale_dtype: torch.dtype | None
) -> float:
    """|| x W.T - (x / scale) Q(W * scale).T ||**2 summed over the weights, x float32 (S, K)."""
    total = 0.0
    for weight in weights:
        exact = weight.float()
        # scale_dtype None means the weight's own, which the product with a float32 scale would hide.
        delta = fake_quantize(exact * scale, spec, scale_dtype=_stored_dtype(weight, scale_dtype))
        delta.div_(scale).sub_(exact)
        total += float((x @ delta.t()).square_().sum(dtype=torch.float64))
    return total


def _stored_dtype(weight: Tensor, scale_dtype: torch.dtype | None) -> torch.dtype:
    if scale_dtype is not None:
        return scale_dtype
    return stored_scale_dtype(weight)


@torch.no_grad()
def search_range_ratio(
    weight: Tensor,
    x: Tensor,
    spec: QuantSpec,
    ratios: Sequence[float],
    *,
    scale_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Find the part of each group's range to keep.

    weight: float (N, K); x: float32 (S, K), what the layer reads; ratios: parts to try besides 1.
    Returns range_ratio (N, G) for `quantize_rtn`, None when keeping all ranges whole is best. Each group
    takes the ratio with the least || x_g (w_g - Q(w_g)).T ||; the groups' errors add up with their
    correlations, so the result is kept only if it lowers the error of the whole layer.
    """
    exact = weight.float()
    scale_dtype = _stored_dtype(weight, scale_dtype)
    measure = _group_error_measure(x, exact, spec)
    whole = fake_quantize(exact, spec, scale_dtype=scale_dtype).sub_(exact)
    whole_error = float((x @ whole.t()).square_().sum(dtype=torch.float64))
    best_error = measure(whole)
    best = torch.ones_like(best_error)
    for ratio in ratios:
        candidate = torch.full_like(best, ratio)
        delta = fake_quantize(exact, spec, scale_dtype=scale_dtype, range_ratio=candidate).sub_(exact)
        error = measure(delta)
        better = error < best_error
        best = torch.where(better, candidate, best)
        best_error = torch.where(better, error, best_error)
    delta = fake_quantize(exact, spec, scale_dtype=scale_dtype, range_ratio=best).sub_(exact)
    error_of_best = float((x @ delta.t()).square_().sum(dtype=torch.float64))
    return best if error_of_best < whole_error else None


def _group_error_measure(x: Tensor, weight: Tensor, spec: QuantSpec) -> Callable[[Tensor], Tensor]:
    """A function from delta (N, K) to || x_g delta_g.T ||**2, float32 (N, G)."""
    S, K = x.shape
    columns = spec.columns_per_group(K)
    groups = spec.num_groups(K)
    if columns >= S:
        # One group, or few rows: the products themselves are smaller than their Gram matrices.
        padded = torch.nn.functional.pad(x, (0, -K % columns)).view(S, groups, columns).permute(1, 2, 0)

        def by_rows(delta: Tensor) -> Tensor:
            grouped = torch.nn.functional.pad(delta, (0, -K % columns)).view(-1, groups, columns)
            return torch.bmm(grouped.transpose(0, 1), padded).square_().sum(dim=-1).t()

        return by_rows
    parts = torch.nn.functional.pad(x, (0, -K % columns)).view(S, groups, columns).permute(1, 0, 2)
    gram = torch.bmm(parts.transpose(1, 2), parts)

    def by_gram(delta: Tensor) -> Tensor:
        grouped = torch.nn.functional.pad(delta, (0, -K % columns)).view(-1, groups, columns).transpose(0, 1)
        return (torch.bmm(grouped, gram) * grouped).sum(dim=-1).t()

    return by_gram


@torch.no_grad()
def quantize_layer(
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, InputStatistics],
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype | None = None,
    options: AwqOptions | None = None,
    groups: Sequence[LinearGroup] = DECODER_LAYER,
) -> QuantizedLayer:
    """Quantise the linear layers of one decoder layer with activation-aware scales.

    tensors: the layer's tensors by their names within it ("self_attn.q_proj.weight",
    "input_layernorm.weight", biases where there are any), on the device of the statistics; they are not
    modified. inputs: statistics of the input of each group, by group name.
    scale_dtype: dtype of the stored scales, None: that of each weight.

    Keys and values stay the same functions of the layer's input, up to rounding (see the top of the file).
    Raises ValueError naming a missing tensor or group, or what does not fit.
    """
    options = AwqOptions() if options is None else options
    for group in groups:
        if group.name not in inputs:
            raise ValueError(f"inputs has no {group.name!r}, expected one of each: {', '.join(inputs)} given")
    searches: dict[str, ScaleSearch] = {}
    for group in groups:
        weights = [require_tensor(tensors, f"{linear}.weight") for linear in group.linears]
        unscaled = AwqOptions(steps=1, families=())
        searches[group.name] = search_scale(
            weights,
            inputs[group.name],
            spec,
            scale_dtype=scale_dtype,
            options=unscaled if group.fold is None else options,
        )
    scales = {name: search.scale for name, search in searches.items() if search.family is not None}
    changed, applied = fold_scales(tensors, scales, groups)
    row_scales = {
        group.fold.module: applied[group.name]
        for group in groups
        if group.fold is not None and group.fold.kind == "rows" and group.name in applied
    }
    packed: dict[str, PackedWeight] = {}
    reports: list[GroupReport] = []
    for group in groups:
        search = searches[group.name]
        x = inputs[group.name].sample
        read = x / applied[group.name] if group.name in applied else x
        signal = error = 0.0
        for linear in group.linears:
            original = require_tensor(tensors, f"{linear}.weight")
            weight = changed.pop(f"{linear}.weight", original)
            stored = _stored_dtype(original, scale_dtype)
            ratio = None
            if linear in group.clipped and options.range_ratios:
                ratio = search_range_ratio(weight, read, spec, options.range_ratios, scale_dtype=stored)
            packed[linear] = quantize_rtn(weight, spec, scale_dtype=stored, range_ratio=ratio)
            delta = fake_quantize(weight, spec, scale_dtype=stored, range_ratio=ratio).sub_(weight.float())
            if linear in row_scales:
                # Its rows were divided: the error counts at the scale of the original output.
                delta.mul_(row_scales[linear].unsqueeze(1))
            error += float((read @ delta.t()).square_().sum(dtype=torch.float64))
            signal += float((x @ original.float().t()).square_().sum(dtype=torch.float64))
        norm = max(signal, torch.finfo(torch.float64).tiny)
        reports.append(
            GroupReport(
                group.name,
                search.family,
                search.exponent,
                (search.rtn_error / norm) ** 0.5,
                (search.error / norm) ** 0.5,
                (error / norm) ** 0.5,
            )
        )
    return QuantizedLayer(MappingProxyType(packed), MappingProxyType(changed), tuple(reports))
