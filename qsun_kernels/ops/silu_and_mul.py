"""silu_and_mul: the gated activation between the two matrices of a feed-forward layer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import BackendName, SiluAndMulProblem
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register

__all__ = ["silu_and_mul"]


def silu_and_mul(x: Tensor, *, backend: BackendName | None = None) -> Tensor:
    """``silu(gate) * up`` with silu(z) = z / (1 + exp(-z)) (SwiGLU, Shazeer, arXiv 2002.05202).

    x (..., 2F) = [gate | up], float32, float16 or bfloat16, last dimension of stride 1. Returns (..., F) of
    its dtype, computed in float32.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    checks.floating("x", x)
    checks.rows("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., 2F): an even last size")
    refuse_gradient("silu_and_mul", x=x)
    if is_traced(x):
        return cast(Tensor, torch.ops.qsun.silu_and_mul(x, backend=backend))
    return _launch(x, backend=backend)


def _launch(x: Tensor, *, backend: str | None = None) -> Tensor:
    run = launcher(requested_backend(backend), SiluAndMulProblem, x.shape[-1] // 2, x.dtype, x.device)
    return cast(Tensor, run(x))


def _fake(x: Tensor, *, backend: str | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


register("silu_and_mul(Tensor x, *, str? backend=None) -> Tensor", _launch, _fake)
