"""wna16_gate_up_silu: the first half of a gated feed-forward layer with a low-bit weight, in one call."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher_of
from qsun_kernels.backends.problems import (
    BackendName,
    PendingNorm,
    PreparedWeight,
    Wna16GateUpSiluProblem,
)
from qsun_kernels.ops import checks
from qsun_kernels.ops.dequantize import encode_group_size
from qsun_kernels.ops.library import is_traced, refuse_gradient, register
from qsun_kernels.ops.prepared import check_prepared, prepare, rebuilt
from qsun_kernels.ops.wna16_linear_pending_norm import take
from qsun_kernels.quant import PackedWeight

__all__ = ["prepare_gate_up", "wna16_gate_up_silu"]


def prepare_gate_up(
    packed: PackedWeight,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    backend: BackendName | None = None,
) -> PreparedWeight:
    """Choose the backend that will multiply by gate and up, and lay the two out for it as one weight.

    packed: [gate; up] (2I, K), gate first (see `qsun_kernels.quant.concatenate_rows`). The rest as for
    `prepare_weight`.

    Raises TypeError or ValueError naming the argument (an odd number of rows, a scale that `dtype` cannot
    hold), and BackendUnavailable.
    """
    if isinstance(packed, PackedWeight) and packed.N % 2:
        raise ValueError(f"packed has N = {packed.N} rows, expected an even number: gate, then up")
    return prepare("prepare_gate_up", Wna16GateUpSiluProblem, packed, dtype, device, backend)


def wna16_gate_up_silu(
    x: Tensor | PendingNorm,
    weight: PreparedWeight,
    *,
    out: Tensor | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, silu(z) = z / (1 + exp(-z)) (SwiGLU, Shazeer, arXiv 2002.05202).

    x (..., K) of the dtype and on the device that `prepare_gate_up` prepared the weight for, last dimension
    of stride 1; out (..., I) like it. Returns (..., I), which is `out` when that is given (contiguous, and
    sharing no memory with x). Sums, silu and the product of the two are float32. Where the work is more than
    one kernel (torch, Triton), gate and up are rounded to the dtype of x in between, so that float16 has to
    hold them. x may also be rows whose norm is pending (`wna16_linear_pending_norm`), for calls that are not
    traced. backend: the weight's own, or ValueError.

    Raises TypeError or ValueError naming the argument, RuntimeError if a gradient is wanted; for a norm that
    is pending also BackendUnavailable, and RuntimeError in traced code.
    """
    if isinstance(x, PendingNorm):
        _check(x.weighted, weight, out, backend)
        return take(x, weight, None, None, out)
    _check(x, weight, out, backend)
    if is_traced(x, out, *weight.tensors):
        spec = weight.spec
        y = torch.ops.qsun.wna16_gate_up_silu(
            x,
            list(weight.tensors),
            weight.layout,
            spec.bits,
            encode_group_size(spec),
            spec.symmetric,
            weight.N,
            weight.K,
        )
        return cast(Tensor, y if out is None else out.copy_(y))
    return _launch(x, weight, out)


def _check(x: Tensor, weight: PreparedWeight, out: Tensor | None, backend: str | None) -> None:
    check_prepared(weight, "wna16_gate_up_silu", backend)
    dtype, device = weight.dtype, weight.device
    checks.beside("x", x, dtype, device, "for which the weight was prepared")
    checks.rows("x", x)
    if x.shape[-1] != weight.K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., K) = (..., {weight.K})")
    if out is not None:
        checks.beside("out", out, dtype, device, "like x")
        checks.shape("out", out, (*x.shape[:-1], weight.N // 2), "(..., I)")
        checks.contiguous("out", out)
        if out is x:
            raise ValueError("out is x, expected memory of its own")
    refuse_gradient("wna16_gate_up_silu", x=x, out=out)


def _launch(x: Tensor, weight: PreparedWeight, out: Tensor | None) -> Tensor:
    run = launcher_of(weight.backend, "wna16_gate_up_silu")
    if x.dim() == 2:
        return cast(Tensor, run(x, weight, out))
    rows, width = x.numel() // weight.K, weight.N // 2
    y = run(x.reshape(rows, weight.K), weight, None if out is None else out.view(rows, width))
    return cast(Tensor, y.view(*x.shape[:-1], width) if out is None else out)


def _run(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
) -> Tensor:
    prepared = rebuilt("wna16_gate_up_silu", weight, layout, bits, group_size, symmetric, N, K, x.dtype)
    return _launch(x, prepared, None)


def _fake(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], N // 2))


register(
    "wna16_gate_up_silu(Tensor x, Tensor[] weight, str layout, int bits, int group_size, bool symmetric, "
    "int N, int K) -> Tensor",
    _run,
    _fake,
)
