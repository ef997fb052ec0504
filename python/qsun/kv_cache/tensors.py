"""The tensors behind the block pool: keys and values of every layer, in blocks of `block_size` tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsun.models.config import ModelConfig

KV_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


class KVCache:
    """Keys and values of all layers in one allocation.

    Its shape is (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim), keys before values.
    A block id means the same block in every layer, so one block table serves all of them.  Slot
    `block * block_size + offset` is token `offset` of `block`.  Which block belongs to whom is the block
    pool's business; this class only holds, reads and writes them.
    """

    __slots__ = ("_data", "layers")

    def __init__(self, data: Tensor) -> None:
        """data: (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim), contiguous; index 0 of
        dimension 1 are the keys, 1 the values.  Raises ValueError or TypeError when it is anything else.
        """
        if data.dim() != 6 or data.shape[1] != 2:
            raise ValueError(
                f"data has shape {tuple(data.shape)}, expected "
                "(num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)"
            )
        if data.dtype not in KV_DTYPES:
            raise TypeError(f"data has dtype {data.dtype}, expected one of {KV_DTYPES}")
        if not data.is_contiguous():
            raise ValueError(f"data has strides {data.stride()}, expected a contiguous tensor")
        self._data = data
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple((layer[0], layer[1]) for layer in data)

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """A cache of zeros for a model of this shape.

        num_blocks, block_size: at least 1.  dtype: float32, float16 or bfloat16.
        Raises ValueError or TypeError naming the argument; running out of memory is torch's own error.
        """
        for name, size in (("num_blocks", num_blocks), ("block_size", block_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, expected an integer of at least 1")
        if dtype not in KV_DTYPES:
            raise TypeError(f"dtype is {dtype}, expected one of {KV_DTYPES}")
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device))

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values; what an allocation is planned with."""
        return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(k_cache, v_cache) of a layer, each (num_blocks, num_kv_heads, block_size, head_dim)."""
        return self.layers[index]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._data.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks in every layer."""
        return self._data.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._data.shape[4]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of keys and values."""
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self._data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return self._data.nbytes

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self._data.nbytes // self.num_blocks

    def read_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """Copy blocks to host memory, in the order given.

        Returns (num_layers, 2, len(block_ids), num_kv_heads, block_size, head_dim) on the CPU.  The copy is
        complete when the call returns.  Raises ValueError when an id is outside the cache.
        """
        index = self._index(block_ids)
        host = torch.empty((*self._data.shape[:2], len(block_ids), *self._data.shape[3:]), dtype=self.dtype)
        # Layer by layer: beside a cache that fills the device there is no room for a copy of all of them.
        for layer, copy in zip(self._data, host, strict=True):
            copy.copy_(layer.index_select(1, index))
        return host

    def write_blocks(self, block_ids: Sequence[int], blocks: Tensor) -> None:
        """Copy blocks that `read_blocks` returned (or KV computed elsewhere) into the cache.

        block_ids: where block i of `blocks` goes; ids must be distinct.
        blocks: (num_layers, 2, len(block_ids), num_kv_heads, block_size, head_dim) of the cache's dtype, on
        any device.  Raises ValueError or TypeError when ids or blocks do not fit the cache.
        """
        index = self._index(block_ids)
        if len(set(block_ids)) != len(block_ids):
            raise ValueError(f"block_ids is {list(block_ids)}, expected distinct ids")
        expected = (*self._data.shape[:2], len(block_ids), *self._data.shape[3:])
        if tuple(blocks.shape) != expected:
            raise ValueError(f"blocks has shape {tuple(blocks.shape)}, expected {expected}")
        if blocks.dtype != self.dtype:
            raise TypeError(f"blocks has dtype {blocks.dtype}, expected {self.dtype} like the cache")
        for layer, copy in zip(self._data, blocks, strict=True):
            layer.index_copy_(1, index, copy.to(self.device))

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        for block in block_ids:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"block_ids contains {block}, expected ids in 0..{self.num_blocks - 1}")
        return torch.tensor(block_ids, dtype=torch.int64, device=self.device)
