"""wna16_linear: activations times a low-bit weight, and how a weight is prepared for it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher_of
from qsun_kernels.backends.problems import BackendName, PendingNorm, PreparedWeight, Wna16Problem
from qsun_kernels.ops import checks
from qsun_kernels.ops.dequantize import encode_group_size
from qsun_kernels.ops.library import is_traced, refuse_gradient, register
from qsun_kernels.ops.prepared import check_prepared, prepare, rebuilt
from qsun_kernels.ops.wna16_linear_pending_norm import take
from qsun_kernels.quant import PackedWeight

__all__ = ["prepare_weight", "wna16_linear"]


def prepare_weight(
    packed: PackedWeight,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    backend: BackendName | None = None,
) -> PreparedWeight:
    """Choose the backend that will multiply by this weight, and lay the weight out for it.

    dtype: of the activations, float32, float16 or bfloat16; scales are rounded to it, so that every backend
    computes the same function. device: where the weight goes, by default where it is. The choice is made
    here, once: the context and the environment are not asked again when the weight is used.

    Raises TypeError or ValueError naming the argument (a scale that `dtype` cannot hold among them), and
    BackendUnavailable.
    """
    return prepare("prepare_weight", Wna16Problem, packed, dtype, device, backend)


def wna16_linear(
    x: Tensor | PendingNorm,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    backend: BackendName | None = None,
) -> Tensor:
    """``x @ W.T (+ bias) (+ residual)`` with W the weight that the codes stand for, accumulated in float32.

    x (..., K) of the dtype and on the device that the weight was prepared for, last dimension of stride 1;
    bias (N,), residual (..., N) and out (..., N) like it. Returns (..., N), which is `out` when that is given
    (contiguous, and sharing no memory with the inputs). Kernels round once, at the end; torch, where it has
    no fused form of a bias or residual, rounds the product first. x may also be rows whose norm is pending
    (`wna16_linear_pending_norm`), for calls that are neither traced nor batch_invariant.

    batch_invariant: row i of the result is, bit for bit, what it is for row i of x alone, whatever the number
    of the other rows and what they hold. Results repeat either way; what this takes is the freedom to cut the
    work by the number of rows, so it may be slower. A backend that cannot promise it raises.
    backend: the weight's own, or ValueError: the layout was made for it by `prepare_weight`.

    Raises TypeError or ValueError naming the argument, RuntimeError if a gradient is wanted; for a norm that
    is pending also BackendUnavailable, and RuntimeError in traced code.
    """
    if isinstance(x, PendingNorm):
        _check(x.weighted, weight, bias, residual, out, batch_invariant, backend)
        if batch_invariant:
            raise ValueError("batch_invariant is True, expected False for an x whose norm is pending")
        return take(x, weight, bias, residual, out)
    _check(x, weight, bias, residual, out, batch_invariant, backend)
    if is_traced(x, bias, residual, out, *weight.tensors):
        spec = weight.spec
        y = torch.ops.qsun.wna16_linear(
            x,
            list(weight.tensors),
            weight.layout,
            spec.bits,
            encode_group_size(spec),
            spec.symmetric,
            weight.N,
            weight.K,
            bias,
            residual,
            batch_invariant,
        )
        return cast(Tensor, y if out is None else out.copy_(y))
    return _launch(x, weight, bias, residual, out, batch_invariant)


def _check(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool,
    backend: str | None,
) -> None:
    check_prepared(weight, "wna16_linear", backend)
    dtype, device = weight.dtype, weight.device
    checks.beside("x", x, dtype, device, "for which the weight was prepared")
    checks.rows("x", x)
    if x.shape[-1] != weight.K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K) = (..., {weight.K})")
    if bias is not None:
        checks.beside("bias", bias, dtype, device, "like x")
        checks.shape("bias", bias, (weight.N,), "(N,)")
        checks.contiguous("bias", bias)
    if residual is not None:
        checks.beside("residual", residual, dtype, device, "like x")
        checks.shape("residual", residual, (*x.shape[:-1], weight.N), "(..., N)")
        checks.rows("residual", residual)
    if out is not None:
        checks.beside("out", out, dtype, device, "like x")
        checks.shape("out", out, (*x.shape[:-1], weight.N), "(..., N)")
        checks.contiguous("out", out)
        if out is x or out is residual:
            raise ValueError(f"out is {'x' if out is x else 'residual'}, expected memory of its own")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant is {batch_invariant!r}, expected True or False")
    refuse_gradient("wna16_linear", x=x, bias=bias, residual=residual, out=out)


def _launch(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    run = launcher_of(weight.backend, "wna16_linear")
    if x.dim() == 2:
        return cast(Tensor, run(x, weight, bias, residual, out, batch_invariant))
    rows = x.numel() // weight.K
    y = run(
        x.reshape(rows, weight.K),
        weight,
        bias,
        None if residual is None else residual.reshape(rows, weight.N),
        None if out is None else out.view(rows, weight.N),
        batch_invariant,
    )
    return cast(Tensor, y.view(*x.shape[:-1], weight.N) if out is None else out)


def _run(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
    bias: Tensor | None,
    residual: Tensor | None,
    batch_invariant: bool = False,
) -> Tensor:
    prepared = rebuilt("wna16_linear", weight, layout, bits, group_size, symmetric, N, K, x.dtype)
    return _launch(x, prepared, bias, residual, None, batch_invariant)


def _fake(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
    bias: Tensor | None,
    residual: Tensor | None,
    batch_invariant: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], N))


register(
    "wna16_linear(Tensor x, Tensor[] weight, str layout, int bits, int group_size, bool symmetric, "
    "int N, int K, Tensor? bias, Tensor? residual, bool batch_invariant=False) -> Tensor",
    _run,
    _fake,
)
