"""dequantize: the dense weight that codes, scales and zero points stand for."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import BackendName, DequantizeProblem
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register
from qsun_kernels.quant import PackedWeight, QuantSpec

__all__ = ["decode_spec", "dequantize", "encode_group_size"]

_CHANNEL = -1
"""How schemas, which know integers only, write a group as wide as the row."""


def encode_group_size(spec: QuantSpec) -> int:
    """The group size as schemas carry it: -1 for "channel"."""
    return _CHANNEL if spec.group_size == "channel" else spec.group_size


def decode_spec(bits: int, group_size: int, symmetric: bool) -> QuantSpec:
    """The spec that three arguments of a schema stand for. Raises ValueError when they are none."""
    return QuantSpec(bits, "channel" if group_size == _CHANNEL else group_size, symmetric)  # type: ignore[arg-type]


def dequantize(weight: PackedWeight, dtype: torch.dtype, *, backend: BackendName | None = None) -> Tensor:
    """``(code - zero) * scale`` of every weight, evaluated in float32 and rounded to `dtype`: (N, K).

    dtype: float32, float16 or bfloat16.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a PackedWeight")
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype is {dtype!r}, expected one of {', '.join(map(str, checks.FLOATING))}")
    refuse_gradient("dequantize", scales=weight.scales)
    if is_traced(*weight.tensors):
        spec = weight.spec
        return cast(
            Tensor,
            torch.ops.qsun.dequantize(
                weight.qweight,
                weight.scales,
                weight.qzeros,
                weight.g_idx,
                spec.bits,
                encode_group_size(spec),
                spec.symmetric,
                weight.K,
                dtype,
                backend=backend,
            ),
        )
    return _launch(weight, dtype, backend)


def _launch(weight: PackedWeight, dtype: torch.dtype, backend: str | None) -> Tensor:
    spec = weight.spec
    run = launcher(
        requested_backend(backend),
        DequantizeProblem,
        weight.N,
        weight.K,
        spec.bits,
        spec.group_size,
        spec.symmetric,
        weight.g_idx is not None,
        dtype,
        weight.device,
    )
    return cast(Tensor, run(weight, dtype))


def _run(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    K: int,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    spec = decode_spec(bits, group_size, symmetric)
    return _launch(PackedWeight(spec, qweight.shape[0], K, qweight, scales, qzeros, g_idx), dtype, backend)


def _fake(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    K: int,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    return scales.new_empty((qweight.shape[0], K), dtype=dtype)


register(
    "dequantize(Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? g_idx, int bits, int group_size, "
    "bool symmetric, int K, ScalarType dtype, *, str? backend=None) -> Tensor",
    _run,
    _fake,
)
