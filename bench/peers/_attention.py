"""What attention peers share: who refuses what, and the pages of a batch as lists."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.attention import AttentionCase, AttentionOperands
from qsun_bench.kv_choice import KvChoice


def refusal(
    case: Case,
    device: torch.device,
    *,
    head_dims: tuple[int, ...],
    capability: tuple[int, int],
    caches: tuple[KvChoice, ...] = ("auto",),
) -> str | None:
    """Why a CUDA kernel with these limits cannot run a case; None when it can. Needs no package."""
    assert isinstance(case, AttentionCase)
    reason = refused_cache(case, caches)
    if reason is not None:
        return reason
    if device.type != "cuda":
        return f"a CUDA kernel, device is {device}"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}, {device} has {found[0]}.{found[1]}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 and float16 only, got {case.dtype}"
    if case.head_dim not in head_dims:
        return f"head_dim {', '.join(map(str, head_dims))} only, got {case.head_dim}"
    return None


def refused_cache(case: AttentionCase, caches: tuple[KvChoice, ...] = ("auto",)) -> str | None:
    """Why a peer that takes these caches cannot run a case; None when it can."""
    if case.kv in caches:
        return None
    names = " and ".join("values of the dtype of q" if kv == "auto" else kv for kv in caches)
    return f"caches of {names} only, got {case.kv}"


def pages(operands: AttentionOperands) -> tuple[Tensor, Tensor, Tensor]:
    """(first page of each request and one past the last, pages of all requests, tokens of each last page).

    int32 (B + 1,) and (B,) on the CPU, where they are planned with; the pages on the device.
    """
    block_size = operands.k_cache.shape[2]
    lengths = operands.seq_lens.cpu()
    counts = (lengths + block_size - 1) // block_size
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    columns = torch.arange(operands.block_table.shape[1], device=operands.block_table.device)
    taken = columns[None, :] < counts.to(columns.device)[:, None]
    return starts, operands.block_table[taken], lengths - (counts - 1) * block_size
