"""Host memory for the KV of preempted requests, and for KV that came with a request and waits for blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.kv_cache.format import KVFormat
from qsun.kv_cache.tensors import CachedBlocks, KVCache
from qsun_kernels import write_kv_cache
from qsun_kernels.backends.problems import BackendName

__all__ = ["HostSwap", "SavedKV", "finite_values", "pack_kv"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class SavedKV:
    """KV outside the cache.

    counted: blocks it takes of the swap space; none for KV that came with a request and was never in the
    cache.
    """

    blocks: CachedBlocks
    counted: int


class HostSwap:
    """Swap space of `capacity` blocks beside a cache."""

    def __init__(self, kv_cache: KVCache, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0 blocks, got {capacity}")
        self.capacity = capacity
        self.used = 0
        self.num_failed_saves = 0
        self._kv_cache = kv_cache

    def has_room(self, count: int) -> bool:
        """Whether this many blocks fit beside what is saved already."""
        return self.used + count <= self.capacity

    def save(self, blocks: list[int]) -> SavedKV | None:
        """Copy blocks to host memory; None when the swap space, or the host, has no room for them."""
        if not self.has_room(len(blocks)):
            return None
        try:
            saved = SavedKV(self._kv_cache.read_blocks(blocks), len(blocks))
        except RuntimeError as failure:
            # torch's word for "the host is out of memory".  Without swap a request is rebuilt or kept.
            self.num_failed_saves += 1
            logger.warning("saving %d cache blocks to host memory failed: %s", len(blocks), failure)
            return None
        self.used += saved.counted
        return saved

    def restore(self, saved: SavedKV, blocks: list[int]) -> None:
        """Copy saved KV into the first of these blocks; its room is free afterwards, whatever happens."""
        self.used -= saved.counted
        self._kv_cache.write_blocks(blocks[: len(saved.blocks)], saved.blocks)

    def drop(self, saved: SavedKV) -> None:
        """Free the room of saved KV."""
        self.used -= saved.counted


def pack_kv(
    k: Tensor,
    v: Tensor,
    block_size: int,
    kv_format: KVFormat | None = None,
    *,
    device: torch.device | None = None,
    backend: BackendName | None = None,
) -> SavedKV:
    """KV of consecutive positions, computed elsewhere, as blocks that `HostSwap.restore` takes.

    k, v: (num_layers, T, num_kv_heads, head_dim) on any device, where the copy stays too.  The unused end of
    the last block is zero.  kv_format: of the cache; None is that of values of k's dtype.  For a cache of
    codes they are made on `device` (None: where k is) by `backend`, as they would be made of KV computed
    there.
    """
    num_layers, length, num_kv_heads, head_dim = k.shape
    num_blocks = -(-length // block_size)
    if kv_format is not None and kv_format.has_scales:
        shape = (num_blocks, num_kv_heads, block_size, kv_format.width(head_dim))
        encoded = [
            _encode(*pair, shape, kv_format, device or k.device, backend) for pair in zip(k, v, strict=True)
        ]
        data, scales = (torch.stack(one) for one in zip(*encoded, strict=True))
        return SavedKV(CachedBlocks(data, scales), counted=0)
    padded = k.new_zeros((num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim))
    padded[:, 0, :length] = k.detach()
    padded[:, 1, :length] = v.detach()
    values = padded.view((num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim))
    return SavedKV(CachedBlocks(values.transpose(3, 4).contiguous()), counted=0)


def _encode(
    k: Tensor,
    v: Tensor,
    shape: tuple[int, ...],
    kv_format: KVFormat,
    device: torch.device,
    backend: BackendName | None,
) -> tuple[Tensor, Tensor]:
    """One layer's codes (2, *shape) and scales (2, *shape[:3]), on the device of k (T, num_kv_heads, D)."""
    data = torch.zeros((2, *shape), dtype=kv_format.dtype, device=device)
    scales = torch.zeros((2, *shape[:3]), device=device)
    keys, values = (one.detach().to(device).contiguous() for one in (k, v))
    place = (keys, values, data[0], data[1], torch.arange(k.shape[0], device=device))
    if kv_format.rotates:
        # Keys rotate beside queries alone: here beside themselves, and what comes of these is dropped.
        write_kv_cache(*place, q=keys, rotate=True, k_scale=scales[0], v_scale=scales[1], backend=backend)
    else:
        write_kv_cache(*place, k_scale=scales[0], v_scale=scales[1], backend=backend)
    return data.to(k.device), scales.to(k.device)


def finite_values(name: str, values: Tensor) -> str | None:
    """Why a tensor cannot be KV: how many of its values are not finite; None when all are."""
    bad = values.numel() - int(torch.isfinite(values).sum())
    return f"{name} holds {bad} values that are not finite, expected none" if bad else None
