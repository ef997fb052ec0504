"""Weights laid out once for the operators that multiply by them: making one, checking one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import load_backend, requested_backend, select
from qsun_kernels.backends.problems import (
    BACKENDS,
    BackendName,
    LinearImplementation,
    LinearOperator,
    PreparedWeight,
    Problem,
)
from qsun_kernels.errors import BackendUnavailable
from qsun_kernels.ops import checks
from qsun_kernels.ops.dequantize import decode_spec
from qsun_kernels.ops.library import refuse_gradient
from qsun_kernels.quant import PackedWeight

__all__ = ["check_prepared", "linear_implementation", "prepare", "rebuilt"]

_MAKERS: Mapping[LinearOperator, str] = {
    "wna16_linear": "prepare_weight",
    "wna16_gate_up_silu": "prepare_gate_up",
}


@lru_cache(maxsize=8)
def linear_implementation(backend: BackendName) -> LinearImplementation | None:
    """`wna16_linear` of a backend, for what it leaves to the operators behind.

    Raises BackendUnavailable with the reason why the backend cannot run here.
    """
    module = load_backend(backend)
    reason = module.unavailable()
    if reason is not None:
        raise BackendUnavailable("wna16_linear", backend, reason)
    implementation = module.IMPLEMENTATIONS["wna16_linear"]
    return implementation if isinstance(implementation, LinearImplementation) else None


def prepare(
    maker: str,
    problem_type: Callable[..., Problem],
    packed: PackedWeight,
    dtype: torch.dtype,
    device: torch.device | str | None,
    backend: BackendName | None,
) -> PreparedWeight:
    """What the public function `maker` returns: the weight in the layout of the backend that is chosen."""
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed is a {type(packed).__name__}, expected a PackedWeight")
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype is {dtype!r}, expected one of {', '.join(map(str, checks.FLOATING))}")
    refuse_gradient(maker, scales=packed.scales)
    if device is not None:
        packed = packed.to(device)
    packed = packed.with_scales(dtype)
    spec = packed.spec
    problem = problem_type(
        packed.N,
        packed.K,
        spec.bits,
        spec.group_size,
        spec.symmetric,
        packed.g_idx is not None,
        dtype,
        packed.device,
    )
    implementation = cast(LinearImplementation, select(problem, requested_backend(backend)).implementation)
    weight = implementation.prepare(packed, dtype)
    if weight.device.type == "cuda":
        # Kernels may read a weight ahead of the stream's order, so what wrote it has to have ended.
        torch.cuda.current_stream(weight.device).synchronize()
    return weight


def check_prepared(weight: PreparedWeight, operator: LinearOperator, backend: str | None) -> None:
    """A weight that was prepared for this operator, and for this backend if one is named."""
    if not isinstance(weight, PreparedWeight):
        raise TypeError(
            f"weight is a {type(weight).__name__}, expected a PreparedWeight (see {_MAKERS[operator]})"
        )
    if weight.operator != operator:
        raise ValueError(
            f"weight was prepared for {weight.operator}, expected one for {operator} "
            f"(see {_MAKERS[operator]})"
        )
    if backend is not None and backend != weight.backend:
        raise ValueError(
            f"backend is {backend!r}, expected {weight.backend!r}, for which the weight was prepared"
        )


def rebuilt(
    operator: LinearOperator,
    tensors: list[Tensor],
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    N: int,
    K: int,
    dtype: torch.dtype,
) -> PreparedWeight:
    """The weight that the arguments of a schema stand for. Raises ValueError when they stand for none."""
    backend = layout.partition(".")[0]
    if backend not in BACKENDS:
        raise ValueError(f"layout is {layout!r}, expected one that starts with {', '.join(BACKENDS)}")
    spec = decode_spec(bits, group_size, symmetric)
    return PreparedWeight(spec, N, K, dtype, backend, layout, tuple(tensors), operator)
