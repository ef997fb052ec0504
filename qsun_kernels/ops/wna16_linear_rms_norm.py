"""wna16_linear_rms_norm: the product that ends a residual block, and the norm that begins the next one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher_of
from qsun_kernels.backends.problems import BackendName, PreparedWeight
from qsun_kernels.ops import checks
from qsun_kernels.ops.dequantize import encode_group_size
from qsun_kernels.ops.library import is_traced, refuse_gradient, register
from qsun_kernels.ops.prepared import check_prepared, rebuilt

__all__ = ["wna16_linear_rms_norm"]


def wna16_linear_rms_norm(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x @ W.T (+ bias) + residual``, and its norm ``r / sqrt(mean(r**2) + eps) * norm_weight``.

    Returns (norm, r), both (..., N), as `rms_norm` with a residual does: the input of the next layer and the
    residual stream. They are, bit for bit, what `wna16_linear` with this residual and `rms_norm` behind it
    return: r is rounded to the dtype of x before its norm is taken. What is saved is a launch, and the way of
    r through memory, where a kernel can end the product with the norm.

    x (..., K), weight from `prepare_weight`, bias (N,), batch_invariant and backend as for `wna16_linear`;
    residual (..., N) and norm_weight (N,) of the dtype of x. norm_weight may be read as early as the weight,
    while launches in front still run: where one of them writes it, use `PreparedWeight.in_stream_order()`.

    Raises TypeError or ValueError naming the argument, RuntimeError if a gradient is wanted.
    """
    _check(x, weight, residual, norm_weight, eps, bias, batch_invariant, backend)
    if is_traced(x, residual, norm_weight, bias, *weight.tensors):
        spec = weight.spec
        return cast(
            "tuple[Tensor, Tensor]",
            torch.ops.qsun.wna16_linear_rms_norm(
                x,
                list(weight.tensors),
                weight.layout,
                spec.bits,
                encode_group_size(spec),
                spec.symmetric,
                weight.N,
                weight.K,
                residual,
                norm_weight,
                eps,
                bias,
                batch_invariant,
            ),
        )
    return _launch(x, weight, residual, norm_weight, eps, bias, batch_invariant)


def _check(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    batch_invariant: bool,
    backend: str | None,
) -> None:
    check_prepared(weight, "wna16_linear", backend)
    dtype, device = weight.dtype, weight.device
    checks.beside("x", x, dtype, device, "for which the weight was prepared")
    checks.rows("x", x)
    if x.shape[-1] != weight.K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K) = (..., {weight.K})")
    checks.beside("residual", residual, dtype, device, "like x")
    checks.shape("residual", residual, (*x.shape[:-1], weight.N), "(..., N)")
    checks.rows("residual", residual)
    vectors = {"norm_weight": norm_weight} if bias is None else {"norm_weight": norm_weight, "bias": bias}
    for name, vector in vectors.items():
        checks.beside(name, vector, dtype, device, "like x")
        checks.shape(name, vector, (weight.N,), "(N,)")
        checks.contiguous(name, vector)
    checks.epsilon("eps", eps)
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant is {batch_invariant!r}, expected True or False")
    refuse_gradient("wna16_linear_rms_norm", x=x, residual=residual, norm_weight=norm_weight, bias=bias)


def _launch(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    run = launcher_of(weight.backend, "wna16_linear_rms_norm")
    if x.dim() == 2:
        both = run(x, weight, residual, norm_weight, eps, bias, batch_invariant)
        return cast("tuple[Tensor, Tensor]", both)
    rows, shape = x.numel() // weight.K, residual.shape
    norm, stream = run(
        x.reshape(rows, weight.K),
        weight,
        residual.reshape(rows, weight.N),
        norm_weight,
        eps,
        bias,
        batch_invariant,
    )
    return norm.view(shape), stream.view(shape)


def _run(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    prepared = rebuilt("wna16_linear", weight, layout, bits, group_size, symmetric, N, K, x.dtype)
    return _launch(x, prepared, residual, norm_weight, eps, bias, batch_invariant)


def _fake(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], N)
    return x.new_empty(shape), x.new_empty(shape)


register(
    "wna16_linear_rms_norm(Tensor x, Tensor[] weight, str layout, int bits, int group_size, bool symmetric, "
    "int N, int K, Tensor residual, Tensor norm_weight, float eps, Tensor? bias=None, "
    "bool batch_invariant=False) -> (Tensor, Tensor)",
    _run,
    _fake,
)
