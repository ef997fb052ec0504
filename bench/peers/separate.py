"""The same work in a launch a step: the norms of queries and of keys, the rotary embedding, the rotation, the
write. By our own kernels, but for the rotation.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.write import WriteOperands
from qsun_bench.peers import Prepared
from qsun_kernels import apply_rope, rms_norm, write_kv_cache
from qsun_kernels.testing.kv_writes import hadamard_matrix

NAME = "separate"
OPERATOR = "write_kv_cache"
NOTE = "our kernels, a launch a step; the rotation is torch's product with a dense matrix"


def available(case: Case, device: torch.device) -> str | None:
    """Everything: each operator chooses its backend by itself."""
    return None


@cache
def _hadamard(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One for all calls, as a model has it for all layers: it is in the cache of the device."""
    return hadamard_matrix(head_dim).to(device, dtype)


def prepare(operands: WriteOperands) -> Prepared:
    own = operands.copy()
    call = own.call
    hadamard = _hadamard(call.k.shape[2], call.k.dtype, call.k.device) if call.rotate else None

    def run(qkv: Tensor) -> Tensor:
        q, k, v = own.views(qkv)
        if call.q_norm is not None and call.k_norm is not None:
            q, k = rms_norm(q, call.q_norm, eps=call.eps), rms_norm(k, call.k_norm, eps=call.eps)
        if call.positions is not None and call.cos_sin is not None:
            q, k = apply_rope(q, k, call.positions, call.cos_sin)
        if hadamard is not None:
            q, k = q @ hadamard, k @ hadamard
        write_kv_cache(
            *(k, v, own.k_cache, own.v_cache, call.slot_mapping), k_scale=own.k_scale, v_scale=own.v_scale
        )
        return q

    return Prepared(run, own.tensors, judge=lambda qkv, q: operands.judge(qkv, q, own))
