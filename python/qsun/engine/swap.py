"""Host memory for the KV of preempted requests, and for KV that came with a request and waits for blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.kv_cache.tensors import KVCache

__all__ = ["HostSwap", "SavedKV", "finite_values", "pack_kv"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class SavedKV:
    """KV outside the cache.

    blocks: (num_layers, 2, n, num_kv_heads, block_size, head_dim).  counted: blocks it takes of the swap
    space; none for KV that came with a request and was never in the cache.
    """

    blocks: Tensor
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
        self._kv_cache.write_blocks(blocks[: saved.blocks.shape[2]], saved.blocks)

    def drop(self, saved: SavedKV) -> None:
        """Free the room of saved KV."""
        self.used -= saved.counted


def pack_kv(k: Tensor, v: Tensor, block_size: int) -> SavedKV:
    """KV of consecutive positions, computed elsewhere, as blocks that `HostSwap.restore` takes.

    k, v: (num_layers, T, num_kv_heads, head_dim) on any device, where the copy stays too.  The unused end of
    the last block is zero.
    """
    num_layers, length, num_kv_heads, head_dim = k.shape
    num_blocks = -(-length // block_size)
    padded = k.new_zeros((num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim))
    padded[:, 0, :length] = k.detach()
    padded[:, 1, :length] = v.detach()
    shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
    return SavedKV(padded.view(shape).transpose(3, 4).contiguous(), counted=0)


def finite_values(name: str, values: Tensor) -> str | None:
    """Why a tensor cannot be KV: how many of its values are not finite; None when all are."""
    bad = values.numel() - int(torch.isfinite(values).sum())
    return f"{name} holds {bad} values that are not finite, expected none" if bad else None
