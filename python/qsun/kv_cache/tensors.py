"""The tensors behind the block pool: keys and values of every layer, in blocks of `block_size` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.kv_cache.format import VALUES, KVFormat
from qsun.models.config import ModelConfig

__all__ = ["CachedBlocks", "KVCache", "LayerKV"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """The cache of one layer, as its attention needs it.

    k, v: (num_blocks, num_kv_heads, block_size, head_dim), head_dim / 2 for 4-bit codes.  k_scale, v_scale:
    float32 (num_blocks, num_kv_heads, block_size) beside codes, else None.  rotates: as in `KVFormat`.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    rotates: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class CachedBlocks:
    """A copy of some blocks of a cache, all layers.

    data: (num_layers, 2, n, num_kv_heads, block_size, width) of the cache's dtype.  scales: float32
    (num_layers, 2, n, num_kv_heads, block_size) beside codes, else None.
    """

    data: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        return self.data.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the copy is."""
        return self.data.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.data.is_cuda

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until `stream` has done what it has been given so far."""
        for tensor in (self.data, self.scales):
            if tensor is not None:
                tensor.record_stream(stream)


class KVCache:
    """Keys and values of all layers.

    A block id means the same block in every layer, so one block table serves all of them.  Slot
    `block * block_size + offset` is token `offset` of `block`.  Which block belongs to whom is the block
    pool's business; this class only holds, reads and writes them.

    layers: (k_cache, v_cache) of every layer, each (num_blocks, num_kv_heads, block_size, width).
    """

    __slots__ = ("_data", "_scales", "format", "layers")

    def __init__(self, data: Tensor, scales: Tensor | None = None, kv_format: KVFormat | None = None) -> None:
        """data: (num_layers, 2, num_blocks, num_kv_heads, block_size, width), contiguous; index 0 of
        dimension 1 are the keys, 1 the values.  scales: float32, the same without the last dimension, for a
        cache of codes.  kv_format: None is that of values of data's dtype.

        Raises ValueError or TypeError when they are anything else.
        """
        if data.dim() != 6 or data.shape[1] != 2:
            raise ValueError(
                f"data has shape {tuple(data.shape)}, expected "
                "(num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)"
            )
        if kv_format is None:
            if data.dtype not in VALUES:
                raise TypeError(f"data has dtype {data.dtype}, expected one of {VALUES}, or a kv_format")
            kv_format = KVFormat.of(data.dtype)
        if data.dtype != kv_format.dtype:
            raise TypeError(f"data has dtype {data.dtype}, expected {kv_format.dtype}")
        if not data.is_contiguous():
            raise ValueError(f"data has strides {data.stride()}, expected a contiguous tensor")
        got = None if scales is None else tuple(scales.shape)
        expected = tuple(data.shape[:5]) if kv_format.has_scales else None
        if got != expected:
            raise ValueError(f"scales has shape {got}, expected {expected} for a cache of {kv_format}")
        self._data = data
        self._scales = scales
        self.format = kv_format
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple((layer[0], layer[1]) for layer in data)

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype | KVFormat,
        device: torch.device | str,
    ) -> KVCache:
        """A cache of zeros for a model of this shape.

        num_blocks, block_size: at least 1.  dtype: float32, float16 or bfloat16, or a format.
        Raises ValueError or TypeError naming the argument; running out of memory is torch's own error.
        """
        for name, size in (("num_blocks", num_blocks), ("block_size", block_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, expected an integer of at least 1")
        kv_format = KVFormat.of(dtype)
        tokens = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size)
        data = torch.zeros((*tokens, kv_format.width(config.head_dim)), dtype=kv_format.dtype, device=device)
        scales = torch.zeros(tokens, device=device) if kv_format.has_scales else None
        return cls(data, scales, kv_format)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype | KVFormat) -> int:
        """Bytes that one block takes over all layers, keys, values and scales; what an allocation is planned
        with.
        """
        heads = 2 * config.num_layers * config.num_kv_heads
        return heads * block_size * KVFormat.of(dtype).head_bytes(config.head_dim)

    def layer(self, index: int) -> LayerKV:
        """What the attention of a layer reads and writes."""
        k, v = self.layers[index]
        if self._scales is None:
            return LayerKV(k, v)
        k_scale, v_scale = self._scales[index].unbind()
        return LayerKV(k, v, k_scale, v_scale, self.format.rotates)

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
        """Element type of the cache."""
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self._data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache, scales included."""
        return self._data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys, values and scales."""
        return self.nbytes // self.num_blocks

    def read_blocks(self, block_ids: Sequence[int]) -> CachedBlocks:
        """Copy blocks to host memory, in the order given.

        The copy is complete when the call returns.  Raises ValueError when an id is outside the cache.
        """
        index = self._index(block_ids)
        data = _read(self._data, index)
        return CachedBlocks(data, None if self._scales is None else _read(self._scales, index))

    def write_blocks(self, block_ids: Sequence[int], blocks: CachedBlocks) -> None:
        """Copy blocks that `read_blocks` returned (or KV computed elsewhere) into the cache.

        block_ids: where block i of `blocks` goes; ids must be distinct.
        blocks: len(block_ids) of them, of a cache like this one but for the number of blocks, on any device.
        Raises ValueError or TypeError when ids or blocks do not fit the cache.
        """
        index = self._index(block_ids)
        if len(set(block_ids)) != len(block_ids):
            raise ValueError(f"block_ids is {list(block_ids)}, expected distinct ids")
        for name, mine, theirs in (
            ("blocks", self._data, blocks.data),
            ("scales of blocks", self._scales, blocks.scales),
        ):
            got = None if theirs is None else tuple(theirs.shape)
            expected = None if mine is None else (*mine.shape[:2], len(block_ids), *mine.shape[3:])
            if got != expected:
                raise ValueError(f"{name} has shape {got}, expected {expected}")
            if mine is not None and theirs is not None and theirs.dtype != mine.dtype:
                raise TypeError(f"{name} has dtype {theirs.dtype}, expected {mine.dtype} like the cache")
        _write(self._data, index, blocks.data)
        if self._scales is not None and blocks.scales is not None:
            _write(self._scales, index, blocks.scales)

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        for block in block_ids:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"block_ids contains {block}, expected ids in 0..{self.num_blocks - 1}")
        return torch.tensor(block_ids, dtype=torch.int64, device=self.device)


def _movable(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that torch gathers and scatters: it does not do that with float8."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _read(tensor: Tensor, index: Tensor) -> Tensor:
    host = torch.empty((*tensor.shape[:2], len(index), *tensor.shape[3:]), dtype=tensor.dtype)
    # Layer by layer: beside a cache that fills the device there is no room for a copy of all of them.
    for layer, copy in zip(_movable(tensor), _movable(host), strict=True):
        copy.copy_(layer.index_select(1, index))
    return host


def _write(tensor: Tensor, index: Tensor, blocks: Tensor) -> None:
    for layer, copy in zip(_movable(tensor), _movable(blocks), strict=True):
        layer.index_copy_(1, index, copy.to(tensor.device))
