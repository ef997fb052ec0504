"""write_kv_cache in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, WriteKvCacheProblem
from qsun_kernels.backends.reference.dtypes import refuse_dtypes


def supports(problem: WriteKvCacheProblem) -> str | None:
    """Every shape, on every device; k and v are rounded to the dtype of the cache."""
    return refuse_dtypes(dtype=problem.dtype, kv_dtype=problem.kv_dtype)


def describe(problem: WriteKvCacheProblem) -> str:
    """What runs."""
    return "torch index_put"


def run(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """``cache[slot // block_size, :, slot % block_size] = row`` for each token; tokens with a negative slot
    are skipped.

    k, v (T, H, D); caches (num_blocks, H, block_size, D), changed in place; slot_mapping int64 (T,).
    A slot past the cache raises IndexError on the CPU, and fails the device assertion of torch on a GPU.
    """
    if k.shape[0] == 0 or k_cache.shape[0] == 0:
        return
    if slot_mapping.device.type == "cpu":
        kept = slot_mapping >= 0
        if not bool(kept.all()):
            k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    else:
        k, v, slot_mapping = _replace_skipped(k, v, k_cache, v_cache, slot_mapping)
    block_size = k_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, offset] = k.to(k_cache.dtype)
    v_cache[block, :, offset] = v.to(v_cache.dtype)


def _replace_skipped(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let skipped tokens repeat the first kept one, which changes nothing and needs no count on the host.

    When every token is skipped they write to slot 0 what it holds.
    """
    kept = slot_mapping >= 0
    first = kept.to(torch.uint8).argmax()
    source = torch.where(kept, torch.arange(k.shape[0], device=k.device), first)
    slots = slot_mapping[source]
    none_kept = slots < 0
    keep = none_kept[:, None, None]
    k = torch.where(keep, k_cache[0, :, 0], k[source].to(k_cache.dtype))
    v = torch.where(keep, v_cache[0, :, 0], v[source].to(v_cache.dtype))
    return k, v, slots.clamp(min=0)


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
