"""FlashInfer's paged decode, which its two kernels share: planned on the host, run from a graph."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qsun_bench.cases.attention import AttentionOperands
from qsun_bench.kv_choice import KvChoice
from qsun_bench.peers import Prepared, _attention, _packages

_WORKSPACE_BYTES = 128 << 20

CACHES: tuple[KvChoice, ...] = ("auto", "fp8-tensor")
"""What it reads; scales a token it has none."""


@cache
def _workspace(device: torch.device) -> Tensor:
    """Its scratch, of the size that it recommends. Calls of one stream can share it."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def prepare(operands: AttentionOperands, *, tensor_cores: bool) -> Prepared:
    """The wrapper as engines use it with CUDA graphs: buffers of fixed size, filled by `plan`."""
    kv = operands.copy()
    _, heads, block_size, head_dim = kv.k_cache.shape
    # Of a cache of codes it takes one scale for all keys and one for all values, by value.
    scales = (
        {}
        if kv.k_scale is None or kv.v_scale is None
        else {"k_scale": kv.k_scale.item(), "v_scale": kv.v_scale.item()}
    )
    starts, indices, last_tokens = _attention.pages(kv)
    wrapper = _packages.load("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
        _workspace(kv.k_cache.device),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=torch.empty_like(starts, device=indices.device),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last_tokens, device=indices.device),
    )

    def plan() -> None:
        wrapper.plan(
            starts,
            indices,
            last_tokens,
            kv.q_heads,
            heads,
            head_dim,
            block_size,
            window_left=-1 if kv.window is None else kv.window - 1,
            q_data_type=kv.dtype,
            kv_data_type=kv.k_cache.dtype,
            sm_scale=kv.softmax_scale,
        )

    plan()

    def run(q: Tensor) -> Tensor:
        out: Tensor = wrapper.run(q, (kv.k_cache, kv.v_cache), **scales)
        return out

    return Prepared(run, kv.tensors, plan=plan, plans_on_host=True)
