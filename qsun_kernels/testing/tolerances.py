"""When a result is right.

The rule: *the error against float64 is at most twice that of the same computation in torch at the same
precision.* Nothing is tuned case by case: a harder problem is harder for torch, too. Precisely, for a result
`got` of some dtype, the `exact` result in float64 and the `plain` result of torch in that dtype:

Scale
    Errors are relative to a scale that cancellation does not shrink. Where an element is a sum: the largest
    of its own magnitude, that of what is rounded on the way, and the root of its terms' squares (what the sum
    would be, were their signs random). Else |exact| of the element, or the largest finite |exact| of its row
    (the last dimension).
Worst
    ``worst(got) <= 2 * max(worst(plain), u)``: worst is the largest error, u = eps / 2 the rounding that even
    a perfect result has.
Typical
    For 64 elements and more, ``typical(got) <= 2 * max(typical(plain), u / 2)``: typical is the root of the
    mean square, which sees a loss of precision everywhere that hides below the worst element.
Accumulation
    A result of few elements can be lucky in torch. Where `terms` (the sum of the absolute values that an
    element adds up) is given, float32 accumulation may cost each element a further ``2 * 2**-24 * terms``.
Limits of the dtype
    Below the normal range half the smallest subnormal is free. NaN must meet NaN, and an infinity one of its
    sign or a value that rounds to one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Comparison", "Scale", "all_of", "compare", "compare_bits"]

Scale = Literal["row", "element"]

# Fewer elements have no typical error apart from their worst.
_TYPICAL_FROM = 64

_ACCUMULATION_ROUNDOFF = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """The judgement on one result.

    worst, plain_worst: largest error of the result and of the torch computation, relative to the scale.
    allowed: what `worst` may be. report: one line with all of it, and the offending element.
    """

    ok: bool
    worst: float
    plain_worst: float
    allowed: float
    report: str

    def require(self) -> None:
        """AssertionError with the report unless the result is right."""
        if not self.ok:
            raise AssertionError(self.report)


def all_of(comparisons: Iterable[Comparison]) -> Comparison:
    """The first comparison that failed, else the one nearest to its limit."""
    several = list(comparisons)
    failed = [one for one in several if not one.ok]
    return failed[0] if failed else max(several, key=lambda one: one.worst / max(one.allowed, 1e-300))


def compare(
    name: str,
    got: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    scale: Scale | Tensor = "row",
    terms: Tensor | None = None,
) -> Comparison:
    """Judge `got` by the rule of this module.

    exact, terms: float64, plain: the dtype of got; all of the shape of got (terms may broadcast to it), any
    device.
    """
    if got.shape != exact.shape or got.dtype != plain.dtype:
        report = f"{name}: got {got.dtype} {tuple(got.shape)}, expected {plain.dtype} {tuple(exact.shape)}"
        return Comparison(False, float("inf"), 0.0, 0.0, report)
    if got.numel() == 0:
        return Comparison(True, 0.0, 0.0, 0.0, f"{name}: empty")
    exact = exact.to(got.device, torch.float64)
    finfo = torch.finfo(got.dtype)
    roundoff = finfo.eps / 2
    underflow = finfo.smallest_normal * finfo.eps / 2
    free: Tensor | float = underflow
    if terms is not None:
        free = underflow + 2 * _ACCUMULATION_ROUNDOFF * terms.to(exact.device)
    unit = _scale(exact, scale) if isinstance(scale, str) else scale.to(exact.device)
    got_error = _relative_error(got, exact, unit, free)
    plain_error = _relative_error(plain.to(got.device), exact, unit, underflow)
    worst, plain_worst = got_error.max().item(), plain_error.max().item()
    typical, plain_typical = (
        got_error.square().mean().sqrt().item(),
        plain_error.square().mean().sqrt().item(),
    )
    # A plain computation that overflowed says nothing about precision.
    allowed = 2 * max(plain_worst if isfinite(plain_worst) else 0.0, roundoff)
    allowed_typical = 2 * max(plain_typical if isfinite(plain_typical) else 0.0, roundoff / 2)
    if got.numel() < _TYPICAL_FROM:
        allowed_typical = allowed
    where = tuple(int(i) for i in torch.unravel_index(got_error.argmax(), got.shape))
    report = (
        f"{name}: worst error {worst:.3g} (allowed {allowed:.3g}, torch {plain_worst:.3g}) at {list(where)}: "
        f"got {got[where].item():.9g}, exact {exact[where].item():.9g}; "
        f"typical error {typical:.3g} (allowed {allowed_typical:.3g}, torch {plain_typical:.3g})"
    )
    return Comparison(worst <= allowed and typical <= allowed_typical, worst, plain_worst, allowed, report)


def compare_bits(name: str, got: Tensor, expected: Tensor) -> Comparison:
    """Judge a result that has to be the same bit for bit, NaN included."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        report = (
            f"{name}: got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
        return Comparison(False, float("inf"), 0.0, 0.0, report)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = got.contiguous().view(integer) != expected.to(got.device).contiguous().view(integer)
    count = int(differs.sum())
    if not count:
        return Comparison(True, 0.0, 0.0, 0.0, f"{name}: the same {got.numel()} values")
    where = tuple(int(i) for i in differs.nonzero()[0])
    report = (
        f"{name}: {count} of {got.numel()} values differ, first at {list(where)}: "
        f"got {got[where].item():.9g}, expected {expected[where].item():.9g}"
    )
    return Comparison(False, float("inf"), 0.0, 0.0, report)


def _scale(exact: Tensor, scale: Scale) -> Tensor:
    """What errors are relative to, of the shape of exact; 0 where nothing finite is."""
    magnitude = exact.abs()
    magnitude = magnitude.where(magnitude.isfinite(), 0.0)
    if scale == "row" and exact.dim():
        return magnitude.amax(-1, keepdim=True).expand_as(exact)
    return magnitude


def _relative_error(value: Tensor, exact: Tensor, unit: Tensor, free: Tensor | float) -> Tensor:
    """|value - exact| beyond what is free, relative to the unit; infinity for what no unit measures."""
    wide = value.to(torch.float64)
    error = ((wide - exact).abs() - free).clamp_(min=0.0)
    relative = torch.where(error == 0, 0.0, error / unit)
    # Overflow where the exact result rounds to it, and NaN where the exact result is NaN, are no errors.
    same = (value == exact.to(value.dtype)) | (wide.isnan() & exact.isnan())
    relative = torch.where(same & ~wide.isfinite(), 0.0, relative)
    return torch.where(relative.isnan(), torch.inf, relative)
