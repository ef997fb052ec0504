"""From prompt chunks to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from qsun.core import Chunk, ForwardContext, PrefillAttention, PrefillChunk
from qsun.kv_cache.block_tables import blocks_for, slots_for
from qsun.layers.prefill_attention import copy_to_device

__all__ = ["prefill_inputs"]


def prefill_inputs(
    chunks: Items[Chunk], block_size: int, device: torch.device, *, max_blocks: int | None = None
) -> tuple[Tensor, ForwardContext]:
    """Token ids, int64 (T,), and context of chunks laid side by side; T is the sum of their lengths.

    max_blocks: as in `PrefillAttention`.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    parts: list[tuple[int, Chunk, list[int]]] = []
    for chunk in chunks:
        sequence = chunk.sequence
        parts.append((len(tokens), chunk, sequence.block_ids[: blocks_for(chunk.end, block_size)]))
        tokens += sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        slots += slots_for(sequence.block_ids, chunk.start, chunk.length, block_size)
    # One copy for everything: small copies to a GPU cost their latency, not their bytes.
    block_ids = [block for _, _, blocks in parts for block in blocks]
    numbers = copy_to_device(tokens + positions + slots + block_ids, torch.int64, device)
    size = len(tokens)
    token_ids, position_ids, slot_mapping, all_blocks = numbers.split([size, size, size, len(block_ids)])
    attention, taken = [], 0
    for start, chunk, blocks in parts:
        of_chunk = all_blocks[taken : taken + len(blocks)]
        attention.append(PrefillChunk(start, chunk.length, chunk.start, of_chunk))
        taken += len(blocks)
    seen = PrefillAttention(tuple(attention), max_blocks)
    return token_ids, ForwardContext(position_ids, slot_mapping, seen)
