"""A product split along K whose sums are left to the operator behind it, which spares a launch.

Eager calls alone: nothing here is registered with torch.
"""

from __future__ import annotations

from torch import Tensor

from qsun_kernels.backends.problems import (
    BackendName,
    PendingSums,
    PreparedWeight,
    SplitProducts,
)
from qsun_kernels.errors import BackendUnavailable
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient
from qsun_kernels.ops.prepared import check_prepared, linear_implementation

__all__ = ["sums_may_pend", "wna16_linear_pending_sums"]


def wna16_linear_pending_sums(
    x: Tensor, weight: PreparedWeight, *, backend: BackendName | None = None
) -> PendingSums:
    """``x @ W.T`` in parts along K that are not added yet, for `write_kv_cache` to add.

    x (M, K), weight from `prepare_weight`; backend as for `wna16_linear`. The rows (M, N) that the parts come
    to have the bits of `wna16_linear`, where rows of x are aligned to 16 bytes. Only products that are split
    leave parts: `sums_may_pend` tells.

    Raises TypeError or ValueError naming the argument, BackendUnavailable where a product of so many rows is
    not split, RuntimeError if a gradient is wanted or the call is traced.
    """
    check_prepared(weight, "wna16_linear", backend)
    checks.beside("x", x, weight.dtype, weight.device, "for which the weight was prepared")
    checks.rank("x", x, 2, "(M, K)")
    checks.rows("x", x)
    if x.shape[1] != weight.K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (M, K) = (M, {weight.K})")
    operator = "wna16_linear_pending_sums"
    refuse_gradient(operator, x=x)
    if is_traced(x, *weight.tensors):
        raise RuntimeError(f"{operator} was called in traced code, where sums cannot be pending")
    split = _split_products(weight.backend)
    if split is None or split.splits(x.shape[0], weight) == 1:
        reason = f"it does not split the product of {x.shape[0]} rows with this weight"
        raise BackendUnavailable(operator, weight.backend, reason)
    return split.leave(x, weight)


def sums_may_pend(rows: int, weight: PreparedWeight) -> bool:
    """Whether a product of so many rows with this weight is split, so that its sums can be left.

    Pure: depends on sizes, layout and the device alone. False in traced code.
    """
    if weight.operator != "wna16_linear" or is_traced(*weight.tensors):
        return False
    split = _split_products(weight.backend)
    return split is not None and split.splits(rows, weight) > 1


def _split_products(backend: BackendName) -> SplitProducts | None:
    implementation = linear_implementation(backend)
    return None if implementation is None else implementation.split
