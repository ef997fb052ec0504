"""The elementwise parts of a layer, differentiable, with the arithmetic of the operators that serve.

Each is computed in float32 (float64 for float64) and rounded once, as `qsun_kernels` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Kernels:
    """normalise: (x, weight, eps) -> x.  rotate: (heads, cos, sin) -> heads.  gate: [gate | up] -> x."""

    normalise: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]


def eager_kernels() -> Kernels:
    """One torch operation after the other."""
    return Kernels(_normalise, _rotate, _gate)


def compiled_kernels() -> Kernels:
    """Each part fused by torch.compile for any number of rows: worth its half minute on a GPU."""
    return Kernels(*(torch.compile(part, dynamic=True) for part in (_normalise, _rotate, _gate)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H) to unit root mean square, times weight (H,) (arXiv 1910.07467, equation 4)."""
    wide = x.to(_wide(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of heads (T, heads, D) turned; cos, sin (T, 1, D/2) (arXiv 2104.09864, 3.4.2)."""
    first, second = heads.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads.dtype)


def _gate(x: Tensor) -> Tensor:
    """silu(gate) * up for rows [gate | up] of x (T, 2F) (SwiGLU, arXiv 2002.05202)."""
    gate, up = x.to(_wide(x.dtype)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)
