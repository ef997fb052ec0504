"""The tensors of a decode step: rows that stay where they are, filled by a few vector operations a step.

A sequence enters a row and keeps it until it leaves; the row of one that left is padding (length 0, slot -1:
it attends to nothing and disturbs nobody) until another enters.  So from one step to the next nearly nothing
changes: positions, slots and lengths grow by one, and about every block_size-th step a row needs a block.

    host, advanced in place    positions slots columns keys seq_lens blocks     one buffer of 40 bytes a row
            | copied to one of two page-locked buffers: the device may still read the other
            v one copy a step
    device                     the same, and what only ever changes there:
                               block_table[row, column] = block   each step: the block that is written to
                               token_ids[row]                     the last step's draw, or the host's token
                               drawn[row] -> host                 one copy a step back; -1: no valid logits

Where `advance` is used the tokens of a step need not be known on the host: they are read where the step
before has left them.  `place` starts from tokens that the host knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Items

import numpy
import torch
from torch import Tensor

from qsun.core import DecodeAttention, ForwardContext, Sequence
from qsun.engine.noise import STATE_STEP, mix_states, row_state

__all__ = ["DecodeInputs", "Members"]

# The sequences of a step with their rows, in order of arrival.
Members = tuple[tuple[Sequence, int], ...]

_FAR = 1 << 62  # steps until something happens to a padding row
_SMALLEST, _LARGEST = (float(x) for x in (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max))
_MOST_TOP_K = torch.iinfo(torch.int32).max


class DecodeInputs:
    """The input tensors of a decode step at fixed addresses, and the sequences whose rows they are.

    A captured graph reads these very tensors, so a step changes their content and nothing else.

    max_rows: rows of the largest batch.  max_blocks: blocks of the longest sequence.
    shares_prefixes: whether sequences may begin with the same blocks.
    """

    def __init__(
        self,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        *,
        shares_prefixes: bool = False,
    ) -> None:
        self.block_size = block_size
        self.shares_prefixes = shares_prefixes
        self.max_rows = max_rows
        # Sections of the packed buffer start at 32 bytes, whatever the number of rows.
        capacity = -(-max_rows // 8) * 8
        pinned = device.type == "cuda"

        # Host state
        state = torch.zeros(5 * capacity, dtype=torch.int64)
        self._state = state.numpy()
        wide, narrow = (part.numpy() for part in _sections(state, capacity))
        self._moving = wide[:2]
        self._positions, self._slots, self._columns = wide[:3]
        self._keys = wide[3].view(numpy.uint64)
        self._seq_lens, self._blocks = narrow
        self._states = numpy.zeros(capacity, dtype=numpy.uint64)
        self._next_keys = numpy.zeros(capacity, dtype=numpy.uint64)
        self._scratch = numpy.zeros(capacity, dtype=numpy.uint64)
        self._active = numpy.zeros(capacity, dtype=numpy.int64)
        self._active32 = numpy.zeros(capacity, dtype=numpy.int32)
        # Steps before the row needs another block, and before its last step.
        self._left = numpy.full((2, capacity), _FAR, dtype=numpy.int64)

        # Page-locked
        self._staged = [torch.zeros(5 * capacity, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._staged_views = [buffer.numpy() for buffer in self._staged]
        self._results = [torch.zeros(capacity, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._host_tokens = torch.zeros(capacity, dtype=torch.int64, pin_memory=pinned)
        self._host_settings = torch.zeros((4, capacity), dtype=torch.float32, pin_memory=pinned)
        self._host_table = torch.zeros((max_rows, max_blocks), dtype=torch.int32, pin_memory=pinned)
        self._turn = 0

        # Device
        self._numbers = torch.zeros(5 * capacity, dtype=torch.int64, device=device)
        self._device_wide, self._device_narrow = _sections(self._numbers, capacity)
        self._settings = torch.zeros((4, capacity), dtype=torch.float32, device=device)
        self._table = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._invalid = torch.full((), -1, dtype=torch.int64, device=device)

        # Rows
        self._row_of: dict[Sequence, int] = {}
        self._sequences: list[Sequence | None] = [None] * capacity
        # What each row of the table was filled with: that block list, and how much of it.
        self._filled: list[tuple[list[int] | None, int]] = [(None, 0)] * capacity
        self._order: tuple[Sequence, ...] = ()
        self._members: Members | None = ()
        self._span = 0
        self._sampled: set[int] = set()
        self._settings_changed = True
        self._slots[:] = -1
        self.stage(from_host=True)

    @property
    def nbytes(self) -> int:
        """Device bytes of the tensors."""
        parts = (self._numbers, self._settings, self._table, self._token_ids, self._drawn)
        return sum(part.nbytes for part in parts)

    @property
    def num_sequences(self) -> int:
        """Sequences that have a row."""
        return len(self._row_of)

    @property
    def span(self) -> int:
        """One more than the highest row that a sequence has."""
        if self._members is None:
            self._refresh_members()
        return self._span

    @property
    def members(self) -> Members:
        """The sequences that have a row."""
        if self._members is None:
            self._refresh_members()
        assert self._members is not None
        return self._members

    def _refresh_members(self) -> None:
        rows = self._row_of
        self._members = tuple((sequence, rows[sequence]) for sequence in self._order if sequence in rows)
        self._span = max(rows.values(), default=-1) + 1

    def place(self, sequences: Items[Sequence], rows: int) -> None:
        """These sequences, in order of arrival, are the next step's; each reads its last token.

        rows: a step of so many rows will be computed; whoever has a higher row moves.
        No step may be under way on the device: what the rows are filled from is page-locked memory.
        """
        assert len(sequences) <= rows <= self.max_rows
        staying = set(sequences)
        for sequence, row in tuple(self._row_of.items()):
            moved = self._filled[row][0] is not sequence.block_ids  # it lost its blocks and got others
            if sequence not in staying or row >= rows or moved:
                self.vacate(sequence)
        if len(self._row_of) < len(sequences):
            taken = set(self._row_of.values())
            free = (row for row in range(rows) if row not in taken)
            for sequence in sequences:
                if sequence not in self._row_of:
                    self._enter(sequence, next(free))
        self._order = tuple(sequences)
        self._members = None
        self._fill()

    def _enter(self, sequence: Sequence, row: int) -> None:
        self._row_of[sequence] = row
        self._sequences[row] = sequence
        self._active[row] = self._active32[row] = 1
        params = sequence.request.params
        settings = (params.temperature, 0.0, params.top_p, params.min_p)
        if not params.greedy:
            self._sampled.add(row)
            # float32 holds neither all temperatures nor all ranks; beyond its ends nothing changes any more.
            settings = (min(max(params.temperature, _SMALLEST), _LARGEST), *settings[1:])
        self._host_settings[:, row] = torch.tensor(settings, dtype=torch.float64).float()
        self._host_settings[1].view(torch.int32)[row] = min(params.top_k, _MOST_TOP_K)
        self._settings_changed = True
        # Last: a row that an interruption has left half filled is filled again.
        self._filled[row] = (sequence.block_ids, 0)

    def vacate(self, sequence: Sequence) -> None:
        """The row of a sequence, if it has one, is padding from the next step on."""
        row = self._row_of.get(sequence)
        if row is None:
            return
        self._sequences[row] = None
        self._filled[row] = (None, 0)
        self._sampled.discard(row)
        self._positions[row] = self._columns[row] = self._seq_lens[row] = self._blocks[row] = 0
        self._slots[row] = -1
        self._active[row] = self._active32[row] = 0
        self._left[:, row] = _FAR
        # Last: until then an interruption leaves the row to the next call, for it must not write any more.
        del self._row_of[sequence]
        self._members = None

    def _fill(self) -> None:
        """Bring all rows up to what their sequences say."""
        size = self.block_size
        rows, tokens, positions, blocks, last = [], [], [], [], []
        for sequence, row in self.members:
            position = len(sequence.tokens) - 1
            rows.append(row)
            tokens.append(sequence.tokens[position])
            positions.append(position)
            blocks.append(sequence.block_ids[position // size])
            last.append(sequence.num_prompt + sequence.request.max_tokens - 2)
            self._fill_table_row(row, sequence.block_ids)
            if row in self._sampled:
                self._states[row] = row_state(sequence.request.seed, sequence.num_output)
        if not rows:
            return
        at, where = numpy.array(rows), numpy.array(positions)
        self._host_tokens.numpy()[at] = tokens
        self._positions[at] = where
        self._seq_lens[at] = where + 1
        self._blocks[at] = blocks
        self._columns[at] = where // size
        self._slots[at] = numpy.array(blocks) * size + where % size
        self._left[0, at] = size - 1 - where % size
        self._left[1, at] = numpy.array(last) - where
        if self._sampled:
            mix_states(self._states, self._keys, self._scratch)

    def _fill_table_row(self, row: int, block_ids: list[int]) -> None:
        """Copy to the device what a row of its table lacks.

        Entries past the length are never read, so what an earlier sequence left there may stay.
        """
        _, count = self._filled[row]
        if count == len(block_ids):
            return
        new = torch.tensor(block_ids[count:], dtype=torch.int32)
        self._host_table[row, count : len(block_ids)] = new
        part = self._host_table[row, count : len(block_ids)]
        self._table[row, count : len(block_ids)].copy_(part, non_blocking=True)
        self._filled[row] = (block_ids, len(block_ids))

    def advance(self, extend: Callable[[Collection[Sequence]], bool], rows_for: Callable[[int], int]) -> bool:
        """Every row's sequence reads the token after the one it reads now; those that end with it leave.

        extend: gives sequences a block more each, or none and False.  rows_for: how many rows a step of so
        many sequences is padded to.
        False, changing nothing: blocks are short, nobody is left, or fewer rows would do if some moved.
        """
        ending: list[Sequence] = []
        crossing: list[Sequence] = []
        lacking: list[Sequence] = []
        # One search through both halves; the second is looked at first, for who ends needs no block.
        for index in reversed(numpy.flatnonzero(self._left == 0).tolist()):
            half, row = divmod(index, len(self._sequences))
            sequence = self._sequences[row]
            assert sequence is not None, "padding is never due"
            if half:
                ending.append(sequence)
            elif self._left[1, row]:
                crossing.append(sequence)
                # After a step that was interrupted it may have the block already.
                if len(sequence.block_ids) == self._columns[row] + 1:
                    lacking.append(sequence)
        remaining = len(self._row_of) - len(ending)
        if remaining == 0 or rows_for(remaining) < rows_for(self.span):
            return False
        if lacking and not extend(lacking):
            return False
        for sequence in ending:
            self.vacate(sequence)
        self._moving += self._active
        self._seq_lens += self._active32
        self._left -= 1
        for sequence in crossing:
            self._cross(sequence)
        if self._sampled:
            self._keys[:] = self._next_keys
        return True

    def prepare(self) -> None:
        """Compute ahead what `advance` will need, while the device has something to do."""
        if self._sampled:
            self._states += numpy.uint64(STATE_STEP)
            mix_states(self._states, self._next_keys, self._scratch)

    def _cross(self, sequence: Sequence) -> None:
        """Into the next block of a sequence."""
        row = self._row_of[sequence]
        column = int(self._columns[row]) + 1
        block = sequence.block_ids[column]
        self._slots[row] = block * self.block_size
        self._blocks[row] = block
        self._columns[row] = column
        self._left[0, row] = self.block_size - 1
        # The step itself writes the block into the table.
        self._filled[row] = (sequence.block_ids, column + 1)

    def stage(self, *, from_host: bool) -> None:
        """Copy what the rows hold to the device.

        from_host: with the host's tokens; else the device reads the tokens that its last step has drawn.
        """
        self._turn ^= 1
        self._staged_views[self._turn][:] = self._state
        self._numbers.copy_(self._staged[self._turn], non_blocking=True)
        if from_host:
            self._token_ids.copy_(self._host_tokens, non_blocking=True)
        if self._settings_changed:
            self._settings.copy_(self._host_settings, non_blocking=True)
            self._settings_changed = False

    def fetch(self) -> Tensor:
        """Begin to copy what the step has drawn to the host: int64, by row; -1 where logits were not finite.

        The second fetch after this one overwrites it.
        """
        result = self._results[self._turn]
        result.copy_(self._drawn, non_blocking=True)
        return result

    # What follows runs on the device and may be captured.

    def write_blocks(self, rows: int) -> None:
        """Put the block that each row writes to into its block table."""
        columns, blocks = self._device_wide[2, :rows], self._device_narrow[1, :rows]
        self._table[:rows].scatter_(1, columns[:, None], blocks[:, None])

    def token_ids(self, rows: int) -> Tensor:
        """int64 (rows,)."""
        return self._token_ids[:rows]

    def context(self, rows: int) -> ForwardContext:
        """The context of the first `rows` rows."""
        seq_lens = self._device_narrow[0, :rows]
        attention = DecodeAttention(self._table[:rows], seq_lens, self.shares_prefixes)
        return ForwardContext(self._device_wide[0, :rows], self._device_wide[1, :rows], attention)

    def sampling(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """temperature, top_k, top_p, min_p and keys of the rows, as `sample_tokens` takes them."""
        temperature, top_k, top_p, min_p = self._settings[:, :rows]
        return temperature, top_k.view(torch.int32), top_p, min_p, self._device_wide[3, :rows]

    def take(self, tokens: Tensor, valid: Tensor) -> None:
        """Keep the tokens drawn, for the host and as what the next step reads."""
        drawn = self._drawn[: tokens.shape[0]]
        torch.where(valid, tokens, self._invalid, out=drawn)
        # A row without a valid token is no longer anybody's by the time this is read, but it has to be a row
        # of the embedding.
        torch.clamp(drawn, min=0, out=self._token_ids[: tokens.shape[0]])


def _sections(words: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Views of the packed buffer, int64 (5 * capacity,).

    int64 (4, capacity): positions, slots, columns, keys.  int32 (2, capacity): seq_lens, blocks.
    """
    wide, narrow = words.split([4 * capacity, capacity])
    return wide.view(4, capacity), narrow.view(torch.int32).view(2, capacity)
