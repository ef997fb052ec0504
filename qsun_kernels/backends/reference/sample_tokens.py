"""sample_tokens in torch: the specification.

With x the logits of a row as float32 and the row's parameters:

    scaled  = (x - max x) / temperature                 float32, one rounding each
    order   = by scaled, the largest first, equals by index, the lowest first
    top-k   keeps the first top_k of the order
    top-p   keeps, of these, the shortest beginning whose mass is at least top_p of theirs
    min-p   keeps, of these, scaled >= log(min_p)       float32, the logarithm rounded once
    token   = the index of the largest scaled + noise   float32, equals: the lowest index

A row without a temperature takes the index of the largest x. The maximum itself is never filtered out.

Masses are integers, about 2**40 exp(scaled), and so are their sums: they come out the same in every order of
addition and on every device, and so do the tokens that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, SampleTokensProblem
from qsun_kernels.backends.reference.dtypes import refuse_dtypes
from qsun_kernels.backends.reference.gumbel_noise import gumbel_noise

LOG2_E = 1549082005
"""log2(e), times 2**30."""

POWERS = (2147483487, 1488511653, 515765849, 118712300, 19732393, 2016033)
"""2**-f for f in [0, 1) is the sum of (-1)**k POWERS[k] f**k over 2**31, within 2**-23 of itself: the fit of
degree 5 whose largest relative error is smallest."""

FARTHEST = 31.0
"""exp(-FARTHEST) is below the unit of the masses."""


def relative_mass(scaled: Tensor) -> Tensor:
    """int64: 2**40 exp(scaled) for float32 scaled <= 0, within 2**-23 of itself and 1, in integers alone."""
    fixed = scaled.neg().clamp_(max=FARTHEST).mul_(2.0**27).long()  # exact: 27 bits of fraction
    exponent = (fixed * LOG2_E) >> 32  # to the base 2, 25 bits of fraction
    fraction = (exponent & ((1 << 25) - 1)) << 7
    power = torch.full_like(fraction, POWERS[-1])
    for coefficient in POWERS[-2::-1]:
        power = coefficient - ((power * fraction) >> 32)
    return (power << 9) >> (exponent >> 25)


def filtered(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scaled logits float32 (B, V), the largest of each row 0, with -inf for what the parameters drop."""
    # On the CPU it costs nothing to see that nobody asks; on a GPU, looking would wait for the device.
    if scaled.device.type != "cpu" or bool(((top_k > 0) | (top_p < 1)).any()):
        scaled = _first_in_order(scaled, top_k.long()[:, None], top_p.double()[:, None])
    lowest = torch.where(min_p > 0, min_p.clamp(max=1).double().log().float(), float("-inf"))
    return scaled.masked_fill(scaled < lowest[:, None], float("-inf"))


def _first_in_order(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """top-k and top-p. top_k int64 (B, 1), top_p float64 (B, 1)."""
    size = scaled.shape[1]
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(size, device=scaled.device) < torch.where(top_k > 0, top_k, size)
    mass = relative_mass(ordered) * kept
    reached = mass.cumsum(dim=-1)
    # A share of next to nothing still keeps the first.
    wanted = (reached[:, -1:].double() * top_p).ceil().clamp(min=1).long()
    kept &= (reached - mass < wanted) | ~(top_p < 1)
    return scaled.masked_fill(torch.empty_like(kept).scatter_(1, order, ~kept), float("-inf"))


def supports(problem: SampleTokensProblem) -> str | None:
    """Every vocabulary, on every device."""
    return refuse_dtypes(dtype=problem.dtype)


def describe(problem: SampleTokensProblem) -> str:
    """What runs."""
    return "torch operations: a sort of each row, sums of integers"


def run(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """logits (B, V), the rest (B,) -> tokens int64 (B,), valid bool (B,); see the module's text."""
    x = logits.float()
    # NaN propagates through the maximum; +inf or nothing but -inf shows there as well.
    highest = x.amax(dim=-1)
    valid = highest.isfinite()
    draws = temperature > 0
    if logits.device.type != "cpu" or bool(draws.any()):
        divisor = torch.where(draws, temperature, 1.0).clamp(max=torch.finfo(torch.float32).max)
        # What is not finite stays out of the arithmetic; those rows are answered below.
        x = torch.where(valid[:, None], x, 0.0)
        scaled = (x - torch.where(valid, highest, 0.0)[:, None]) / divisor[:, None]
        noisy = filtered(scaled, top_k, top_p, min_p) + gumbel_noise(keys, logits.shape[1])
        x = torch.where(draws[:, None], noisy, x)
    return torch.where(valid, x.argmax(dim=-1), 0), valid


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
