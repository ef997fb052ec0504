"""From sequences to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from qsun.core import (
    Chunk,
    DecodeAttention,
    ForwardContext,
    PrefillAttention,
    PrefillChunk,
    Sequence,
)
from qsun.kv_cache.block_tables import blocks_for, slots_for

__all__ = ["DecodeInputs", "prefill_inputs"]


def prefill_inputs(
    chunks: Items[Chunk], block_size: int, device: torch.device
) -> tuple[Tensor, ForwardContext]:
    """Token ids, int64 (T,), and context of chunks laid side by side; T is the sum of their lengths."""
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
    numbers = torch.tensor(tokens + positions + slots + block_ids, dtype=torch.int64).to(device)
    size = len(tokens)
    token_ids, position_ids, slot_mapping, all_blocks = numbers.split([size, size, size, len(block_ids)])
    attention, taken = [], 0
    for start, chunk, blocks in parts:
        of_chunk = all_blocks[taken : taken + len(blocks)]
        attention.append(PrefillChunk(start, chunk.length, chunk.start, of_chunk))
        taken += len(blocks)
    return token_ids, ForwardContext(position_ids, slot_mapping, PrefillAttention(tuple(attention)))


class DecodeInputs:
    """The tensors of a decode step, at fixed addresses, refilled for each step.

    A captured graph reads these very tensors, so a step changes their content and nothing else.  On a CPU the
    same tensors are filled in place; on a GPU through page-locked copies of them.

    max_rows: rows of the largest batch.  max_blocks: blocks of the longest sequence.
    """

    def __init__(self, max_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.max_rows = max_rows
        pinned = device.type == "cuda"
        # Rows: token id, position, slot.
        self._host_numbers = torch.zeros((3, max_rows), dtype=torch.int64, pin_memory=pinned)
        self._host_seq_lens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned)
        self._host_table = torch.zeros((max_rows, max_blocks), dtype=torch.int32, pin_memory=pinned)
        self._numbers, self._seq_lens, self._table = (
            host.to(device) if pinned else host
            for host in (self._host_numbers, self._host_seq_lens, self._host_table)
        )
        # What each row of the table was last filled with: that block list, and how much of it.
        self._filled: list[tuple[list[int] | None, int]] = [(None, 0)] * max_rows
        self.padding(max_rows)

    @property
    def nbytes(self) -> int:
        """Device bytes of the tensors."""
        return self._numbers.nbytes + self._seq_lens.nbytes + self._table.nbytes

    def fill(self, sequences: Items[Sequence], rows: int) -> None:
        """Row i reads the last token of sequences[i]; rows beyond the sequences are padding."""
        assert len(sequences) <= rows <= self.max_rows
        size = self.block_size
        tokens, positions, slots, lengths = [], [], [], []
        table_changed = False
        for row, sequence in enumerate(sequences):
            position = len(sequence.tokens) - 1
            tokens.append(sequence.tokens[position])
            positions.append(position)
            slots.append(sequence.block_ids[position // size] * size + position % size)
            lengths.append(position + 1)
            table_changed |= self._fill_table_row(row, sequence.block_ids)
        padding = rows - len(sequences)
        # A padding row has length 0 and writes nowhere: it attends to nothing and disturbs nobody.
        numbers = [tokens + [0] * padding, positions + [0] * padding, slots + [-1] * padding]
        self._host_numbers[:, :rows] = torch.tensor(numbers, dtype=torch.int64)
        self._host_seq_lens[:rows] = torch.tensor(lengths + [0] * padding, dtype=torch.int32)
        self._copy_to_device(len(sequences) if table_changed else 0)

    def padding(self, rows: int) -> None:
        """Make the first `rows` rows padding."""
        self.fill([], rows)

    def _fill_table_row(self, row: int, block_ids: list[int]) -> bool:
        """Bring a row of the host's table up to date; False when it was.

        Entries past the length are never read, so what an earlier sequence left there may stay.
        """
        filled, count = self._filled[row]
        if filled is not block_ids:
            count = 0
        if count == len(block_ids):
            return False
        self._host_table[row, count : len(block_ids)] = torch.tensor(block_ids[count:], dtype=torch.int32)
        # A sequence's list only grows; a sequence that lost its blocks gets another list.
        self._filled[row] = (block_ids, len(block_ids))
        return True

    def _copy_to_device(self, table_rows: int) -> None:
        if self._numbers is self._host_numbers:
            return
        # The step before has ended (its tokens are on the host), so nothing still reads what is copied from.
        self._numbers.copy_(self._host_numbers, non_blocking=True)
        self._seq_lens.copy_(self._host_seq_lens, non_blocking=True)
        if table_rows:
            self._table[:table_rows].copy_(self._host_table[:table_rows], non_blocking=True)

    def token_ids(self, rows: int) -> Tensor:
        """int64 (rows,)."""
        return self._numbers[0, :rows]

    def context(self, rows: int) -> ForwardContext:
        """The context of the first `rows` rows."""
        attention = DecodeAttention(self._table[:rows], self._seq_lens[:rows])
        return ForwardContext(self._numbers[1, :rows], self._numbers[2, :rows], attention)
