"""apply_rope: rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qsun_kernels.backends.dispatch import launcher, requested_backend
from qsun_kernels.backends.problems import ApplyRopeProblem, BackendName
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient, register

__all__ = ["apply_rope"]


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, *, backend: BackendName | None = None
) -> tuple[Tensor, Tensor]:
    """Turn each pair (i, i + D/2) of every head by the angle of its token's position (RoFormer, arXiv
    2104.09864).

    q (T, Hq, D) and k (T, Hk, D) of one dtype (float32, float16, bfloat16), D even; the heads of a token lie
    side by side, the token stride is free, so views into one query-key-value matrix will do. positions int64
    (T,), each a row of cos_sin, float32 (max_positions, D) as `rope_cache` makes it. Returns contiguous q and
    k, computed in float32. A position outside the table is an error on the CPU (IndexError) and undefined on
    a GPU.

    Raises TypeError or ValueError naming the argument, BackendUnavailable, RuntimeError if a gradient is
    wanted.
    """
    _check(q, k, positions, cos_sin)
    if is_traced(q, k, positions, cos_sin):
        return cast(
            "tuple[Tensor, Tensor]", torch.ops.qsun.apply_rope(q, k, positions, cos_sin, backend=backend)
        )
    return _launch(q, k, positions, cos_sin, backend=backend)


def _check(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    checks.floating("q", q)
    checks.heads("q", q, "(T, Hq, D)")
    checks.beside("k", k, q.dtype, q.device, "like q")
    checks.heads("k", k, "(T, Hk, D)")
    T, _, D = q.shape
    checks.rope("q", q, positions, cos_sin)
    if k.shape[0] != T or k.shape[2] != D:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected (T, Hk, D) = ({T}, any, {D})")
    refuse_gradient("apply_rope", q=q, k=k, cos_sin=cos_sin)


def _launch(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    run = launcher(
        requested_backend(backend), ApplyRopeProblem, q.shape[1], k.shape[1], q.shape[2], q.dtype, q.device
    )
    return cast("tuple[Tensor, Tensor]", run(q, k, positions, cos_sin))


def _fake(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


register(
    "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, *, str? backend=None) "
    "-> (Tensor, Tensor)",
    _launch,
    _fake,
)
