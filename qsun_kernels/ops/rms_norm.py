"""rms_norm: root-mean-square norm, with the residual addition before it if wanted."""

from __future__ import annotations

from typing import cast, overload

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import BackendName, RmsNormProblem
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register

__all__ = ["rms_norm"]


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: None = None,
    prefetch_weight: bool = False,
    backend: BackendName | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor,
    prefetch_weight: bool = False,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    prefetch_weight: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``r / sqrt(mean(r**2) + eps) * weight`` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    x (..., H) float32, float16 or bfloat16, last dimension of stride 1; weight (H,) and residual (like x) of
    its dtype. Without a residual r is x, and the norm (..., H) is returned. With one, r is x + residual
    rounded to the dtype of x, and (norm, r) are returned: the input of the next layer and the residual
    stream. Arithmetic is float32.

    prefetch_weight: a promise that no launch under way on the stream writes the weight. A kernel may then
    read it while those in front still run; in traced code it does not.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    _check(x, weight, eps, residual)
    if is_traced(x, weight, residual):
        if residual is None:
            return cast(Tensor, torch.ops.qsun.rms_norm(x, weight, eps, backend=backend))
        return cast(
            "tuple[Tensor, Tensor]",
            torch.ops.qsun.rms_norm_residual(x, residual, weight, eps, backend=backend),
        )
    return _launch(x, weight, eps, residual, prefetch_weight, backend)


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    checks.floating("x", x)
    checks.rows("x", x)
    checks.beside("weight", weight, x.dtype, x.device, "like x")
    checks.shape("weight", weight, x.shape[-1:], "(H,)")
    checks.contiguous("weight", weight)
    checks.epsilon("eps", eps)
    if residual is not None:
        checks.beside("residual", residual, x.dtype, x.device, "like x")
        checks.shape("residual", residual, x.shape, "the shape of x")
        checks.rows("residual", residual)
    refuse_gradient("rms_norm", x=x, weight=weight, residual=residual)


def _launch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    prefetch_weight: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    run = launcher(
        requested_backend(backend), RmsNormProblem, x.shape[-1], residual is not None, x.dtype, x.device
    )
    return cast("Tensor | tuple[Tensor, Tensor]", run(x, weight, eps, residual, prefetch_weight))


def _run(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    return cast(Tensor, _launch(x, weight, eps, None, False, backend))


def _run_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _launch(x, weight, eps, residual, False, backend))


def _fake(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


def _fake_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


register("rms_norm(Tensor x, Tensor weight, float eps, *, str? backend=None) -> Tensor", _run, _fake)
register(
    "rms_norm_residual(Tensor x, Tensor residual, Tensor weight, float eps, *, str? backend=None) "
    "-> (Tensor, Tensor)",
    _run_residual,
    _fake_residual,
)
